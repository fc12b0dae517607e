// Every model with what it does and what can be done with it, and the devices that they share.

import store, { at, get, listen, post } from "./data.js";
import { ago, arrange, attempt, button, bytes, clock, count, h, mark, milliseconds, note, put, rate, say } from "./ui.js";

const UP = new Set(["ready", "draining"]);
const COMING = new Set(["starting", "loading"]);

/** Return what a model's state allows, as [word, action, attributes]. */
export function actionsOf(item) {
  const id = item.id;
  const list = [];
  if (COMING.has(item.state)) list.push(["Cancel", () => post(at("launch", id, "cancel")), {}]);
  else if (!UP.has(item.state) && item.state !== "stopping") list.push(["Load", () => post(`${at("launch", id)}?wait=false`), { class: "main" }]);
  if (UP.has(item.state)) list.push(["Unload", () => unload(item), {}]);
  if (item.is_pinned) list.push(["Unpin", () => post(at("instances", id, "unpin")), {}]);
  else list.push(["Pin", () => post(at("instances", id, "pin")), { title: "Keep it loaded: it is not evicted and not unloaded for idleness" }]);
  if (item.failures > 0 || item.state === "failed") list.push(["Reset", () => post(at("instances", id, "reset")), { title: "Forget its failures" }]);
  return list;
}

function unload(item) {
  if (item.in_flight > 0) note(`${item.id} goes when its ${item.in_flight} requests are answered`);
  return post(at("evict", item.id));
}

/** Return the buttons for a model. */
export function actionButtons(item) {
  return actionsOf(item).map(([word, action, attributes]) =>
    button(word, (event) => attempt(action, { control: event.currentTarget }), { ...attributes, "aria-label": `${word} ${item.name}` }));
}

// Devices

/** Return a colour for a model, by its place among all of them: no two are alike, and neighbours are far apart. */
export function colour(name) {
  const place = [...store.instances.keys()].sort().indexOf(name) + 1;
  return `hsl(${Math.round(place * 137.5) % 360} 45% ${48 + 8 * (place % 3)}%)`;
}

function bar({ title, facts, total, parts, label }) {
  const known = parts.filter((part) => part.size > 0);
  return h("div", { class: "device" },
    h("div", { class: "device-head" }, h("strong", {}, title), h("span", { class: "quiet small" }, facts)),
    h("div", { class: "meter", role: "img", "aria-label": label },
      known.map((part) => h("span", { style: { width: `${Math.min(100, (100 * part.size) / total)}%`, background: part.colour }, title: `${part.name}: ${bytes(part.size)}` }))),
    h("ul", { class: "legend" },
      known.map((part) => h("li", {}, h("i", { style: { background: part.colour } }), `${part.name} ${bytes(part.size)}`)),
      h("li", { class: "quiet" }, `free ${bytes(Math.max(0, total - known.reduce((sum, part) => sum + part.size, 0)))}`)));
}

function shares(processes, promised) {
  const held = new Map();
  for (const each of processes) {
    const name = each.model ?? "other programs";
    held.set(name, (held.get(name) ?? 0) + (each.memory_used ?? 0));
  }
  for (const each of promised) if (!held.get(each.id)) held.set(each.id, each.memory);
  return held;
}

function part(name, size) {
  return { name, size, colour: name === "other programs" ? "var(--soft)" : colour(name) };
}

/** Draw what the daemon told of the machine. */
export function drawDevices(place, machine, instances) {
  if (!machine) return;
  const bars = machine.gpus.map((gpu) => {
    const held = shares(gpu.processes, gpu.promised);
    const known = [...held.values()].reduce((sum, size) => sum + size, 0);
    const parts = [...held].map(([name, size]) => part(name, size));
    if (gpu.memory_used > known) parts.push(part("other programs", gpu.memory_used - known));
    const facts = [
      gpu.utilization === null ? null : `${gpu.utilization} % busy`,
      gpu.temperature === null ? null : `${gpu.temperature} °C`,
      gpu.power_draw === null ? null : `${Math.round(gpu.power_draw)} W`,
      `${bytes(gpu.memory_total)}`,
    ].filter(Boolean).join(" · ");
    return bar({ title: `GPU ${gpu.index} ${gpu.name}`, facts, total: gpu.memory_total || 1, parts, label: `${bytes(gpu.memory_used)} of ${bytes(gpu.memory_total)} in use` });
  });
  const host = machine.host;
  const models = [...instances.values()].filter((item) => item.memory?.measured);
  const held = models.reduce((sum, item) => sum + item.memory.measured, 0);
  const parts = models.map((item) => part(item.id, item.memory.measured));
  if (host.memory_used > held) parts.push(part("other programs", host.memory_used - held));
  bars.push(bar({ title: "RAM", facts: bytes(host.memory_total), total: host.memory_total || 1, parts, label: `${bytes(host.memory_used)} of ${bytes(host.memory_total)} in use` }));
  put(place, bars, machine.faults.map((fault) => h("p", { class: "why warn" }, fault)));
}

