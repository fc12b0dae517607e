// Elements, quantities and messages: what every part of the page is made of.
// No markup in strings: nothing that comes from outside is ever read as HTML.

import { ApiError } from "./data.js";

// Elements
const SVG = "http://www.w3.org/2000/svg";

/** Return an element. Attributes: `on…` are listeners, `class`, `style` (an object), true and false, or text. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, text] of Object.entries(value)) element.style.setProperty(key, text);
    else if (name === "value" || name === "checked" || name === "selected") element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...flat(children));
  return element;
}

function flat(children) {
  return children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
}

/** Have these elements as the children, in this order; those that are in their place stay untouched, with the focus. */
export function arrange(parent, elements) {
  const wanted = new Set(elements);
  for (const child of [...parent.children]) if (!wanted.has(child)) child.remove();
  let next = parent.firstChild;
  for (const element of elements) {
    if (element === next) next = next.nextSibling;
    else parent.insertBefore(element, next);
  }
}

/** Put children in the place of those that are there. */
export function put(element, ...children) {
  element.replaceChildren(...flat(children));
  return element;
}

/** Write text only where it differs, so that nothing is laid out again for nothing. */
export function say(element, text) {
  const wanted = text ?? "";
  if (element.textContent !== wanted) element.textContent = wanted;
}

/** Set or remove an attribute where it differs. */
export function mark(element, name, value) {
  if (!element) return;
  if (value === null || value === undefined || value === false) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
  } else if (element.getAttribute(name) !== String(value)) {
    element.setAttribute(name, value === true ? "" : String(value));
  }
}

/** Return a function that calls another once things have been quiet for some milliseconds. */
export function settle(action, milliseconds) {
  let timer = 0;
  return (...words) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...words), milliseconds);
  };
}

/** Return a button that copies a text, or what a function returns, and says so. */
export function copyButton(text, words = "Copy", attributes = { class: "small" }) {
  return button(words, async (event) => {
    const control = event.currentTarget;
    if (!await copy(typeof text === "function" ? text() : text)) {
      note("The browser does not let it be copied: mark it and copy it yourself", { isError: true });
      return;
    }
    say(control, "Copied");
    setTimeout(() => say(control, words), 2000);
  }, attributes);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {  // there is none where the page is served without TLS
    const helper = h("textarea", { class: "hidden", value: text, "aria-hidden": "true" });
    const focused = document.activeElement;
    document.body.append(helper);
    helper.select();
    const isDone = document.execCommand("copy");
    helper.remove();
    focused?.focus();
    return isDone;
  }
}

/** Return a button. */
export function button(text, action, attributes = {}) {
  return h("button", { type: "button", onclick: action, ...attributes }, text);
}

let numbers = 0;

/** Return an id for a label and its control. */
export function freshId(prefix = "f") {
  numbers += 1;
  return `${prefix}${numbers}`;
}

// Quantities

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(count) {
  if (count === null || count === undefined) return "–";
  let value = count, unit = 0;
  while (Math.abs(value) >= 1024 && unit < UNITS.length - 1) { value /= 1024; unit += 1; }
  return `${value.toFixed(unit < 2 || value >= 100 ? 0 : 1)} ${UNITS[unit]}`;
}

/** Return a number of things: "1 load", "2 loads". */
export function plural(number, word, many = `${word}s`) { return `${count(number)} ${number === 1 ? word : many}`; }

export function count(value) {
  return value === null || value === undefined ? "–" : value.toLocaleString("en");
}

export function rate(value) {
  if (value === null || value === undefined) return "–";
  return value >= 100 ? Math.round(value).toLocaleString("en") : value.toFixed(1);
}

export function milliseconds(value) {
  if (value === null || value === undefined) return "–";
  return value < 1000 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(value < 10000 ? 2 : 1)} s`;
}

/** Return how long a number of seconds is. */
export function span(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

/** Return how long ago a moment was, in seconds since 1970. */
export function ago(moment) {
  return moment === null || moment === undefined ? "–" : span(Date.now() / 1000 - moment);
}

export function clock(moment) {
  return new Date(moment * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
}

/** Return a moment with its seconds, and with its day if that is not today. */
export function moment(at) {
  const date = new Date(at * 1000);
  const isToday = date.toDateString() === new Date().toDateString();
  return date.toLocaleString([], isToday ? { timeStyle: "medium" } : { dateStyle: "medium", timeStyle: "medium" });
}

export function day(moment) {
  return moment ? new Date(moment * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" }) : "–";
}

// Messages

/** Show a message for a while; an error stays until it is closed. */
export function note(text, { hint = null, isError = false } = {}) {
  const close = () => item.remove();
  const item = h("div", { class: isError ? "note error" : "note" },
    h("p", {}, text), hint && h("p", { class: "quiet" }, hint),
    h("button", { type: "button", class: "plain", "aria-label": "Close", onclick: close }, "×"));
  document.getElementById("notes").append(item);
  if (!isError) setTimeout(close, 5000);
  return close;
}

/** Take the messages away: what they tell of is not on the page any more. */
export function clearNotes() { put(document.getElementById("notes")); }

/** Do something that may fail, and tell; a button does nothing meanwhile. Returns null where it failed. */
export async function attempt(action, { told = null, control = null } = {}) {
  if (control?.getAttribute("aria-disabled")) return null;
  mark(control, "aria-disabled", "true");  // not `disabled`: a browser would take the focus away
  try {
    const answer = await action();
    if (told) note(typeof told === "function" ? told(answer) : told);
    return answer;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status !== 401) note(error.message, { hint: error.hint, isError: true });
    return null;
  } finally {
    mark(control, "aria-disabled", null);
  }
}
