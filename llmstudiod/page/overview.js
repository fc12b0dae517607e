// Every model with what it does and what can be done with it, and the devices that they share.

import store, { at, get, listen, post } from "./data.js";
import { ago, arrange, attempt, button, bytes, clock, count, h, mark, milliseconds, note, plural, put, rate, say } from "./ui.js";

const UP = new Set(["ready", "draining"]);
const COMING = new Set(["starting", "loading"]);
const SETTLE_MS = 400;
const OTHERS = "other programs";

/** Return what a model's state allows, as [word, action, attributes]. */
export function actionsOf(item) {
  const id = item.id;
  const list = [];
  if (COMING.has(item.state)) list.push(["Cancel", () => post(at("launch", id, "cancel")), {}]);
  else if (!UP.has(item.state) && item.state !== "stopping") list.push(["Load", () => post(`${at("launch", id)}?wait=false`), {}]);
  if (UP.has(item.state)) list.push(["Unload", () => unload(item), {}]);
  if (UP.has(item.state) && item.is_stale) list.push(["Restart", () => restart(item), { title: "Its recipe has changed, and counts from the next start on" }]);
  const keep = "Keep it loaded: it is not evicted and not unloaded for idleness";
  if (item.is_pinned) list.push(["Unpin", () => post(at("instances", id, "unpin")), { title: "Let it be evicted and unloaded like others" }]);
  else list.push(["Pin", () => post(at("instances", id, "pin")), { title: UP.has(item.state) ? keep : `${keep}. It is loaded now` }]);
  if (item.failures > 0 || item.state === "failed") list.push(["Reset", () => post(at("instances", id, "reset")), { title: "Forget its failures" }]);
  return list;
}

async function restart(item) {
  await post(at("evict", item.id));
  return post(`${at("launch", item.id)}?wait=false`);
}

function unload(item) {
  if (item.in_flight > 0) note(`${item.name} goes when its ${plural(item.in_flight, "request")} ${item.in_flight === 1 ? "is" : "are"} answered`);
  return post(at("evict", item.id));
}

// Rows stay where they are under a pointer; a finger has none, so what it hits just after they moved was not meant.
const isTouched = matchMedia("(hover: none)").matches;
let movedAt = -Infinity;

/** Return whether a model was not even started when it was wanted last. */
export function isRefused(item) { return item.state === "stopped" && Boolean(item.is_refused); }

/** Return the buttons for a model. */
export function actionButtons(item) {
  return actionsOf(item).map(([word, action, attributes]) =>
    button(word, (event) => { if (!isTouched || performance.now() - movedAt > SETTLE_MS) attempt(action, { control: event.currentTarget }); },
      { ...attributes, "data-word": word, "aria-label": `${word} ${item.name}` }));
}

// Devices

/** Return a colour for a model; it is the same on every page and every day. */
export function colour(name) {
  let hash = 2166136261;
  for (const letter of name) hash = Math.imul(hash ^ letter.codePointAt(0), 16777619) >>> 0;
  return `hsl(${hash % 360} ${42 + (hash >>> 9) % 24}% ${44 + (hash >>> 17) % 16}%)`;
}

function bar({ title, facts, total, parts, label }) {
  const known = parts.filter((part) => part.size > 0);
  const free = bytes(Math.max(0, total - known.reduce((sum, part) => sum + part.size, 0)));
  return h("div", { class: "device" },
    h("div", { class: "device-head" }, h("strong", {}, title), h("span", { class: "quiet small" }, facts)),
    h("div", { class: "meter", role: "img", "aria-label": label },
      known.map((part) => h("span", { style: { width: `${Math.min(100, (100 * part.size) / total)}%`, background: part.colour }, title: `${part.name}: ${bytes(part.size)}` }))),
    h("ul", { class: "legend" },
      known.map((part) => h("li", {}, h("i", { style: { background: part.colour } }), `${part.name} ${bytes(part.size)}`)),
      h("li", { class: "quiet" }, `free ${free} of ${bytes(total)}`)));
}

/** Return who holds how much, by name: models, and all that is none of ours together. */
function shares(gpu) {
  const held = new Map();
  const add = (name, size) => held.set(name, (held.get(name) ?? 0) + size);
  for (const each of gpu.processes) add(each.model && store.instances.has(each.model) ? each.model : OTHERS, each.memory_used ?? 0);
  for (const each of gpu.promised) if (!held.get(each.id)) add(each.id, each.memory);
  const known = [...held.values()].reduce((sum, size) => sum + size, 0);
  if (gpu.memory_used > known) add(OTHERS, gpu.memory_used - known);
  return held;
}