/** Return what a model holds of the GPUs: measured where the driver tells, promised elsewhere; 0 without any. */
function onGpus(id) {
  return (store.gpus?.gpus ?? []).reduce((sum, gpu) => sum + (shares(gpu.processes, gpu.promised).get(id) ?? 0), 0);
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
    this.cells = ["Requests", "Tokens/s", "First token", "Context", "Memory"].map((title) => cell({ class: "number", "data-title": title }));
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
    if (isComing && item.progress !== null) this.progress.value = item.progress;
    else this.progress.removeAttribute("value");
    say(this.stage, isComing ? [item.progress ? `${Math.round(item.progress * 100)} %` : "", item.stage ?? ""].filter(Boolean).join(" ") : "");
    say(this.requests, item.in_flight ? `${item.in_flight}${item.slots ? ` of ${item.slots}` : ""}` : item.queued ? "" : "–");
    say(this.waiting, item.queued ? `${item.queued} waiting` : "");
    [rate(item.tokens_per_second), milliseconds(item.ttft_ms), count(item.n_ctx)].forEach((text, number) => say(this.cells[number + 1], text));
    this.weigh();
    const key = [item.state, item.is_pinned, item.failures, item.in_flight > 0].join();
    if (key !== this.key) {
      this.key = key;
      const focused = this.actions.contains(document.activeElement) ? [...this.actions.children].indexOf(document.activeElement) : -1;
      put(this.actions, actionButtons(item));
      if (focused >= 0) this.actions.children[Math.min(focused, this.actions.children.length - 1)]?.focus();
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
    const hasFailed = item.state === "failed";
    const alerts = item.alerts ?? [];
    this.why.hidden = !hasFailed && !alerts.length;
    this.box.className = hasFailed ? "why" : "why warn";
    say(this.reason, hasFailed ? item.reason : alerts.join(" "));
    const again = item.is_exhausted && item.retry_at ? ` It is not tried again until ${clock(item.retry_at)}.` : "";
    say(this.hint, hasFailed ? `${item.hint ?? ""}${again}` : "");
    this.details.hidden = !hasFailed;
  }

  async loadLines() {
    if (!this.details.open) return;
    const whole = this.item.last_lines ? this.item : await attempt(() => get(at("instances", this.item.id)));
    say(this.lines, (whole?.last_lines ?? []).join("\n") || "It has written nothing.");
  }
}

export function show(main) {
  const rows = new Map();
  const body = h("tbody", { role: "rowgroup" });
  const search = h("input", { type: "search", placeholder: "Find a model", "aria-label": "Find a model", oninput: () => draw() });
  const only = h("select", { "aria-label": "Which models", onchange: () => draw() },
    [["all", "All models"], ["up", "Loaded"], ["failed", "Failed"]].map(([value, text]) => h("option", { value }, text)));
  const devices = h("div", {}, h("p", { class: "quiet" }, "Measuring …"));
  const empty = h("p", { class: "quiet" });
  const summary = h("p", { class: "quiet" });
  const heads = ["Model", "State", "Requests", "Tokens/s", "First token", "Context", "Memory"];
  put(main,
    h("div", { class: "head" }, h("div", {}, h("h1", {}, "Models"), summary), h("div", { class: "row" }, only, search)),
    h("section", { class: "sheet", "aria-label": "Devices" }, devices),
    h("section", { class: "sheet", "aria-label": "Models" }, empty,
      // Rows are grids, of which the browser draws those in sight alone; roles tell what they were.
      h("table", { class: "models", role: "table" },
        h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, heads.map((text, number) => h("th", { role: "columnheader", class: number > 1 ? "number" : null }, text)), h("th", { role: "columnheader" }, h("span", { class: "hidden" }, "Actions")))),
        body)));

  let more = 0;
  function draw() {
    clearTimeout(more);
    const word = search.value.trim().toLowerCase();
    const isWanted = (item) =>
      (only.value === "all" || (only.value === "failed" ? item.state === "failed" : !["stopped", "failed"].includes(item.state))) &&
      (!word || item.id.includes(word) || item.name.toLowerCase().includes(word));
    const wanted = [...store.instances.values()].filter(isWanted)
      .sort((a, b) => ORDER.indexOf(a.state) - ORDER.indexOf(b.state) || a.id.localeCompare(b.id));
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
    const all = [...store.instances.values()];
    const ready = all.filter((item) => item.state === "ready").length;
    say(summary, `${all.length} ${all.length === 1 ? "model" : "models"}, ${ready} ready`);
    empty.hidden = wanted.length > 0;
    say(empty, all.length ? "No model is like that." : "No models yet: put a GGUF into a model directory (Settings names them), or make a recipe.");
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
