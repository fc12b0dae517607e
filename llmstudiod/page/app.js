// The frame: navigation, signing in, messages; each page is loaded when it is first opened.

import store, { connect, disconnect, get, listen, onSignedOut, post } from "./data.js";
import { h, mark, put, say } from "./ui.js";
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
const main = document.getElementById("main");
let leave = () => {};
let isSignedIn = false;

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
  const { name, id, query } = place();
  const load = LOADERS[name];
  leave();
  leave = () => {};
  drawNav(name);
  if (!load) { put(main, h("h1", {}, "There is no such page"), h("p", {}, h("a", { href: "#/" }, "To the models"))); return; }
  const view = await load();
  leave = view.show(main, { id, query }) ?? (() => {});
  const title = main.querySelector("h1")?.textContent ?? "Models";
  document.title = `${title} – llmstudiod`;
  if (!isFirst) main.focus({ preventScroll: true });
  window.scrollTo(0, 0);
}

function drawLink() {
  const link = document.getElementById("link");
  mark(link, "data-state", store.link);
  say(link, store.link === "open" ? "live" : store.link === "lost" ? "connection lost, trying again …" : "");
}

async function signInPage(reason = "") {
  if (isSignedIn) disconnect();
  isSignedIn = false;
  leave();
  leave = () => {};
  put(document.getElementById("nav"));
  const { show: showSignIn } = await import("./signin.js");
  showSignIn(main, { reason, done: start });
}

/** Show the page as soon as the daemon has told what there is. */
function start() {
  isSignedIn = true;
  connect();
  const end = listen((names) => {
    if (!names.has("instances")) return;
    end();
    show({ isFirst: true });
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
  }
  return start();
}

onSignedOut(() => { if (isSignedIn) signInPage(store.instances.size ? "You are signed out." : ""); });
window.addEventListener("hashchange", () => (/^#code=/.test(location.hash) ? begin() : show()));
listen((names) => { if (names.has("link")) drawLink(); });
begin();
