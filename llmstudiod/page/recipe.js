// A recipe in a form or as YAML: checked while one types, with what would become of it.
//
// One of the two holds what counts, `owner`; the other is filled from it when one goes there. `synced` is the last text
// and form that said the same: who comes back to a text without having touched the form finds its comments.

import store, { at, call, del, get, listen, post } from "./data.js";
import { attempt, button, copyButton, h, mark, note, put, say, settle } from "./ui.js";
import { planView } from "./plan.js";
import { BACKENDS, COMMON, FIRST, Field, readFlags, tellAt, writeFlags } from "./recipe-fields.js";
import { filePicker } from "./recipe-files.js";
import { yamlEditor } from "./recipe-yaml.js";
import { tabList } from "./tabs.js";

const drafts = new Map();  // what was not saved, by place: leaving the page loses nothing
const LOST = "the daemon cannot be reached";

/** Show a recipe; `id` names the one to be changed, `query` may have a path or a recipe to copy for a new one. */
export function show(main, { id, query }) {
  let end = () => {};
  let isGone = false;
  put(main, h("h1", {}, id ? `Recipe of ${id}` : "New recipe"), h("p", { class: "quiet" }, "Asking …"));
  load(id, query).then((found) => {
    if (isGone || !found) return;
    if (found.missing) put(main, h("h1", {}, "There is no such recipe"), h("p", {}, found.missing), h("p", {}, h("a", { href: "#/" }, "To the models"), " · ", h("a", { href: "#/recipe" }, "New recipe")));
    else end = form(main, { ...found, again: () => { end(); end = show(main, { id, query }); } });
  });
  return () => { isGone = true; end(); };
}

/** Return what is to be edited: {id, isFile, recipe, text, tag, key}, or {missing}. */
async function load(id, query) {
  const key = `${id}?${query}`;
  const from = id || query.get("copy");
  if (!from) return { key, recipe: { model_path: query.get("path") ?? undefined } };
  try {
    const known = await get(at("recipes", from));
    let tag = null;
    const text = await get(at("recipes", known.id, "file"), { heard: (headers) => { tag = headers.get("ETag"); } });
    const { recipe } = await call("POST", `/recipes/check?trusted=true&id=${encodeURIComponent(known.id)}`, { body: text, type: "application/yaml" });
    const own = recipe?.id === known.id ? recipe : null;
    if (id) return { key, id: known.id, isFile: Boolean(known.file), recipe: own ?? { id: known.id, model_path: known.model_path }, text, tag };
    const { served_model_name: _, aliases: __, default: ___, ...rest } = own ?? { model_path: known.model_path };
    return { key, recipe: { ...rest, id: freeId(known.id), name: rest.name && `${rest.name} (copy)` } };
  } catch (error) {
    if (error.status === 404) return { missing: error.hint ?? error.message };
    return attempt(() => { throw error; });
  }
}

function freeId(id) {
  let number = 2;
  while (store.instances.has(`${id.slice(0, 58)}-${number}`)) number += 1;
  return `${id.slice(0, 58)}-${number}`;
}

function group(title, content) {
  return h("details", { class: "group" }, h("summary", {}, title), content);
}

