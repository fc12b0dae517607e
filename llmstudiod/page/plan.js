// What a start would do: memory with its terms, placement, the command line.

import { bytes, count, h } from "./ui.js";

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

/** Return where the model would go. */
export function placementView(placement) {
  if (!placement) return null;
  const evicts = placement.evicts.length ? `It would take the place of ${placement.evicts.join(", ")}.` : null;
  const waits = placement.waits_for.length ? `It would wait for ${placement.waits_for.join(", ")}.` : null;
  return [
    placement.error && h("div", { class: "why" }, h("p", {}, placement.error), placement.hint && h("p", { class: "quiet" }, placement.hint)),
    [evicts, waits].filter(Boolean).map((text) => h("p", {}, text)),
    h("p", { class: "quiet small" }, `${placement.is_running ? "It runs now." : "It would be started now."} Memory by ${placement.source}.`),
    placement.place && h("p", {}, placement.place.gpus.length
      ? placement.place.gpus.map((gpu) => `${gpu.layers} layers on ${gpu.name} (${bytes(gpu.memory)})`).join(", ") + `; ${bytes(placement.place.ram)} of RAM at most.`
      : `On the CPU: ${bytes(placement.place.ram)} of RAM at most, the cache of prompts included.`),
    placement.memory?.length > 0 && h("ul", { class: "legend" }, placement.memory.map((each) =>
      h("li", {}, `${each.name}: ${bytes(each.free)} free of ${bytes(each.total)}`))),
  ];
}

/** Return a whole plan. */
export function planView(plan) {
  return [
    h("p", {}, `${count(plan.n_ctx)} tokens for each of ${plan.n_parallel} ${plan.n_parallel === 1 ? "slot" : "slots"}, ${count(plan.n_ctx_total)} in all.`),
    plan.notes?.map((text) => h("p", { class: "why warn" }, text)),
    estimateView(plan.estimate),
    placementView(plan.placement),
    h("details", {}, h("summary", {}, "Command line"), h("pre", {}, (plan.argv ?? []).join(" "))),
    plan.systemd_run && h("details", {}, h("summary", {}, "systemd-run"), h("pre", {}, plan.systemd_run.join(" "))),
  ];
}
