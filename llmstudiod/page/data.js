// Talks to the daemon, and keeps what it tells: JSON both ways, and one event stream that every part reads.

export class ApiError extends Error {
  constructor(status, answer) {
    const inner = answer?.error ?? answer ?? {};
    super(inner.detail ?? inner.message ?? `the daemon answered ${status}`);
    this.status = status;
    this.hint = inner.hint ?? null;
    this.kind = inner.kind ?? "internal";
    this.lines = inner.lines ?? [];
    this.faults = inner.faults ?? [];
  }
}

let whenSignedOut = () => {};

/** Have a function called when the daemon wants somebody to sign in; it is told whether a page waits for an answer. */
export function onSignedOut(action) { whenSignedOut = action; }

/** Ask the daemon; `heard` is given the headers of a good answer. */
export async function call(method, path, { body, type, signal, headers: more, heard } = {}) {
  const headers = { ...more };
  let payload;
  if (body !== undefined) {
    headers["Content-Type"] = type ?? "application/json";
    payload = type === undefined ? JSON.stringify(body) : body;
  }
  let response;
  try {
    response = await fetch(path, { method, headers, body: payload, signal, credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { detail: "the daemon cannot be reached", hint: "it may be starting again; try once more" });
  }
  if (response.ok) heard?.(response.headers);
  if (response.ok && response.headers.get("Content-Type")?.startsWith("application/yaml")) return response.text();
  const answer = await response.json().catch(() => null);
  if (response.status === 401 && path !== "/sign-in") whenSignedOut(method === "GET");
  if (!response.ok) throw new ApiError(response.status, answer);
  return answer;
}

export const get = (path, options) => call("GET", path, options);
export const post = (path, body, options) => call("POST", path, { body, ...options });
export const put = (path, body, options) => call("PUT", path, { body, ...options });
export const del = (path) => call("DELETE", path);
export const at = (...parts) => "/" + parts.map(encodeURIComponent).join("/");

/** Read an event stream for as long as `close` is not called; it comes back by itself after a break. */
export class Stream {
  constructor(path, handlers, { onState = () => {} } = {}) {
    this.path = path;
    this.handlers = handlers;
    this.onState = onState;
    this.delay = 500;
    this.open();
  }

  open() {
    this.source = new EventSource(this.path);
    this.source.onopen = () => { this.delay = 500; this.onState("open"); };
    this.source.onerror = () => {
      this.onState("lost");
      if (this.source.readyState === EventSource.CLOSED) this.retry();
    };
    for (const [name, handler] of Object.entries(this.handlers)) {
      this.source.addEventListener(name, (event) => handler(JSON.parse(event.data).data));
    }
  }

  /** A browser gives up after an answer that is no stream: sign-in is asked for, or we try again ourselves. */
  async retry() {
    clearTimeout(this.timer);
    this.timer = setTimeout(async () => {
      const response = await fetch("/events/stats", { credentials: "same-origin" }).catch(() => null);
      if (response?.status === 401) { whenSignedOut(false); return; }
      if (this.source) this.open();
    }, this.delay);
    this.delay = Math.min(this.delay * 2, 8000);
  }

  close() {
    clearTimeout(this.timer);
    this.source?.close();
    this.source = null;
  }
}

// What the page knows

const store = { instances: new Map(), gpus: null, metrics: null, status: null, link: "wait" };
const listeners = new Set();
let stream = null;
let isTold = false;
let wasAway = false;
let followed = null;
let opening = 0, leaving = 0;
let isWanted = false;
const HIDDEN_MS = 1000;

export default store;

/** Have a function called, at most once a frame, with the names of what has changed; returns how to end that. */
export function listen(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

const changed = new Set();

function tell(name) {
  changed.add(name);
  if (isTold) return;
  isTold = true;
  const flush = () => {
    isTold = false;
    const names = new Set(changed);
    changed.clear();
    for (const listener of [...listeners]) listener(names);
  };
  if (document.hidden) setTimeout(flush, 250);
  else requestAnimationFrame(flush);
}

function takeAll({ instances }) {
  if (wasAway) tell("reloaded");  // it may have been told meanwhile
  wasAway = false;
  store.instances = new Map(instances.map((item) => [item.id, item]));
  tell("instances");
}

function takeSome({ instances, removed }) {
  for (const item of instances) store.instances.set(item.id, item);
  for (const id of removed ?? []) store.instances.delete(id);
  tell("instances");
}

const STATES = { launching: "starting", waiting: "loading", ready: "ready", evicting: "draining", stopping: "stopping", stopped: "stopped", cancelled: "stopped", error: "failed" };

function takeProgress({ recipe_id: id, stage, progress, message, kind, hint = null }) {
  const item = store.instances.get(id);
  if (!item) return;
  if (kind !== undefined) { // a start that was refused: it is what it was
    store.instances.set(id, { ...item, reason: message, kind, hint, is_refused: true });
    tell("instances");
    return;
  }
  const state = STATES[stage] ?? item.state;
  const since = state === item.state ? item.since : Date.now() / 1000;
  store.instances.set(id, { ...item, state, since, progress, stage: message, is_refused: false });
  tell("instances");
}

const news = [];

/** Return what has happened since this was asked last, to be said aloud: [[name, state, reason]]. */
export function takeNews() { return news.splice(0); }

function takeTransition({ id, to, failure }) {
  const item = store.instances.get(id);
  if (!item) return;
  if (to === "failed" && failure) store.instances.set(id, { ...item, state: to, reason: failure.message, kind: failure.kind, hint: failure.hint, last_lines: failure.lines });
  if (to === "failed" || to === "ready") news.push([item.name, to, failure?.message]);
  tell("instances");
}

/**
 * Begin to read along. One stream for all: a browser has six connections for a host, and six tabs must not use them
 * up. So a tab that nobody sees has none, and what is read of one model comes by the same.
 */
export function connect() {
  isWanted = true;
  stream?.close();
  stream = null;
  if (document.hidden) { wasAway = true; return; }
  const path = followed ? `/events?brief=true&model=${encodeURIComponent(followed.id)}` : "/events?brief=true";
  stream = new Stream(path, {
    snapshot: takeAll,
    instances: takeSome,
    launch_progress: takeProgress,
    transition: takeTransition,
    gpu: (data) => { store.gpus = data; tell("gpus"); },
    metrics: (data) => { store.metrics = data; tell("metrics"); },
    status: (data) => { store.status = data; tell("status"); },
    reloaded: () => tell("reloaded"),
    ...followed?.handlers,
  }, {
    onState: (state) => {
      if (state === "lost") wasAway = true;
      if (state === "open") followed?.onOpen?.();
      store.link = state;
      tell("link");
    },
  });
}

/** Read along what one model does, too; returns how to end that. */
export function follow(id, handlers, onOpen) {
  const mine = { id, handlers, onOpen };
  const reopen = () => { clearTimeout(opening); opening = setTimeout(() => { if (isWanted) connect(); }); };
  followed = mine;
  reopen();
  return () => { if (followed === mine) { followed = null; reopen(); } };
}

export function disconnect() {
  isWanted = false;
  clearTimeout(opening);
  stream?.close();
  stream = null;
  store.link = "wait";
  tell("link");
}

document.addEventListener("visibilitychange", () => {
  clearTimeout(leaving);
  if (!isWanted) return;
  if (!document.hidden) { if (!stream) connect(); return; }
  leaving = setTimeout(() => { stream?.close(); stream = null; wasAway = true; }, HIDDEN_MS);
});
