// One model: what it does, why, and how it is run.

import store, { ApiError, at, follow, get, listen } from "./data.js";
import { actionButtons, isRefused, onGpus } from "./overview.js";
import { ago, attempt, bytes, clock, copyButton, count, h, mark, milliseconds, moment, plural, put, rate, say } from "./ui.js";
import { course, draw } from "./chart.js";
import { logView } from "./log.js";
import { planView } from "./plan.js";

/** Return how a program reaches the model: what to copy into it. */
function reachView(id) {
  const base = `${location.origin}/v1`;
  const line = (name, value) => [h("dt", {}, name), h("dd", { class: "row" }, h("code", {}, value), copyButton(value))];
  const curl = `curl ${base}/chat/completions -H 'Content-Type: application/json' \\\n  -d '{"model": "${id}", "messages": [{"role": "user", "content": "Hello"}]}'`;
  const python = `from openai import OpenAI\n\nclient = OpenAI(base_url="${base}", api_key="none")\nreply = client.chat.completions.create(model="${id}", messages=[{"role": "user", "content": "Hello"}])\nprint(reply.choices[0].message.content)`;
  const code = (title, text) => h("details", {}, h("summary", {}, title), h("div", { class: "code" }, h("div", { class: "code-head" }, h("span", {}), copyButton(text)), h("pre", { tabindex: 0 }, text)));
  return [h("dl", { class: "facts" }, line("Base URL", base), line("Model", id)), code("curl", curl), code("Python", python)];
}

function nextTry({ retry_at, is_exhausted }) {
  if (retry_at <= Date.now() / 1000) return "The next request starts it again.";
  return `It may be started again ${is_exhausted ? "by itself only after" : "at"} ${clock(retry_at)}.`;
}

