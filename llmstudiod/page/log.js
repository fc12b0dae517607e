// A model's log as it is written: follow it, search it, show what matters.

import { Stream, at } from "./data.js";
import { h, mark } from "./ui.js";

const MOST = 3000, AT_ONCE = 100;
// llama-server's own levels, the third word of a line: 0.01.234.567 I srv …
const LEVEL = /^\s*[\d.]+\s+([DIWE])\s/;

/** Return a view of a log and how to end it. */
export function logView(id) {
  let isFollowing = true;
  let waiting = [];
  let isDue = false;
  const lines = [];
  const box = h("div", { class: "log mono", tabindex: 0, role: "log", "aria-label": `Log of ${id}`, "aria-live": "off" });
  const search = h("input", { type: "search", placeholder: "Search the log", "aria-label": "Search the log", oninput: () => filter() });
  const level = h("select", { "aria-label": "Which lines", onchange: () => filter() },
    [["", "All lines"], ["W", "Warnings and errors"], ["E", "Errors"]].map(([value, text]) => h("option", { value }, text)));
  const follow = h("button", { type: "button", "aria-pressed": "true", onclick: () => setFollow(!isFollowing) }, "Follow");

  function setFollow(value) {
    isFollowing = value;
    mark(follow, "aria-pressed", String(value));
    if (value) box.scrollTop = box.scrollHeight;
  }
  function isShown(line) {
    const word = search.value.trim().toLowerCase();
    const rank = "DIWE".indexOf(line.level);
    return (!level.value || rank >= "DIWE".indexOf(level.value)) && (!word || line.text.toLowerCase().includes(word));
  }
  function filter() {
    for (const line of lines) line.element.hidden = !isShown(line);
    if (isFollowing) box.scrollTop = box.scrollHeight;
  }
  function take(text) {
    waiting.push(text);
    if (waiting.length > MOST) waiting = waiting.slice(-MOST);
    if (isDue) return;
    isDue = true;
    setTimeout(flush, 60);
  }
  function flush() {
    isDue = false;
    const batch = waiting.splice(0, AT_ONCE).map((text) => {
      const found = LEVEL.exec(text)?.[1] ?? "I";
      const line = { text, level: found, element: h("div", { "data-level": found }, text) };
      line.element.hidden = !isShown(line);
      return line;
    });
    lines.push(...batch);
    box.append(...batch.map((line) => line.element));
    for (const line of lines.splice(0, Math.max(0, lines.length - MOST))) line.element.remove();
    if (isFollowing) box.scrollTop = box.scrollHeight;
    if (waiting.length) { isDue = true; setTimeout(flush, 30); }
  }
  box.addEventListener("wheel", (event) => { if (event.deltaY < 0) setFollow(false); }, { passive: true });
  box.addEventListener("keydown", (event) => { if (["ArrowUp", "PageUp", "Home"].includes(event.key)) setFollow(false); });

  let isNew = true;
  const stream = new Stream(`${at("logs", id, "stream")}?limit=500`, { log: (data) => take(data.line) }, {
    onState: (state) => {
      if (state !== "open") return;
      if (!isNew) { lines.length = 0; box.replaceChildren(); }  // it begins with the last lines again
      isNew = false;
    },
  });
  const element = h("div", {}, h("div", { class: "row" }, h("div", {}, search), h("div", {}, level), follow), box);
  return { element, end: () => stream.close() };
}