function parts(held) {
  const mine = [...held].filter(([name]) => name !== OTHERS).map(([name, size]) => ({ name, size, colour: colour(name) }));
  return held.has(OTHERS) ? [...mine, { name: OTHERS, size: held.get(OTHERS), colour: "var(--soft)" }] : mine;
}

/** Draw what the daemon told of the machine. */
export function drawDevices(place, machine, instances) {
  if (!machine) return;
  const bars = machine.gpus.map((gpu) => {
    const facts = [
      gpu.utilization === null ? null : `${gpu.utilization} % busy`,
      gpu.temperature === null ? null : `${gpu.temperature} °C`,
      gpu.power_draw === null ? null : `${Math.round(gpu.power_draw)} W`,
    ].filter(Boolean).join(" · ");
    return bar({ title: `GPU ${gpu.index} ${gpu.name}`, facts, total: gpu.memory_total || 1, parts: parts(shares(gpu)), label: `${bytes(gpu.memory_used)} of ${bytes(gpu.memory_total)} in use` });
  });
  const host = machine.host;
  const held = new Map([...instances.values()].filter((item) => item.memory?.measured).map((item) => [item.id, item.memory.measured]));
  const others = host.memory_used - [...held.values()].reduce((sum, size) => sum + size, 0);
  if (others > 0) held.set(OTHERS, others);
  bars.push(bar({ title: "RAM", facts: "", total: host.memory_total || 1, parts: parts(held), label: `${bytes(host.memory_used)} of ${bytes(host.memory_total)} in use` }));
  put(place, h("div", { class: "devices" }, bars), machine.faults.map((fault) => h("p", { class: "why warn" }, fault)));
}

/** Return what a model holds of the GPUs: measured where the driver tells, promised elsewhere; 0 without any. */
export function onGpus(id) {
  return (store.gpus?.gpus ?? []).reduce((sum, gpu) => sum + (shares(gpu).get(id) ?? 0), 0);
}

// The list

const ORDER = ["ready", "loading", "starting", "draining", "stopping", "failed", "stopped"];

const AT_ONCE = 4; // new rows in one go: more would hold the browser up

function cell(attributes, ...children) { return h("td", { role: "cell", ...attributes }, children); }

class Row {
  constructor(item) {
    this.name = h("a", { class: "name" });
    this.id = h("span", { class: "quiet small" });
    this.tags = h("span", {});
    this.state = h("span", { class: "state" });
    this.since = h("span", { class: "quiet small" });
    this.progress = h("progress", { max: 1, hidden: true });
    this.stage = h("span", { class: "quiet small" });
    this.cells = HEADS.slice(2).map((title) => cell({ class: "number", "data-title": title }));
    this.requests = h("div");
    this.waiting = h("div", { class: "quiet small" });
    this.cells[0].append(this.requests, this.waiting);
    this.gpu = h("div");
    this.memory = h("div");
    this.estimate = h("div", { class: "quiet small" });
    this.cells[4].append(this.gpu, this.memory, this.estimate);
    this.actions = h("div", { class: "actions" });
    this.element = h("tr", { role: "row", class: "model" },
      cell({}, this.name, " ", this.tags, h("br"), this.id),
      cell({}, this.state, " ", this.since, this.progress, this.stage),
      this.cells, cell({}, this.actions));
    this.reason = h("p", {});
    this.hint = h("p", { class: "quiet" });
    this.lines = h("pre", {});
    this.details = h("details", { ontoggle: () => this.loadLines() }, h("summary", {}, "Last lines of its log"), this.lines);
    this.box = h("div", { class: "why" }, this.reason, this.hint, this.details);
    this.why = h("tr", { role: "row", hidden: true }, cell({ colspan: 8 }, this.box));
    this.update(item);
  }

