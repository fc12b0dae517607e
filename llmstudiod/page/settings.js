// The settings in force, where each came from, and what is wrong with the files.

import { get, listen } from "./data.js";
import { signOut } from "./app.js";
import { attempt, button, bytes, h, put, span } from "./ui.js";

export function show(main) {
  const place = h("div", {}, h("p", { class: "quiet" }, "Asking …"));
  const out = button("Sign out", signOut);
  put(main, h("div", { class: "head" }, h("h1", {}, "Settings"), out), place);
  const load = () => attempt(() => Promise.all([get("/config"), get("/status")])).then((found) => { if (found) draw(place, ...found); });
  load();
  return listen((names) => { if (names.has("reloaded")) load(); });
}

function written(value) { return typeof value === "string" ? value : JSON.stringify(value); }

const ZERO = { idle_timeout: "never", exit_idle: "never", max_instances: "as many as fit", restart_limit: "no limit" };

/** Return what a number means, where that is not plain to see. */
function meaning(name, value) {
  if (typeof value !== "number") return "";
  if (value === 0) return ZERO[name] ? ` (${ZERO[name]})` : "";
  if (name === "max_body") return ` (${bytes(value)})`;
  return value >= 60 && /(timeout|window|interval|idle|keep)$/.test(name) ? ` (${span(value)})` : "";
}

function draw(place, config, status) {
  const server = status.llama_server;
  put(place,
    status.faults.length > 0 && h("section", { class: "sheet" }, h("h2", {}, "Faults and warnings"), h("ul", { class: "faults" }, status.faults.map((fault) =>
      h("li", { class: fault.severity }, [fault.file, fault.line].filter(Boolean).join(":"), fault.file ? ": " : "", fault.key ? `${fault.key}: ` : "", fault.message, fault.hint && h("div", { class: "quiet" }, fault.hint))))),
    h("section", { class: "sheet" }, h("h2", {}, "Programs"), h("dl", { class: "facts" }, [
      ["llmstudiod", status.version], ["llama-server", server.error ?? `${server.version} (${server.command.join(" ")}, from ${server.source})`],
      ["Devices", server.devices?.join(", ") || "CPU only"], ["Launcher", status.launcher], ["Ports", status.ports.join(", ")],
    ].map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]))),
    h("section", { class: "sheet" }, h("h2", {}, "In force"), h("p", { class: "quiet" }, "They stand in llmstudiod.yaml, and count a moment after they are changed there."),
      h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Settings" }, h("table", {},
        h("thead", {}, h("tr", {}, ["Setting", "Value", "From"].map((text) => h("th", { scope: "col" }, text)))),
        h("tbody", {}, Object.entries(config.settings).map(([name, value]) => h("tr", {}, h("th", { scope: "row" }, h("code", {}, name)),
          h("td", {}, h("code", {}, written(value)), h("span", { class: "quiet" }, meaning(name, value))), h("td", { class: "quiet" }, config.sources[name] ?? "default"))))))));
}
