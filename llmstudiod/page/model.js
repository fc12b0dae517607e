// One model: what it does, why, and how it is run.

import store, { Stream, at, get, listen } from "./data.js";
import { actionButtons } from "./overview.js";
import { ago, attempt, bytes, clock, count, day, h, mark, milliseconds, put, rate, say } from "./ui.js";
import { course, draw } from "./chart.js";
import { logView } from "./log.js";
import { planView } from "./plan.js";

export function show(main, { id }) {
  const title = h("h1", {}, id);
  const under = h("p", { class: "quiet" });
  const state = h("span", { class: "state" });
  const progress = h("progress", { max: 1, hidden: true, "aria-label": `Loading ${id}` });
  const actions = h("div", { class: "row" });
  const tiles = h("dl", { class: "tiles" });
  const why = h("div", {});
  const facts = h("div", {}, h("p", { class: "quiet" }, "Asking …"));
  const slots = h("div", {});
  const story = h("ol", { class: "story" });
  const charts = h("div", { class: "grid charts" });
  const plan = h("div", {}, h("p", { class: "quiet" }, "Planning …"));
  const log = logView(id);
  let whole = null;
  let key = "";

  put(main,
    h("div", { class: "head" }, h("div", {}, title, under), state, actions),
    progress, why, tiles,
    h("div", { class: "grid" },
      h("section", { class: "sheet" }, h("h2", {}, "The last hour"), charts),
      h("section", { class: "sheet" }, h("h2", {}, "Story"), story, slots)),
    h("section", { class: "sheet" }, h("h2", {}, "Log"), log.element),
    h("div", { class: "grid" },
      h("section", { class: "sheet" }, h("h2", {}, "Plan"), plan),
      h("section", { class: "sheet" }, h("h2", {}, "How it runs"), facts)));

  function drawNow() {
    const item = store.instances.get(id);
    if (!item) { say(under, "There is no such model (any more)."); return; }
    const isComing = ["starting", "loading"].includes(item.state);
    say(title, item.name);
    say(under, item.name === id ? "" : id);
    mark(state, "data-state", item.state);
    say(state, `${item.state} for ${ago(item.since)}`);
    progress.hidden = !isComing;
    if (isComing && item.progress !== null) progress.value = item.progress;
    else progress.removeAttribute("value");
    const memory = item.memory ?? {};
    put(tiles, [
      ["Requests", `${item.in_flight}${item.slots ? ` of ${item.slots}` : ""}`], ["Waiting", item.queued],
      ["Tokens/s", rate(item.tokens_per_second)], ["First token", milliseconds(item.ttft_ms)], ["Context", count(item.n_ctx)],
      ["RAM estimated", bytes(memory.estimated)], ["RAM measured", bytes(memory.measured)],
    ].map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value)))));
    const newKey = [item.state, item.is_pinned, item.failures, item.in_flight > 0, item.alerts.length, item.pid].join();
    if (newKey === key) return;
    key = newKey;
    put(actions, actionButtons(item), h("a", { class: "button", href: `#/try?model=${encodeURIComponent(id)}` }, "Try it"),
      h("a", { class: "button", href: `#/recipe/${encodeURIComponent(id)}` }, "Edit the recipe"));
    refresh();
  }

  async function refresh() {
    whole = await attempt(() => get(at("instances", id)));
    if (!whole) return;
    const failed = whole.state === "failed";
    put(why,
      failed && h("div", { class: "why" }, h("p", {}, h("strong", {}, whole.reason)), whole.hint && h("p", {}, whole.hint),
        whole.retry_at && h("p", { class: "quiet" }, `It may be started again ${whole.is_exhausted ? "by itself only after" : "at"} ${clock(whole.retry_at)}.`),
        whole.last_lines.length > 0 && h("details", { open: true }, h("summary", {}, "Its last lines"), h("pre", {}, whole.last_lines.join("\n")))),
      [...whole.alerts, ...whole.warnings].length > 0 && h("div", { class: "why warn" }, [...whole.alerts, ...whole.warnings].map((text) => h("p", {}, text))));
    put(story, [...whole.story].reverse().slice(0, 30).map((step) =>
      h("li", {}, h("span", { class: "quiet" }, `${day(step.at)} `), h("span", { class: "state", "data-state": step.to }, step.to), ` ${step.cause}`)));
    const totals = whole.totals;
    put(facts, h("dl", { class: "facts" }, [
      ["Unit", whole.unit ?? "not running"], ["Process", whole.pid ?? "–"],
      ["Served", `${count(totals.requests)} requests, ${count(totals.loads)} loads, ${count(totals.failures)} failures, ${count(totals.evictions)} evictions`],
      ["Sandbox", whole.sandbox.length ? `strict, but ${whole.sandbox.join(", ")}` : "strict"],
      ...whole.devices.map((device) => [`GPU ${device.index ?? device.uuid}`, `${device.layers} layers, estimated ${bytes(device.estimated)}, measured ${bytes(device.measured)}`]),
      ["Notes", whole.notes.join(" ") || "–"],
    ].map(([name, value]) => [h("dt", {}, name), h("dd", {}, String(value))])),
    whole.argv && h("details", {}, h("summary", {}, "Command line"), h("pre", {}, whole.argv.join(" "))));
  }

  function drawSlots(found) {
    put(slots, found.length > 0 && [h("h3", {}, "Slots"), h("table", {},
      h("thead", {}, h("tr", {}, ["Slot", "State", "Read", "Written"].map((name, number) => h("th", { scope: "col", class: number > 1 ? "number" : null }, name)))),
      h("tbody", {}, found.map((slot) => h("tr", {}, h("td", {}, slot.id), h("td", {}, slot.is_busy ? "busy" : "free"),
        h("td", { class: "number" }, count(slot.n_prompt)), h("td", { class: "number" }, count(slot.n_decoded))))))]);
  }

  function drawCharts(history) {
    draw(charts,
      course("Tokens per second", history.tokens_per_second, rate),
      course("Time to first token", history.ttft_ms, milliseconds),
      course("Requests a minute", history.requests.map((value) => value || null), count),
      course("RAM", history.memory, bytes));
  }

  attempt(() => get(at("explain", id))).then((answer) => put(plan, answer ? planView(answer) : h("p", { class: "quiet" }, "It cannot be planned now.")));
  const live = new Stream(at("instances", id, "live"), { slots: drawSlots, history: drawCharts });
  const end = listen((names) => { if (names.has("instances")) drawNow(); });
  drawNow();
  return () => { end(); live.close(); log.end(); };
}