  update(item) {
    this.item = item;
    const isComing = item.state === "starting" || item.state === "loading";
    mark(this.name, "href", `#/model/${encodeURIComponent(item.id)}`);
    say(this.name, item.name);
    say(this.id, item.name === item.id ? "" : item.id);
    say(this.tags, [item.is_pinned ? "pinned" : "", item.is_stale ? "recipe changed" : ""].filter(Boolean).join(", "));
    this.tags.className = this.tags.textContent ? "tag" : "";
    mark(this.state, "data-state", item.state);
    say(this.state, item.state);
    say(this.since, item.state === "stopped" ? "" : ago(item.since));
    this.progress.hidden = !isComing;
    mark(this.progress, "aria-label", isComing ? `Loading ${item.name}` : null);
    if (isComing && item.progress) this.progress.value = item.progress;
    else this.progress.removeAttribute("value");
    say(this.stage, isComing ? [item.progress ? `${Math.round(item.progress * 100)} %` : "", item.stage ?? ""].filter(Boolean).join(" ") : "");
    say(this.requests, item.in_flight ? `${item.in_flight}${item.slots ? ` of ${item.slots}` : ""}` : item.queued ? "" : "–");
    this.requests.hidden = !this.requests.textContent;
    this.waiting.hidden = !item.queued;
    say(this.waiting, item.queued ? `${item.queued} waiting` : "");
    [rate(item.tokens_per_second), milliseconds(item.ttft_ms), count(item.n_ctx)].forEach((text, number) => say(this.cells[number + 1], text));
    this.weigh();
    for (const each of this.cells) each.classList.toggle("none", ["", "–"].includes(each.textContent));
    this.element.classList.toggle("at-rest", item.state === "stopped");
    const key = [item.state, item.is_pinned, item.is_stale, item.failures, item.in_flight, item.name].join();
    if (key !== this.key) {
      this.key = key;
      const focused = this.actions.contains(document.activeElement) ? document.activeElement.dataset.word : null;
      put(this.actions, actionButtons(item));
      if (focused) (this.actions.querySelector(`[data-word="${focused}"]`) ?? this.actions.firstChild)?.focus();
    }
    this.explain(item);
  }

  weigh() {
    const { memory = {}, id } = this.item;
    const gpu = onGpus(id);
    const ram = memory.measured ? bytes(memory.measured) : memory.estimated ? `≈ ${bytes(memory.estimated)}` : "";
    say(this.gpu, gpu ? `${bytes(gpu)} GPU` : "");
    say(this.memory, ram ? `${ram} RAM` : gpu ? "" : "–");
    say(this.estimate, memory.measured && memory.estimated ? `≈ ${bytes(memory.estimated)} expected` : "");
  }

  explain(item) {
    const hasFailed = isRefused(item) || item.state === "failed";
    const alerts = item.alerts ?? [];
    this.why.hidden = !hasFailed && !alerts.length;
    this.box.className = hasFailed ? "why" : "why warn";
    say(this.reason, hasFailed ? item.reason : alerts.join(" "));
    const again = item.is_exhausted && item.retry_at ? ` It is not tried again until ${clock(item.retry_at)}.` : "";
    say(this.hint, hasFailed ? `${item.hint ?? ""}${again}` : "");
    this.details.hidden = item.state !== "failed";
  }

  async loadLines() {
    if (!this.details.open) return;
    const whole = this.item.last_lines ? this.item : await attempt(() => get(at("instances", this.item.id)));
    say(this.lines, (whole?.last_lines ?? []).join("\n") || "It has written nothing.");
  }
}

const HEADS = ["Model", "State", "Requests", "Tokens/s", "First token", "Context", "Memory"];

/** Return what there is to do where there is no model yet. */
function beginning() {
  const place = h("div", { class: "beginning" }, h("h2", {}, "No models yet"),
    h("p", {}, "Put a GGUF into a model directory, and it is here in a moment. Or say more about it in a recipe."));
  get("/config").then(({ settings }) => place.append(h("ul", {}, settings.model_dirs.map((path) => h("li", {}, h("code", {}, path)))),
    h("p", { class: "row" }, h("a", { class: "button main", href: "#/recipe" }, "New recipe"))), () => {});
  return place;
}

