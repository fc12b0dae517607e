// The API keys: who has one, what each may, when it was used last. They are made at the machine.

import { get, listen } from "./data.js";
import { attempt, day, h, put } from "./ui.js";

export function show(main) {
  const place = h("div", {}, h("p", { class: "quiet" }, "Asking …"));
  put(main, h("div", { class: "head" }, h("h1", {}, "Keys")), h("section", { class: "sheet" }, place,
    h("p", { class: "quiet" }, h("code", {}, "llmstudioctl key add NAME"), " makes a key, ", h("code", {}, "llmstudioctl key revoke NAME"), " takes it away.")));
  const load = () => attempt(() => get("/keys")).then((answer) => {
    if (!answer) { put(place); return; }
    if (!answer.keys.length) { put(place, h("p", {}, "There are no keys: every program of this machine may use the endpoint, and nobody else.")); return; }
    put(place, h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Keys" }, h("table", {},
      h("thead", {}, h("tr", {}, ["Name", "May", "Models", "Made", "Valid until", "Last model use"].map((text) => h("th", { scope: "col" }, text)))),
      h("tbody", {}, answer.keys.map((key) => h("tr", {}, h("th", { scope: "row" }, key.name),
        h("td", {}, ["use models", key.metrics && "read metrics", key.admin && "administer"].filter(Boolean).join(", ")),
        h("td", {}, key.models?.join(", ") ?? "all"), h("td", {}, day(key.created)), h("td", {}, key.expires ? day(key.expires) : "for ever"), h("td", {}, key.last_used ? day(key.last_used) : "never")))))));
  });
  load();
  return listen((names) => { if (names.has("reloaded")) load(); });
}
