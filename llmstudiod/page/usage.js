// What was used: totals, days, hours, models.

import store, { get, listen } from "./data.js";
import { attempt, count, day, h, milliseconds, put, rate } from "./ui.js";
import { bars } from "./chart.js";

const HEADS = ["Model", "Requests", "Good", "Read", "Written", "Reads/s", "Writes/s", "First byte", "Median"];

export function show(main) {
  const place = h("div", {}, h("p", { class: "quiet" }, "Counting …"));
  put(main, h("div", { class: "head" }, h("h1", {}, "Usage")), place);
  let counted = null;
  const load = () => attempt(() => Promise.all([get("/usage"), get("/lifetime-metrics")])).then((found) => {
    if (found) draw(place, ...found);
  });
  load();
  return listen((names) => {
    const now = store.metrics?.lifetime_requests_total;
    if (!names.has("metrics") || now === counted) return;
    if (counted !== null) load();
    counted = now;
  });
}

function tile(name, value) { return h("div", {}, h("dt", {}, name), h("dd", {}, value)); }

function draw(place, usage, lifetime) {
  const { totals, recent_activity: recent } = usage;
  put(place,
    h("dl", { class: "tiles" },
      tile("Requests, kept", count(totals.total_requests)), tile("Good", `${totals.success_rate} %`),
      tile("Last 24 hours", count(recent.last_24h_requests)), tile("Median answer", milliseconds(usage.latency.p50_ms)),
      tile("Tokens of all times", count(lifetime.tokens_total)), tile("Requests of all times", count(lifetime.requests_total)),
      tile("From the cache", `${usage.cache.hit_rate} %`), tile("GPU energy", `${lifetime.energy_kwh.toFixed(2)} kWh`)),
    h("div", { class: "grid" },
      h("section", { class: "sheet" }, h("h2", {}, "Days"), bars("Tokens a day, two weeks", usage.daily.map((each) => ({ name: each.date, value: each.total_tokens })), count)),
      h("section", { class: "sheet" }, h("h2", {}, "Hours"), bars("Requests by hour of the day", usage.hourly_pattern.map((each) => ({ name: `${each.hour}:00`, value: each.requests })), count))),
    h("p", {}),
    h("section", { class: "sheet" }, h("h2", {}, "Models"), usage.by_model.length === 0 ? h("p", { class: "quiet" }, "No model has served anything yet.")
      : h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Models" }, h("table", {},
        h("thead", {}, h("tr", {}, HEADS.map((text, number) => h("th", { scope: "col", class: number ? "number" : null }, text)))),
        h("tbody", {}, usage.by_model.map((each) => h("tr", {}, h("th", { scope: "row" }, h("a", { href: `#/model/${encodeURIComponent(each.model)}` }, each.model)),
          [count(each.requests), `${each.success_rate} %`, count(each.prompt_tokens), count(each.completion_tokens), rate(each.prefill_tps), rate(each.generation_tps), milliseconds(each.avg_ttft_ms), milliseconds(each.p50_latency_ms)]
            .map((text) => h("td", { class: "number" }, text)))))))),
    usage.by_key.length > 0 && h("section", { class: "sheet" }, h("h2", {}, "Keys"), h("table", {},
      h("thead", {}, h("tr", {}, ["Key", "Requests", "Tokens", "Last use"].map((text, number) => h("th", { scope: "col", class: number ? "number" : null }, text)))),
      h("tbody", {}, usage.by_key.map((each) => h("tr", {}, h("th", { scope: "row" }, each.key || "without a key"), [count(each.requests), count(each.tokens), day(each.last_used)].map((text) => h("td", { class: "number" }, text))))))));
}