export function show(main, { query }) {
  const rows = new Map();
  const body = h("tbody", { role: "rowgroup" });
  const search = h("input", { type: "search", placeholder: "Find a model", "aria-label": "Find a model", value: query.get("q") ?? "", title: "Press / to come here", oninput: () => narrow() });
  const only = h("select", { "aria-label": "Which models", onchange: () => narrow() },
    [["all", "All models"], ["up", "Loaded"], ["failed", "Failed"]].map(([value, text]) => h("option", { value }, text)));
  if (query.has("only")) only.value = query.get("only");
  const devices = h("div", {}, h("p", { class: "quiet" }, "Measuring …"));
  const empty = h("div", {});
  const summary = h("p", { class: "quiet" });
  // Rows are grids, of which the browser draws those in sight alone; roles tell what they were.
  const table = h("table", { class: "models", role: "table", onpointerleave: () => draw(), onfocusout: () => setTimeout(draw) },
    h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, HEADS.map((text, number) => h("th", { role: "columnheader", class: number > 1 ? "number" : null }, text)), h("th", { role: "columnheader" }, h("span", { class: "hidden" }, "Actions")))),
    body);
  put(main,
    h("div", { class: "head" }, h("div", {}, h("h1", {}, "Models"), summary), h("div", { class: "row finding" }, only, search)),
    h("div", { class: "overview" },
      h("section", { class: "sheet", "aria-label": "Devices" }, devices),
      h("section", { class: "sheet", "aria-label": "Models" }, empty, table)));

  /** Keep what was looked for in the address, so that it is there when somebody comes back. */
  function narrow() {
    const words = new URLSearchParams([["q", search.value.trim()], ["only", only.value === "all" ? "" : only.value]].filter(([, value]) => value));
    history.replaceState(null, "", words.size ? `#/?${words}` : "#/");
    draw();
  }

  /** Return the models in their order. Nothing moves under a pointer, a finger or the keyboard's focus. */
  function ordered(wanted) {
    const isHeld = table.matches(":hover") || table.contains(document.activeElement);
    if (!isHeld || !places.size) {
      const sorted = [...store.instances.values()].sort((a, b) => ORDER.indexOf(a.state) - ORDER.indexOf(b.state) || a.id.localeCompare(b.id));
      const now = new Map(sorted.map((item, number) => [item.id, number]));
      if (places.size && sorted.some((item) => places.has(item.id) && places.get(item.id) !== now.get(item.id))) movedAt = performance.now();
      places = now;
    }
    const last = places.size;
    return wanted.sort((a, b) => (places.get(a.id) ?? last) - (places.get(b.id) ?? last));
  }

  let places = new Map();
  let more = 0;
  function draw() {
    clearTimeout(more);
    const word = search.value.trim().toLowerCase();
    const isWanted = (item) =>
      (only.value === "all" || (only.value === "failed" ? item.state === "failed" : !["stopped", "failed"].includes(item.state))) &&
      (!word || item.id.includes(word) || item.name.toLowerCase().includes(word));
    const all = [...store.instances.values()];
    const wanted = ordered(all.filter(isWanted));
    const shown = [];
    let made = 0;
    for (const item of wanted) {
      let row = rows.get(item.id);
      if (!row && made === AT_ONCE) { more = setTimeout(draw); break; }
      if (!row) { rows.set(item.id, row = new Row(item)); made += 1; }
      else if (row.item !== item) row.update(item);
      shown.push(row.element, row.why);
    }
    for (const id of rows.keys()) if (!store.instances.has(id)) rows.delete(id);
    arrange(body, shown);
    summarise(all, wanted.length);
  }

  function summarise(all, nShown) {
    const nOf = (state) => all.filter((item) => item.state === state).length;
    const rate_ = all.reduce((sum, item) => sum + (item.state === "ready" ? item.tokens_per_second ?? 0 : 0), 0);
    const nBusy = all.reduce((sum, item) => sum + item.in_flight, 0);
    const nWaiting = all.reduce((sum, item) => sum + item.queued, 0);
    say(summary, [plural(all.length, "model"), `${nOf("ready")} ready`, nOf("failed") && `${nOf("failed")} failed`, nBusy && `${plural(nBusy, "request")} in flight`, nWaiting && `${nWaiting} waiting`, rate_ && `${rate(rate_)} tokens/s`].filter(Boolean).join(" · "));
    table.hidden = nShown === 0;
    empty.hidden = nShown > 0;
    if (nShown > 0 || empty.dataset.of === String(all.length > 0)) return;
    empty.dataset.of = String(all.length > 0);
    put(empty, all.length ? h("p", { class: "quiet" }, "No model is like that.") : beginning());
  }

  let held = "";
  function drawMachine() {
    const now = [...store.instances.values()].map((item) => item.memory?.measured ?? "").join();
    if (store.gpus === machine && now === held) return;
    machine = store.gpus;
    held = now;
    drawDevices(devices, store.gpus, store.instances);
    for (const row of rows.values()) row.weigh();
  }
  let machine = null;
  let later = 0;

  const end = listen((names) => {
    if (names.has("instances")) draw();
    if (names.has("gpus") || names.has("instances")) { clearTimeout(later); later = setTimeout(drawMachine); }
  });
  const ticking = setInterval(() => { for (const row of rows.values()) if (row.item.state !== "stopped") say(row.since, ago(row.item.since)); }, 5000);
  draw();
  if (store.gpus) drawMachine();
  return () => { end(); clearInterval(ticking); clearTimeout(more); clearTimeout(later); };
}
