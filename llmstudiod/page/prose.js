// What a model writes, as it is meant to be read: paragraphs, lists, headings, code. Elements are made, never markup.

import { copyButton, h } from "./ui.js";

const INLINE = /(`+)([^`]+)\1(?!`)|\*\*([^*]+(?:\*[^*]+)*?)\*\*|__([^_]+)__|\*([^\s*](?:[^*]*[^\s*])?)\*/g;
const DEEPEST = 3, LONGEST_RULE = 1000;

/** Return a line's words, with code, bold and italic ones in their elements. Links stay text: a model may invent them. */
function inline(text, depth = 0) {
  if (depth === DEEPEST) return [text];
  const out = [];
  let from = 0;
  for (const found of text.matchAll(INLINE)) {
    const [whole, , code, bold, alsoBold, italic] = found;
    if (found.index > from) out.push(text.slice(from, found.index));
    out.push(code !== undefined ? h("code", {}, code) : italic !== undefined ? h("em", {}, inline(italic, depth + 1)) : h("strong", {}, inline(bold ?? alsoBold, depth + 1)));
    from = found.index + whole.length;
  }
  out.push(text.slice(from));
  return out;
}

function codeBlock(lines, language) {
  const text = lines.join("\n");
  return h("div", { class: "code" }, h("div", { class: "code-head" }, h("span", { class: "quiet small" }, language || "code"), copyButton(text)), h("pre", { tabindex: 0 }, text));
}

const FENCE = /^\s*(`{3,}|~{3,})\s*([\w+#.-]*)/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)/;

/** Whether a line is what stands below a table's head: | --- | :-: | */
function isRule(line) { return line.length < LONGEST_RULE && line.includes("|") && cells(line).every((each) => /^:?-{2,}:?$/.test(each)); }

function cells(line) { return line.trim().replace(/^\||\|$/g, "").split("|").map((each) => each.trim()); }

function table(lines) {
  const [head, , ...rows] = lines.map(cells);
  return h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, head.map((each) => h("th", { scope: "col" }, inline(each))))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((each) => h("td", {}, inline(each))))))));
}

/** Return a list and its lists; ``items``: [indent, number or nothing, text]. */
function list(items) {
  const [[indent, number]] = items;
  const element = h(number === undefined ? "ul" : "ol", number === undefined ? {} : { start: number });
  for (let at = 0; at < items.length;) {
    let end = at + 1;
    while (end < items.length && items[end][0] > indent + 1) end += 1;
    element.append(h("li", {}, inline(items[at][2]), end > at + 1 ? list(items.slice(at + 1, end)) : null));
    at = end;
  }
  return element;
}

/** Return a text's blocks, as [source, how to make its element]; what is not understood stays as it is. */
function blocks(text) {
  const lines = text.split("\n");
  const out = [];
  let plain = [];
  const add = (from, to, make) => out.push([lines.slice(from, to).join("\n"), make]);
  const flush = () => {
    const words = plain.join("\n").trim();
    if (words) out.push([words, () => h("p", {}, inline(words))]);
    plain = [];
  };
  const take = (from, fits) => { let to = from; while (to < lines.length && fits(lines[to])) to += 1; return to; };
  for (let at = 0; at < lines.length;) {
    const line = lines[at], begin = at;
    const fence = FENCE.exec(line), heading = /^(#{1,6})\s+(.*)/.exec(line);
    const isTable = line.includes("|") && isRule(lines[at + 1] ?? "");
    if (!fence && !heading && !isTable && !ITEM.test(line)) {
      if (line.trim()) plain.push(line); else flush();
      at += 1;
      continue;
    }
    flush();
    if (fence) {
      const end = take(at + 1, (each) => !each.trim().startsWith(fence[1]));
      at = end + 1;
      add(begin, at, () => codeBlock(lines.slice(begin + 1, end), fence[2]));
    } else if (heading) {
      at += 1;
      add(begin, at, () => h("p", { class: "heading" }, inline(heading[2])));
    } else if (isTable) {
      const end = at = take(at, (each) => each.includes("|"));
      add(begin, end, () => table(lines.slice(begin, end)));
    } else {
      const end = at = take(at, (each) => ITEM.test(each));
      add(begin, end, () => list(lines.slice(begin, end).map((each) => { const [, indent, number, words] = ITEM.exec(each); return [indent.length, number, words]; })));
    }
  }
  flush();
  return out;
}

const drawn = new WeakMap();

/** Show a text in the Markdown that models write. It may grow: what has not changed is left alone, and may be selected. */
export function drawProse(place, text) {
  const before = drawn.get(place) ?? [];
  const now = blocks(text);
  let same = 0;
  while (same < Math.min(before.length, now.length) && before[same] === now[same][0]) same += 1;
  while (place.children.length > same) place.lastChild.remove();
  place.append(...now.slice(same).map(([, make]) => make()));
  drawn.set(place, now.map(([source]) => source));
}
