// The frame: navigation, signing in, messages; each page is loaded when it is first opened.

import store, { connect, disconnect, listen, onSignedOut, post, takeNews } from "./data.js";
import { clearNotes, h, mark, note, put, say } from "./ui.js";
import * as overview from "./overview.js";

const PAGES = [
  ["", "Models"], ["recipe", "New recipe"], ["try", "Try it"], ["usage", "Usage"], ["keys", "Keys"], ["settings", "Settings"],
];
const LOADERS = {
  "": async () => overview,
  model: () => import("./model.js"),
  recipe: () => import("./recipe.js"),
  try: () => import("./tryit.js"),
  usage: () => import("./usage.js"),
  keys: () => import("./keys.js"),
  settings: () => import("./settings.js"),
};
const PRELOAD_MS = 3000;  // so that a page can still be opened while the daemon is away
const main = document.getElementById("main");
const sessions = new BroadcastChannel("llmstudio-session");
const scrolled = new Map();
let leave = () => {};
let dismissSignIn = () => {};
let isSignedIn = false;
let isMissing = false;  // the page that was asked for could not be fetched
let isIncomplete = false;  // the page that is shown has lost a question to the end of the session
let shown = null;
let asked = 0;

function place() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, ...rest] = path.split("/");
  try {
    return { name, id: decodeURIComponent(rest.join("/")), query: new URLSearchParams(query ?? "") };
  } catch {  // a link that was cut in the middle of a letter
    return { name: "?", id: "", query: new URLSearchParams() };
  }
}

function drawNav(name) {
  put(document.getElementById("nav"), PAGES.map(([page, title]) =>
    h("a", { href: `#/${page}`, "aria-current": page === name || (page === "" && name === "model") ? "page" : null }, title)));
}

async function show({ isFirst = false } = {}) {
  if (!isSignedIn) return;
  const mine = ++asked;
  const hash = location.hash;
  const { name, id, query } = place();
  let view = null, isAway = false;
  try {
    view = await LOADERS[name]?.();
  } catch {
    isAway = true;
  }
  if (mine !== asked || !isSignedIn) return;  // somebody has gone on meanwhile
  leave();
  leave = () => {};
  if (!isFirst) clearNotes();
  drawNav(name);
  isMissing = isAway;
  shown = isAway ? null : hash;
  isIncomplete = false;
  if (isAway) put(main, h("h1", {}, "The daemon cannot be reached"), h("p", { class: "quiet" }, "This page comes as soon as it answers again."));
  else if (!view) put(main, h("h1", {}, "There is no such page"), h("p", {}, h("a", { href: "#/" }, "To the models")));
  else leave = view.show(main, { id, query }) ?? (() => {});
  drawTitle();
  if (!isFirst) main.focus({ preventScroll: true });
  window.scrollTo(0, scrolled.get(hash) ?? 0);
}

function drawTitle() {
  const title = main.querySelector("h1")?.textContent ?? "Models";
  const all = [...store.instances.values()];
  const nLoading = all.filter((item) => ["starting", "loading"].includes(item.state)).length;
  const mine = `${nLoading ? `(${nLoading} loading) ` : ""}${title} – llmstudiod`;
  if (isSignedIn && document.title !== mine) document.title = mine;
}

function drawLink() {
  const link = document.getElementById("link");
  mark(link, "data-state", store.link);
  say(link, store.link === "open" ? "live" : store.link === "lost" ? "connection lost, trying again …" : "");
  if (store.link === "open" && isMissing) show();
}

/** Say aloud what became of loads, for those who do not see it. */
function tellNews() {
  const news = takeNews().map(([name, state, reason]) => (state === "failed" ? `${name} has failed: ${reason ?? ""}` : `${name} is ready`));
  if (news.length) say(document.getElementById("news"), news.slice(-3).join(". "));
}

/** Ask to sign in, above the page: what was typed there is still there afterwards, and covered meanwhile. */
async function signInPage(reason = "") {
  const wasSignedIn = isSignedIn;
  disconnect();
  isSignedIn = false;
  const { ask, dismiss } = await import("./signin.js");
  dismissSignIn = dismiss;
  if (!wasSignedIn) { drawNav(null); put(document.getElementById("nav")); put(main); }
  ask({ reason, done: () => (wasSignedIn ? resume() : start()) });
}

/** Go on where it ended. A page that was not there yet is drawn anew; what was typed in another is worth more. */
function resume() {
  isSignedIn = true;
  connect();
  if (isIncomplete) show({ isFirst: true });
  else drawTitle();
}

/** Show the page as soon as the daemon has told what there is. */
function start() {
  isSignedIn = true;
  connect();
  const end = listen((names) => {
    if (!names.has("instances")) return;
    end();
    show({ isFirst: true });
    setTimeout(() => { for (const load of Object.values(LOADERS)) load().catch(() => {}); }, PRELOAD_MS);
  });
}

async function begin() {
  const code = /^#code=(.+)$/.exec(location.hash)?.[1];
  if (code) {
    history.replaceState(null, "", "/");
    try {
      await post("/sign-in", { code });
    } catch (error) {
      return signInPage(error.message);
    }
    dismissSignIn();
  }
  return start();
}

/** End the session here, and in every other tab. */
export async function signOut() {
  try {
    await post("/sign-out", {});
  } catch (error) {
    note(error.message, { hint: error.hint, isError: true });
    return;
  }
  sessions.postMessage("signed out");
  location.reload();
}

sessions.onmessage = () => location.reload();
onSignedOut((isQuestion) => {
  isIncomplete ||= isQuestion;
  if (isSignedIn) signInPage(store.instances.size ? "You are signed out." : "");
});
window.addEventListener("hashchange", (event) => {
  if (shown !== null) scrolled.set(new URL(event.oldURL).hash, window.scrollY);  // a search may have changed it
  if (/^#code=/.test(location.hash)) begin();
  else show();
});
document.addEventListener("keydown", (event) => {
  const isTyping = event.target.closest?.("input, textarea, select, dialog") || event.ctrlKey || event.metaKey || event.altKey;
  const field = main.querySelector('input[type="search"]');
  if (event.key === "/" && !isTyping && field) { event.preventDefault(); field.focus(); }
});
listen((names) => {
  if (names.has("link")) drawLink();
  if (names.has("instances")) { tellNews(); drawTitle(); }
});
begin();