export function show(main, { id }) {
  const title = h("h1", {}, id);
  const under = h("p", { class: "quiet" });
  const state = h("span", { class: "state" });
  const progress = h("progress", { max: 1, hidden: true, "aria-label": `Loading ${id}` });
  const stage = h("p", { class: "quiet small" });
  const actions = h("div", { class: "row actions" });
  const links = h("div", { class: "row" }, h("a", { class: "button", href: `#/try?model=${encodeURIComponent(id)}` }, "Try it"), h("a", { class: "button", href: `#/recipe/${encodeURIComponent(id)}` }, "Edit the recipe"));
  const tiles = h("dl", { class: "tiles" });
  const why = h("div", {});
  const facts = h("div", {}, h("p", { class: "quiet" }, "Asking …"));
  const slots = h("div", {});
  const story = h("ol", { class: "story" });
  const charts = h("div", { class: "grid charts" });
  const plan = h("div", {}, h("p", { class: "quiet" }, "Planning …"));
  const log = logView(id);
  let key = "";
  let planned = "";

  put(main,
    h("div", { class: "head" }, h("div", {}, title, under), state, actions, links),
    progress, stage, why, tiles,
    h("div", { class: "grid" },
      h("section", { class: "sheet" }, h("h2", {}, "The last hour"), charts),
      h("section", { class: "sheet" }, h("h2", {}, "Story"), story, slots)),
    h("section", { class: "sheet" }, h("h2", {}, "Log"), log.element),
    h("div", { class: "grid" },
      h("section", { class: "sheet" }, h("h2", {}, "Plan"), plan),
      h("section", { class: "sheet" }, h("h2", {}, "How programs reach it"), reachView(id), h("h2", { class: "next" }, "How it runs"), facts)));

  function drawNow() {
    const item = store.instances.get(id);
    if (!item) { say(under, "There is no such model (any more)."); return; }
    const isComing = ["starting", "loading"].includes(item.state);
    say(title, item.name);
    say(under, item.name === id ? "" : id);
    mark(state, "data-state", item.state);
    say(state, `${item.state} for ${ago(item.since)}`);
    progress.hidden = !isComing;
    if (isComing && item.progress) progress.value = item.progress;
    else progress.removeAttribute("value");
    say(stage, isComing ? [item.progress ? `${Math.round(item.progress * 100)} %` : "", item.stage ?? ""].filter(Boolean).join(" ") : "");
    stage.hidden = !isComing;
    drawTiles(item);
    const newKey = [item.state, item.is_pinned, item.is_stale, item.failures, item.in_flight, item.alerts.length, item.pid, item.is_refused, item.reason].join();
    if (newKey === key) return;
    key = newKey;
    const focused = actions.contains(document.activeElement) ? document.activeElement.dataset.word : null;
    put(actions, actionButtons(item));
    if (focused) (actions.querySelector(`[data-word="${focused}"]`) ?? actions.firstChild)?.focus();
    refresh();
    if (planned !== item.state) { planned = item.state; replan(); }
  }

  function drawTiles(item) {
    const memory = item.memory ?? {};
    const gpu = onGpus(id);
    put(tiles, [
      ["Requests", `${item.in_flight}${item.slots ? ` of ${item.slots}` : ""}`], item.queued > 0 && ["Waiting", item.queued],
      ["Tokens/s", rate(item.tokens_per_second)], ["First token", milliseconds(item.ttft_ms)], ["Context", count(item.n_ctx)],
      gpu > 0 && ["GPU memory", bytes(gpu)], ["RAM expected", bytes(memory.estimated)], ["RAM measured", bytes(memory.measured)],
    ].filter(Boolean).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value)))));
  }

  async function refresh() {
    const whole = await attempt(() => get(at("instances", id)));
    if (!whole) return;
    const hasFailed = isRefused(whole) || whole.state === "failed";
    put(why,
      hasFailed && h("div", { class: "why" }, h("p", {}, h("strong", {}, whole.reason)), whole.hint && h("p", {}, whole.hint),
        whole.retry_at && h("p", { class: "quiet" }, nextTry(whole)),
        whole.last_lines.length > 0 && h("details", { open: true }, h("summary", {}, "Its last lines"), h("pre", { tabindex: 0 }, whole.last_lines.join("\n")))),
      [...whole.alerts, ...whole.warnings].length > 0 && h("div", { class: "why warn" }, [...whole.alerts, ...whole.warnings].map((text) => h("p", {}, text))));
    put(story, [...whole.story].reverse().slice(0, 30).map((step) =>
      h("li", {}, h("span", { class: "quiet" }, `${moment(step.at)} `), h("span", { class: "state", "data-state": step.to }, step.to), ` ${step.cause}`)));
    drawFacts(whole);
  }

  function drawFacts(whole) {
    const totals = whole.totals;
    put(facts, h("dl", { class: "facts" }, [
      ["Unit", whole.unit ?? "not running"], ["Process", whole.pid ?? "–"],
      ["Served", [plural(totals.requests, "request"), plural(totals.loads, "load"), plural(totals.failures, "failure"), plural(totals.evictions, "eviction")].join(", ")],
      ["Sandbox", whole.sandbox.length ? `strict, but ${whole.sandbox.join(", ")}` : "strict"],
      ...whole.devices.map((device) => [`GPU ${device.index ?? device.uuid}`, `${plural(device.layers, "layer")}, expected ${bytes(device.estimated)}, measured ${bytes(device.measured)}`]),
      ["Notes", whole.notes.join(" ") || "–"],
    ].map(([name, value]) => [h("dt", {}, name), h("dd", {}, String(value))])));
  }

  /** Show what its next start would be like, or why there would be none. */
  async function replan() {
    try {
      put(plan, planView(await get(at("explain", id))));
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      put(plan, h("p", { class: "quiet" }, "It cannot be planned now:"), h("p", {}, error.message), error.hint && h("p", { class: "quiet" }, error.hint));
    }
  }

  function drawSlots(found) {
    put(slots, found.length > 0 && [h("h3", {}, "Slots"), h("table", {},
      h("thead", {}, h("tr", {}, ["Slot", "State", "Read", "Written"].map((name, number) => h("th", { scope: "col", class: number > 1 ? "number" : null }, name)))),
      h("tbody", {}, found.map((slot) => h("tr", {}, h("td", {}, slot.id), h("td", {}, slot.is_busy ? "busy" : "free"),
        h("td", { class: "number" }, count(slot.n_prompt)), h("td", { class: "number" }, count(slot.n_decoded))))))]);
  }

  function drawCharts(history) {
    draw(charts,
      course("Tokens/s", history.tokens_per_second, rate, history),
      course("First token", history.ttft_ms, milliseconds, history),
      course("Requests a minute", history.requests.map((value) => value || null), count, history),
      history.gpu_memory?.some((value) => value) && course("GPU memory", history.gpu_memory, bytes, history),
      course("RAM", history.memory, bytes, history));
  }

  const unfollow = follow(id, { slots: drawSlots, history: drawCharts, log: (data) => log.take(data.line), failure: log.fail }, log.begin);
  const end = listen((names) => {
    if (names.has("instances")) drawNow();
    if (names.has("reloaded")) replan();
  });
  drawNow();
  return () => { end(); unfollow(); };
}
