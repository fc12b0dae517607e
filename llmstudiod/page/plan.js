// What would become of a recipe: context, memory by device and kind, placement, the command line.

import { colour } from "./overview.js";
import { bytes, copyButton, count, h } from "./ui.js";

const TERMS = [["weights", "Weights"], ["kv", "KV cache"], ["compute", "Compute buffer"], ["runtime", "Runtime"], ["repacked", "Repacked"], ["total", "Total"]];

/** Return the estimate as a table: a column for RAM and for each GPU. */
export function estimateView(estimate) {
  if (!estimate) return h("p", { class: "quiet" }, "The file does not tell what it needs.");
  const places = [["RAM", estimate.host], ...estimate.devices.map((device, number) => [`GPU ${number}`, device])];
  const terms = TERMS.filter(([key]) => places.some(([, values]) => values[key]));
  return h("div", { class: "scroll" }, h("table", { class: "terms" },
    h("thead", {}, h("tr", {}, h("td", {}), places.map(([name]) => h("th", { scope: "col", class: "number" }, name)))),
    h("tbody", {}, terms.map(([key, text]) => h("tr", {}, h("th", { scope: "row" }, text), places.map(([, values]) => h("td", { class: "number" }, bytes(values[key] ?? 0))))))));
}

/** Return a device as a bar: who holds what of it, and hatched what the model would take. */
function bar(each, mine, evicts) {
  const total = each.total || 1;
  const parts = [
    ...each.models.filter(({ id }) => !evicts.includes(id)).map(({ id, memory }) => ({ name: id, size: memory, colour: colour(id) })),
    { name: "other programs", size: each.others, colour: "var(--soft)" },
    { name: "this model", size: mine, isNew: true },
  ].filter((part) => part.size > 0);
  const look = (part) => ({ class: part.isNew ? "new" : null, style: part.isNew ? {} : { background: part.colour } });
  return h("div", { class: "device" },
    h("div", { class: "device-head" }, h("strong", {}, each.name), h("span", { class: "quiet small" }, `${bytes(each.free)} free of ${bytes(each.total)}`)),
    h("div", { class: "meter", role: "img", "aria-label": `${each.name}: ${parts.map((part) => `${part.name} ${bytes(part.size)}`).join(", ") || "nobody"}` },
      parts.map((part) => { const { style, ...rest } = look(part); return h("span", { ...rest, title: `${part.name}: ${bytes(part.size)}`, style: { ...style, width: `${Math.min(100, (100 * part.size) / total)}%` } }); })),
    h("ul", { class: "legend" }, parts.map((part) => h("li", {}, h("i", look(part)), `${part.name} ${bytes(part.size)}`))));
}

/** Return where the model would go. */
export function placementView(placement) {
  if (!placement) return null;
  const evicts = placement.evicts.length ? `It would take the place of ${placement.evicts.join(", ")}.` : null;
  const waits = placement.waits_for.length ? `It would wait for ${placement.waits_for.join(", ")}.` : null;
  const place = placement.place;
  const isNew = place && !placement.is_running;  // one that runs is among those who hold something
  const taken = ({ name, uuid }) => (!isNew ? 0 : name === "RAM" ? place.ram
    : place.gpus.find((gpu) => (gpu.uuid ? gpu.uuid === uuid : gpu.name === name))?.memory ?? 0);
  return [
    placement.error && h("div", { class: "why" }, h("p", {}, placement.error), placement.hint && h("p", { class: "quiet" }, placement.hint)),
    [evicts, waits].filter(Boolean).map((text) => h("p", {}, text)),
    h("p", { class: "quiet small" }, `${placement.is_running ? "It runs now." : "It would be started now."} Memory by ${placement.source}.`),
    place && h("p", {}, place.gpus.length
      ? place.gpus.map((gpu) => `${gpu.layers} layers on ${gpu.name} (${bytes(gpu.memory)})`).join(", ") + `; ${bytes(place.ram)} of RAM at most.`
      : `On the CPU: ${bytes(place.ram)} of RAM at most, the cache of prompts included.`),
    (placement.memory ?? []).map((each) => bar(each, taken(each), [...placement.evicts, ...placement.waits_for])),
  ];
}

/** Return words as a shell reads them. */
export function quoted(words) {
  return (words ?? []).map((word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`)).join(" ");
}

function commandView(title, words) {
  const text = quoted(words);
  return h("details", {}, h("summary", {}, title), copyButton(text, "Copy", { class: "copy" }), h("pre", {}, text));
}

/** Return a whole plan; `told` are notes that stand elsewhere already. */
export function planView(plan, { told = [] } = {}) {
  const defaults = plan.defaults ?? [];
  return [
    h("p", {}, `${count(plan.n_ctx)} tokens for each of ${plan.n_parallel} ${plan.n_parallel === 1 ? "slot" : "slots"}, ${count(plan.n_ctx_total)} in all.`),
    plan.notes?.filter((text) => !told.includes(text)).map((text) => h("p", { class: defaults.includes(text) ? "quiet small" : "why warn" }, text)),
    estimateView(plan.estimate),
    placementView(plan.placement),
    commandView("Command line", plan.argv),
    plan.systemd_run && commandView("systemd-run", plan.systemd_run),
  ];
}
