// A text of YAML with the numbers of its lines, where faults are marked.

import { h, put } from "./ui.js";

const NAMES = { fault: "bad", warning: "odd" };

/** Return {element, value, draw}; `change` is called with each letter. */
export function yamlEditor(change) {
  const gutter = h("pre", { class: "gutter", "aria-hidden": "true" }, "1");
  const text = h("textarea", { spellcheck: "false", "aria-label": "The recipe as YAML", oninput: () => { draw([]); change(); }, onscroll: () => { gutter.scrollTop = text.scrollTop; } });

  function draw(faults) {
    const lines = text.value.split("\n").length;
    const marks = new Map(faults.filter((fault) => fault.line).map((fault) => [fault.line, fault.severity]));
    put(gutter, Array.from({ length: lines }, (_, index) => [h("span", { class: NAMES[marks.get(index + 1)] }, `${marks.has(index + 1) ? "● " : ""}${index + 1}`), "\n"]));
    text.rows = Math.max(16, Math.min(60, lines + 1));
  }

  return {
    element: h("div", {}, h("div", { class: "editor" }, gutter, text)),
    draw,
    get value() { return text.value; },
    set value(value) { text.value = value; draw([]); },
  };
}
