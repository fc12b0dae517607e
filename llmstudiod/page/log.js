// A model's log as it is written: follow it, search it, show what matters.

import { copyButton, h, mark, put, say } from "./ui.js";

const MOST = 3000, AT_ONCE = 100, NEAR_END = 24;
// llama-server's own levels, the third word of a line: 0.01.234.567 I srv …
const LEVEL = /^\s*[\d.]+\s+([DIWE])\s/;
// What is printed past its log: by the C++ runtime, by CUDA, by ggml's assertions, before the log is set up.
const RAW_ERROR = /^(error: |main: error|terminate called|CUDA error|ROCm error|.*: CUDA error|.*GGML_ASSERT\(|ggml_cuda.*(fail|error)|Segmentation fault)/;
const COLOURS = /\u001b\[[0-9;?]*[ -/]*[@-~]/g;

/** Return a view of a log, and what takes a line of it. */
export function logView(id) {
  let isFollowing = true;
  let isNew = false;
  let waiting = [];
  let isDue = false;
  const lines = [];
  const none = h("p", { class: "quiet" }, "It has written nothing yet.");
  const box = h("div", { class: "log mono", tabindex: 0, role: "log", "aria-label": `Log of ${id}`, "aria-live": "off", onscroll: () => scrolled() });
  const search = h("input", { type: "search", placeholder: "Search the log", "aria-label": "Search the log", oninput: () => filter() });
  const level = h("select", { "aria-label": "Which lines", onchange: () => filter() },
    [["", "All lines"], ["W", "Warnings and errors"], ["E", "Errors"]].map(([value, text]) => h("option", { value }, text)));
  const follow = h("button", { type: "button", "aria-pressed": "true", onclick: () => setFollow(!isFollowing) }, "Follow");
  const copy = copyButton(() => lines.filter(isShown).map((line) => line.text).join("\n"));

  function setFollow(value) {
    isFollowing = value;
    mark(follow, "aria-pressed", String(value));
    if (value) toEnd();
  }
  function toEnd() { box.scrollTop = box.scrollHeight; }
  /** Whoever scrolls away, by whatever means, wants to read there; whoever comes back to the end follows again. */
  function scrolled() {
    const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_END;
    if (isAtEnd !== isFollowing) { isFollowing = isAtEnd; mark(follow, "aria-pressed", String(isAtEnd)); }
  }
  function isShown(line) {
    const word = search.value.trim().toLowerCase();
    const rank = "DIWE".indexOf(line.level);
    return (!level.value || rank >= "DIWE".indexOf(level.value)) && (!word || line.text.toLowerCase().includes(word));
  }
  function filter() {
    for (const line of lines) line.element.hidden = !isShown(line);
    tellNone();
    if (isFollowing) toEnd();
  }
  function tellNone() {
    none.hidden = lines.some((line) => !line.element.hidden);
    say(none, lines.length ? "No line is like that." : "It has written nothing yet.");
  }
  function take(text) {
    waiting.push(text);
    if (waiting.length > MOST) waiting = waiting.slice(-MOST);
    if (isDue) return;
    isDue = true;
    setTimeout(flush, 60);
  }
  function levelOf(text) {
    return LEVEL.exec(text)?.[1] ?? (RAW_ERROR.test(text) ? "E" : "I");
  }
  function flush() {
    isDue = false;
    if (isNew) { lines.length = 0; box.replaceChildren(none); isNew = false; }  // it begins with the last lines again
    const batch = waiting.splice(0, AT_ONCE).map((raw) => {
      const text = raw.replace(COLOURS, "");
      const line = { text, level: levelOf(text), element: h("div", {}, text) };
      mark(line.element, "data-level", line.level);
      line.element.hidden = !isShown(line);
      return line;
    });
    lines.push(...batch);
    const wasFollowing = isFollowing;
    box.append(...batch.map((line) => line.element));
    for (const line of lines.splice(0, Math.max(0, lines.length - MOST))) line.element.remove();
    tellNone();
    if (wasFollowing) toEnd();
    if (waiting.length) { isDue = true; setTimeout(flush, 30); }
  }

  const trouble = h("div", { role: "status" });
  /** Say why there is no more of it. */
  function fail(error) {
    put(trouble, h("div", { class: "why" }, h("p", {}, error.detail), error.hint && h("p", { class: "quiet" }, error.hint)));
  }

  box.append(none);
  const element = h("div", {}, h("div", { class: "row" }, search, level, follow, copy), trouble, box);
  return { element, take, fail, begin: () => { isNew = lines.length > 0; put(trouble); } };
}