function form(main, { key, id, isFile, recipe, text: ownText, tag: ownTag, again }) {
  const isNew = !id;
  const way = isNew ? "/recipes/check?new=true" : `/recipes/check?id=${encodeURIComponent(id)}`;
  let owner = "form", mode = "form";
  let synced = { text: null, form: null };
  let clean = null;     // what is stored, or was offered
  let tag = ownTag;     // of the text that one began with: what others have stored since is not written over unasked
  let rest = {};        // what the form has no field for stays as it is
  let isNamed = !isNew; // the id was typed, or is fixed
  let number = 0;
  let isSaving = false, isGone = false;
  let turns = 0;        // which change of tabs is the last

  const fields = new Map();
  const add = (list) => h("div", { class: "fields" }, list.map((each) => {
    const field = new Field(each, () => { if (each[0] === "id") isNamed = field.control.value !== ""; changed(); });
    fields.set(each[0], field);
    return field.element;
  }));
  const path = filePicker(() => { nameIt(); changed(); });
  const backend = h("select", { id: "backend", onchange: () => { drawBackend(); changed(); } }, Object.entries(BACKENDS).map(([value, { title }]) => h("option", { value }, title)));
  const first = h("div", {}), special = h("div", {});
  const extra = { control: h("textarea", { id: "extra", rows: 3, spellcheck: "false", oninput: () => changed(), placeholder: "top-k: 40", "aria-describedby": "extra-told" }), told: h("p", { class: "told", id: "extra-told" }) };
  extra.element = h("div", { class: "field" }, h("label", { for: "extra" }, "extra_args"), extra.control,
    h("p", { class: "quiet" }, "Any other flag of llama-server, one a line, as NAME: VALUE."), extra.told);
  const notes = h("div", { class: "told-notes", role: "status" });
  const formPanel = h("form", { onsubmit: (event) => { event.preventDefault(); if (!saving.disabled) save({ control: saving }); } },
    h("fieldset", {}, h("legend", {}, "Model"), path.element, add(FIRST),
      !isNew && h("p", { class: "quiet small" }, "The id names the unit, so it stays: Duplicate makes a recipe with another one.")),
    first,
    h("div", { class: "field" }, h("label", { for: "backend" }, "Backend"), " ", h("code", { class: "key" }, "backend"), backend),
    special, COMMON.map(([title, list]) => group(title, add(list))), group("Other flags", extra.element),
    h("button", { hidden: true }, "Save"));
  if (!isNew) fields.get("id").control.readOnly = true;

  const editor = yamlEditor(() => changed());
  const command = h("textarea", { id: "command", rows: 5, spellcheck: "false", placeholder: "llama-server -m /srv/models/model.gguf -c 8192 -ngl 99 …" });
  const pastePanel = h("div", {}, h("div", { class: "field" }, h("label", { for: "command" }, "A llama-server command"), command,
    h("p", { class: "quiet" }, "As you start it now: in a shell, by docker, from a unit or llama-swap's file.")), button("Make a recipe of it", takeCommand, { class: "main" }));
  const panels = [["form", "Form", formPanel], ["yaml", "YAML", editor.element], ["paste", "From a command", pastePanel]];
  const tabs = tabList(panels, async (next) => { if (await go(next)) showTab(next); });
  mark(tabs.element, "aria-label", "How to edit");

  const staleTold = h("span", { hidden: true }, "The recipe was changed elsewhere meanwhile. ");
  const savingOver = button("Save over it", (event) => save({ isOver: true, control: event.currentTarget }), { hidden: true });
  const keptTold = h("span", { hidden: true }, "Unsaved changes were kept. ");
  const kept = h("p", { class: "kept", role: "status", hidden: true }, keptTold, staleTold, button("Discard", discard), " ", savingOver);
  const byHandTold = h("div", { class: "why warn", hidden: true });
  const verdict = h("p", { class: "verdict", role: "status" });
  const faultList = h("ul", { class: "faults" });
  const plan = h("div", {}, h("p", { class: "quiet" }, "Choose a file to see what it needs."));
  const preview = h("pre", {});
  const whole = h("div", { hidden: true }, h("h3", {}, "As YAML"), copyButton(() => preview.textContent, "Copy the YAML", { class: "copy" }), preview);
  const chip = h("span", { class: "verdict", "aria-hidden": "true" });
  const saving = button("Save", (event) => save({ control: event.currentTarget }), { disabled: true });
  const launching = button("Save and load", (event) => save({ andLaunch: true, control: event.currentTarget }), { class: "main", disabled: true });
  const removing = !isNew && isFile && button("Delete", (event) => remove(event.currentTarget), { class: "danger" });
  const doubling = !isNew && h("a", { class: "button", href: `#/recipe?copy=${encodeURIComponent(id)}` }, "Duplicate");

  put(main,
    h("div", { class: "head" }, h("h1", {}, isNew ? "New recipe" : `Recipe of ${id}`), h("div", { class: "form-bar" }, chip, removing, doubling, saving, launching)),
    !isNew && !isFile && h("p", { class: "quiet" }, "It has no recipe yet and is served with defaults; saving writes one."),
    kept, byHandTold, notes,
    h("div", { class: "grid" },
      h("section", { class: "sheet", "aria-label": "Recipe" }, tabs.element, formPanel, editor.element, pastePanel),
      h("section", { class: "sheet aside", tabindex: 0, "aria-label": "Preview" }, h("h2", {}, "Preview"), verdict, faultList, plan,
        whole)));

  function drawBackend() {
    for (const { first: list, groups } of Object.values(BACKENDS)) for (const [name] of [...list, ...groups.flatMap((each) => each[1])]) fields.delete(name);
    const chosen = BACKENDS[backend.value];
    put(first, add(chosen.first));
    put(special, chosen.groups.map(([title, list]) => group(title, add(list))));
  }

  function nameIt() {
    const file = path.known();
    if (!file || isNamed) return;
    const taken = new Set(path.files.flatMap((each) => each.recipe_ids));
    fields.get("id").value = taken.has(file.id) ? freeId(file.id) : file.id;
  }

  // The form's values

  function values() {
    const found = { ...rest, model_path: path.control.value.trim() };
    for (const [name, field] of fields) {
      const value = field.value;
      if (value === undefined) delete found[name];
      else found[name] = value;
    }
    const { flags } = readFlags(extra.control.value);
    if (Object.keys(flags).length) found.extra_args = flags;
    else delete found.extra_args;
    const { id: own, ...others } = found;
    return own === undefined ? others : { id: own, ...others };
  }

  function fillForm(from) {
    rest = { ...from };
    path.control.value = from.model_path ?? "";
    for (const [name, field] of fields) {
      field.value = from[name];
      if (from[name] !== undefined) field.element.closest("details")?.setAttribute("open", "");
      delete rest[name];
    }
    delete rest.model_path;
    delete rest.extra_args;
    extra.control.value = writeFlags(from.extra_args);
    if (extra.control.value) extra.element.closest("details").open = true;
    path.tell();
  }

  const formNow = () => JSON.stringify([values(), extra.control.value]);
  const isSynced = () => synced.text !== null && formNow() === synced.form;
  const now = () => (owner === "yaml" ? editor.value : formNow());
  const isDirty = () => clean !== null && !(owner === "yaml" ? editor.value === clean.text : formNow() === clean.form);
  // A text that says what the form says is worth more than the form: it has its author's comments.
  const asText = () => owner === "yaml" || isSynced();
  const body = () => (asText() ? { body: owner === "yaml" ? editor.value : synced.text, type: "application/yaml" } : { body: values() });
  const ask = () => call("POST", way, body());
  const draftNow = () => ({ values: values(), flags: extra.control.value, text: editor.value, owner, mode, synced, clean, tag, isNamed, told: [...notes.querySelectorAll("li")].map((item) => item.textContent) });

  function changed() {
    number += 1;  // an answer that is under way is about what was
    if (isDirty()) drafts.set(key, draftNow());
    else drafts.delete(key);
    check();
  }

  async function discard() {
    drafts.delete(key);
    again();
  }

  // Between form and YAML

  function showTab(chosen) {
    tabs.select(chosen);
    for (const [value, , panel] of panels) panel.hidden = value !== chosen;
  }

  async function go(next) {
    turns += 1;
    if (next === "form" && owner === "yaml" && !await toForm()) return false;
    if (next === "yaml" && owner === "form" && !await toText()) return false;
    if (next !== "paste") owner = next;
    mode = next;
    editor.draw([]);
    check();
    return true;
  }

  /** Ask until nothing was typed during an answer: the other side is filled from the last words. Null where one went elsewhere. */
  async function askLast() {
    const mine = turns;
    for (;;) {
      const before = now();
      const answer = await attempt(ask);
      if (mine !== turns) return null;
      if (!answer || now() === before) return answer;
    }
  }

  async function toForm() {
    if (editor.value === synced.text) return true;
    const answer = await askLast();
    if (answer && !answer.recipe) note("The YAML has faults", { hint: "mend them, or go on in the YAML: the form cannot show it like this", isError: true });
    if (!answer?.recipe) return false;
    fillForm(answer.recipe);
    isNamed = true;
    synced = { text: editor.value, form: formNow() };
    return true;
  }

  async function toText() {
    if (isSynced()) { editor.value = synced.text; return true; }
    if (!path.control.value.trim() && !synced.text) { editor.value = "id: \nmodel_path: \n"; return true; }
    const answer = await askLast();
    if (!answer?.yaml) return false;
    if (/^\s*#|\s#/m.test(synced.text ?? "")) note("The text is made of the form: its comments go", { hint: "the file keeps them for as long as nothing is saved" });
    editor.value = answer.yaml;
    synced = { text: answer.yaml, form: formNow() };
    return true;
  }

  async function takeCommand(event) {
    const answer = await attempt(() => post("/recipes/from-command", { command: command.value }), { control: event.currentTarget });
    if (!answer) return;
    turns += 1;
    const made = isNew ? answer.recipe : { ...answer.recipe, id };
    fillForm(made);
    isNamed = true;
    owner = mode = "form";
    synced = { text: null, form: null };
    drawNotes(answer.notes);
    showTab("form");
    changed();
  }

  function drawNotes(told) {
    put(notes, told.length > 0 && [h("p", {}, "Made of the command; look it over:"), h("ul", {}, told.map((each) => h("li", {}, each)))]);
  }

  // Checking

  const check = settle(async () => {
    number += 1;
    const mine = number;
    if (owner === "form" && !path.control.value.trim()) { judge("wait", "Choose a file."); return; }
    let answer;
    try {
      answer = await ask();
    } catch (error) {
      if (mine !== number) return;
      judge("bad", error.status === 401 ? "" : error.message);
      put(faultList);
      drawPreview("");
      return;
    }
    if (mine === number) drawCheck(answer);
  }, 250);

  function judge(state, text) {
    for (const place of [verdict, chip]) { mark(place, "data-state", state); say(place, text); }
    saving.disabled = launching.disabled = savingOver.disabled = state !== "good" && state !== "odd";
  }

  function drawPreview(yaml) {
    say(preview, yaml);
    whole.hidden = !yaml;
  }

  function drawCheck(answer) {
    const isForm = owner === "form";
    const unread = isForm ? readFlags(extra.control.value).faults : [];
    const isOurs = (fault) => !(answer.by_hand && fault.key === null);  // whose file it is stands at the top
    const faults = [...unread, ...answer.faults.filter(isOurs)];
    const about = (name) => (isForm ? faults.filter((fault) => fault.key?.split(".")[0] === name) : []);
    for (const [name, field] of fields) field.tell(about(name));
    tellAt(path, about("model_path"));
    tellAt(extra, about("extra_args").map((fault) => ({ ...fault, message: [fault.key.slice("extra_args.".length), fault.message].filter(Boolean).join(": ") })));
    const isGood = faults.every((fault) => fault.severity !== "fault") && (answer.ok || answer.by_hand);
    const error = answer.error;
    const isOdd = Boolean(error || answer.placement?.error);
    judge(!isGood ? "bad" : isOdd ? "odd" : "good", isGood ? (isOdd ? "The recipe is good, but it cannot be loaded now." : "The recipe is good.") : "The recipe cannot be saved like this.");
    if (answer.by_hand) saving.disabled = launching.disabled = savingOver.disabled = true;
    if (removing) removing.hidden = answer.by_hand;
    drawByHand(answer);
    put(faultList,
      faults.map((fault) => h("li", { class: fault.severity === "warning" ? "warning warn" : "fault" }, [!isForm && fault.line ? `line ${fault.line}: ` : "", fault.key && !fault.message.startsWith(fault.key) ? `${fault.key}: ` : "", fault.message].join(""), fault.hint && h("div", { class: "quiet" }, fault.hint))),
      error && h("li", { class: "fault" }, error.detail, error.hint && h("div", { class: "quiet" }, error.hint)));
    if (!isForm) editor.draw(faults);
    const open = new Set([...plan.querySelectorAll("details[open] > summary")].map((each) => each.textContent));
    put(plan, answer.plan ? planView({ ...answer.plan, placement: answer.placement }, { told: faults.map((fault) => fault.message) }) : h("p", { class: "quiet" }, "There is no plan for it yet."));
    for (const each of plan.querySelectorAll("summary")) each.parentElement.open = open.has(each.textContent);
    drawPreview(answer.yaml ?? "");
  }

  function drawByHand(answer) {
    byHandTold.hidden = !answer.by_hand;
    if (!answer.by_hand || byHandTold.hasChildNodes()) return;
    const fault = answer.faults.find((each) => each.key === null);
    put(byHandTold, h("p", {}, `${fault?.message ?? "The file was written by hand"}, so it is not overwritten here. What you try can be copied as YAML, and written there.`));
  }

  // Storing

  function keep(isOver) {
    const heard = (headers) => { tag = headers.get("ETag"); };
    if (isNew) return call("POST", "/recipes", { ...body(), heard, headers: { "If-None-Match": "*" } });
    return call("PUT", at("recipes", id), { ...body(), heard, headers: isOver ? {} : { "If-Match": tag } }).catch((error) => {
      if (error.status === 412) tellStale();
      throw error;
    });
  }

  function tellStale() {
    kept.hidden = staleTold.hidden = savingOver.hidden = false;
  }

  async function save({ andLaunch = false, isOver = false, control = null }) {
    if (isSaving) return;  // by another button: the tag would be that of before
    isSaving = true;
    const before = now(), sent = { text: asText() ? body().body : null, form: formNow() };
    try {
      const answer = await attempt(() => keep(isOver), { control });
      if (!answer) { check(); return; }
      if (andLaunch) await attempt(() => post(`${at("launch", answer.id)}?wait=false`));
      if (now() === before) leave(answer.id);
      else goOn(answer.id, sent);
    } finally {
      isSaving = false;
    }
  }

  /** Go where an answer leads, unless somebody went elsewhere while it was waited for. */
  function moveTo(where) {
    if (!isGone) location.hash = where;
  }

  function leave(saved) {
    drafts.delete(key);
    clean = null;
    note(`The recipe of ${saved} is saved`);
    moveTo(`#/model/${encodeURIComponent(saved)}`);
  }

  /** Stay with what was typed while it was saved; one that was new is a recipe now, which has its own place. */
  function goOn(saved, sent) {
    note(`The recipe of ${saved} is saved, without what was typed meanwhile`, { hint: "save again to store that too" });
    clean = sent;
    kept.hidden = keptTold.hidden = staleTold.hidden = savingOver.hidden = true;
    if (!isNew) { changed(); return; }
    const draft = draftNow();
    drafts.delete(key);
    drafts.set(`${saved}?`, { ...draft, values: { ...draft.values, id: saved }, isNamed: true });
    clean = null;
    moveTo(`#/recipe/${encodeURIComponent(saved)}`);
  }

  async function remove(control) {
    if (!confirm(`Remove the recipe of ${id}? The model's file stays.`)) return;
    if (!await attempt(() => del(at("recipes", id)), { control })) return;
    drafts.delete(key);
    clean = null;
    note(`The recipe of ${id} is removed`);
    moveTo("#/");
  }

  function restore(draft) {
    fillForm(draft.values);
    extra.control.value = draft.flags;
    editor.value = draft.text;
    ({ owner, mode, synced, clean, tag, isNamed } = draft);
    kept.hidden = keptTold.hidden = false;
    if (!isNew && tag !== ownTag) tellStale();
    drawNotes(draft.told);
    showTab(mode);
  }

  showTab(mode);
  drawBackend();
  fillForm(recipe);
  isNamed ||= Boolean(recipe.id);
  if (ownText !== undefined) {
    editor.value = ownText;
    synced = { text: ownText, form: formNow() };
  }
  clean = { text: ownText ?? null, form: formNow() };
  if (drafts.has(key)) restore(drafts.get(key));
  attempt(() => get("/v1/studio/models")).then((answer) => {
    if (!answer) return;
    path.offer(answer);
    const before = formNow();
    nameIt();
    if (clean.form === before && formNow() !== before) clean.form = formNow();  // nobody has typed that
    check();
  });
  const warn = (event) => { if (isDirty()) event.preventDefault(); };
  const ending = listen((names) => {
    if (!names.has("link")) return;
    if (store.link === "open") check();
    else judge("bad", LOST);
  });
  window.addEventListener("beforeunload", warn);
  check();
  return () => { ending(); window.removeEventListener("beforeunload", warn); number += 1; turns += 1; isGone = true; };
}
