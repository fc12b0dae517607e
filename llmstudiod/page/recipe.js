// A recipe in a form or as YAML: checked while one types, with what would become of it.

import { at, call, del, get, post } from "./data.js";
import { attempt, button, bytes, count, freshId, h, mark, note, put, say, settle } from "./ui.js";
import { planView } from "./plan.js";

const KV = ["", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "f32"];
// [name, title, kind, what it is; choices or bounds]
const COMMON = [
  ["id", "Id", "text", "Names the unit; small letters, digits and ._-", { pattern: "[a-z0-9][a-z0-9._\\-]{0,62}", required: true, maxlength: 63 }],
  ["name", "Name", "text", "What people call it."],
  ["description", "Description", "text", "What it is for."],
  ["served_model_name", "Served name", "text", "The name in /v1/models, if it is not the id."],
  ["aliases", "Aliases", "words", "Other names that requests may use, separated by commas."],
];
const LIFE = [
  ["idle_timeout", "Unload when idle", "text", "After how long, such as 10m; 0: never. Empty: the daemon's setting."],
  ["priority", "Priority", "number", "Higher is evicted later and admitted first.", { min: -1000, max: 1000 }],
  ["concurrency_limit", "Requests at once", "number", "Empty: as many as there are slots.", { min: 1, max: 4096 }],
  ["pinned", "Pinned: never evicted, never unloaded for idleness", "check"],
  ["preload", "Load it when the daemon starts", "check"],
  ["default", "Serves requests that name no model", "check"],
  ["unlisted", "Not in /v1/models", "check"],
];
const BACKENDS = {
  llamacpp: {
    title: "llama.cpp (llama-server)",
    groups: [
      ["Context and slots", [
        ["max_model_len", "Context", "number", "Tokens that one request may use. Empty: as trained, reduced to fit.", { min: 1 }],
        ["max_num_seqs", "Slots", "number", "Requests at the same time. Empty: up to 4, as many as fit.", { min: 1, max: 256 }],
        ["kv_unified", "Slots share one pool of tokens", "check"],
      ]],
      ["GPU", [
        ["n_gpu_layers", "Layers on GPU", "layers", "A number, all, or auto: as many as fit."],
        ["gpus", "GPUs", "gpus", "Which may be used: numbers separated by commas, or none. Empty: all."],
        ["tensor_parallel_size", "At most so many GPUs", "number", "Empty: as many as it needs.", { min: 1, max: 64 }],
        ["split_mode", "Split", "choice", "How the layers are shared among GPUs.", { choices: ["", "layer", "row", "tensor", "none"] }],
        ["tensor_split", "Proportions", "numbers", "Parts for each GPU, such as 3,1."],
        ["main_gpu", "Main GPU", "number", "", { min: 0 }],
        ["n_cpu_moe", "Experts of so many layers in RAM", "number", "For mixture-of-experts models.", { min: 0 }],
        ["flash_attn", "Flash attention", "tristate", ""],
      ]],
      ["Cache and batches", [
        ["cache_type_k", "Keys of the cache", "choice", "q8_0 halves the KV cache.", { choices: KV }],
        ["cache_type_v", "Values of the cache", "choice", "", { choices: KV }],
        ["n_batch", "Batch", "number", "Tokens; empty: 2048.", { min: 1 }],
        ["n_ubatch", "Micro-batch", "number", "Tokens; empty: 512.", { min: 1 }],
        ["threads", "Threads", "number", "", { min: 1, max: 1024 }],
        ["cache_ram", "Cache of prompts", "number", "MiB of RAM.", { min: 0 }],
      ]],
      ["What it can do", [
        ["embedding", "Embeddings", "check"],
        ["rerank", "Reranking", "check"],
        ["pooling", "Pooling", "choice", "", { choices: ["", "none", "mean", "cls", "last", "rank"] }],
        ["reasoning_format", "Reasoning", "choice", "How thoughts are told.", { choices: ["", "auto", "none", "deepseek", "deepseek-legacy"] }],
        ["mmproj", "Encoder for pictures or sound", "text", "A mmproj GGUF."],
        ["draft_model", "Draft model", "text", "A small GGUF that guesses ahead."],
      ]],
    ],
  },
};

const READ = {
  text: (value) => value.trim() || undefined,
  number: (value) => (value === "" ? undefined : Number(value)),
  words: (value) => { const found = value.split(",").map((item) => item.trim()).filter(Boolean); return found.length ? found : undefined; },
  numbers: (value) => { const found = value.split(/[,\s]+/).filter(Boolean).map(Number); return found.length ? found : undefined; },
  layers: (value) => { const text = value.trim(); return text === "" || text === "auto" ? undefined : /^\d+$/.test(text) ? Number(text) : text; },
  gpus: (value) => { const text = value.trim(); return text === "" ? undefined : text === "none" ? text : text.split(",").map((item) => item.trim()).filter(Boolean); },
  choice: (value) => value || undefined,
  tristate: (value) => (value === "" ? undefined : value === "on"),
};
const WRITE = {
  words: (value) => (value ?? []).join(", "),
  numbers: (value) => (value ?? []).join(","),
  gpus: (value) => (Array.isArray(value) ? value.join(",") : value ?? ""),
  tristate: (value) => (value === true ? "on" : value === false ? "off" : ""),
};

function control(kind, id, options, change) {
  if (kind === "choice") return h("select", { id, onchange: change }, options.choices.map((value) => h("option", { value }, value || "default")));
  if (kind === "tristate") return h("select", { id, onchange: change }, [["", "auto"], ["on", "on"], ["off", "off"]].map(([value, text]) => h("option", { value }, text)));
  if (kind === "check") return h("input", { id, type: "checkbox", onchange: change });
  return h("input", { id, type: kind === "number" ? "number" : "text", oninput: change, placeholder: " ", spellcheck: "false", autocomplete: "off", ...options });
}

function group(title, content, isOpen = false) {
  return h("details", { class: "group", open: isOpen }, h("summary", {}, title), content);
}

/** A field with its label, its help and what the daemon says of it. */
class Field {
  constructor([name, title, kind, help, options = {}], change) {
    const id = freshId("recipe-");
    Object.assign(this, { name, kind });
    this.control = control(kind, id, options, change);
    this.told = h("p", { class: "told", id: `${id}-told` });
    mark(this.control, "aria-describedby", `${id}-told`);
    const label = h("label", { for: id }, title);
    this.element = kind === "check" ? h("div", { class: "field check" }, this.control, label, this.told)
      : h("div", { class: "field" }, label, this.control, help && h("p", { class: "quiet" }, help), this.told);
  }

  get value() { return this.kind === "check" ? this.control.checked || undefined : READ[this.kind](this.control.value); }

  set value(value) {
    if (this.kind === "check") this.control.checked = Boolean(value);
    else this.control.value = WRITE[this.kind]?.(value) ?? value ?? "";
  }

  tell(faults) {
    say(this.told, faults.map((fault) => fault.message).join(" "));
    this.element.classList.toggle("odd", faults.length > 0);
    if (faults.length) this.element.closest("details")?.setAttribute("open", "");
    mark(this.control, "aria-invalid", faults.some((fault) => fault.severity === "fault") ? "true" : null);
  }
}

export function show(main, { id, query }) {
  const isNew = !id;
  let mode = "form";
  let rest = {};        // what the form has no field for stays as it is
  let files = [];
  let number = 0;

  const fields = new Map();
  const add = (list) => h("div", { class: "fields" }, list.map((each) => {
    const field = new Field(each, () => check());
    fields.set(each[0], field);
    return field.element;
  }));
  const pathId = freshId("recipe-");
  const path = h("input", { id: pathId, list: "ggufs", required: true, spellcheck: "false", autocomplete: "off", placeholder: " ", oninput: () => { drawFile(); check(); }, onchange: () => nameIt() });
  const pathTold = h("p", { class: "told" });
  const choices = h("datalist", { id: "ggufs" });
  const facts = h("p", { class: "quiet" });
  const backend = h("select", { id: "backend", onchange: () => { drawBackend(); check(); } }, Object.entries(BACKENDS).map(([value, { title }]) => h("option", { value }, title)));
  const special = h("div", {});
  const extra = h("textarea", { id: "extra", rows: 3, spellcheck: "false", oninput: () => check(), placeholder: "top-k: 40" });
  const extraTold = h("p", { class: "told" });
  const form = h("form", { onsubmit: (event) => { event.preventDefault(); save({ andLaunch: false }); } },
    h("fieldset", {}, h("legend", {}, "Model"),
      h("div", { class: "field" }, h("label", { for: pathId }, "GGUF file"), path, choices, facts, pathTold),
      add(COMMON)),
    h("div", { class: "field" }, h("label", { for: "backend" }, "Backend"), backend),
    special,
    group("Life", add(LIFE)),
    group("Other flags", h("div", { class: "field" }, h("label", { for: "extra" }, "extra_args"), extra,
      h("p", { class: "quiet" }, "Any other flag of llama-server, one a line, as NAME: VALUE."), extraTold)));

  const text = h("textarea", { spellcheck: "false", "aria-label": "The recipe as YAML", oninput: () => { drawGutter([]); check(); }, onscroll: () => { gutter.scrollTop = text.scrollTop; } });
  const gutter = h("pre", { class: "gutter", "aria-hidden": "true" }, "1");
  const yaml = h("div", { hidden: true }, h("div", { class: "editor" }, gutter, text));
  const command = h("textarea", { id: "command", rows: 5, spellcheck: "false", placeholder: "llama-server -m /srv/models/model.gguf -c 8192 -ngl 99 …" });
  const pasted = h("ul", { class: "faults" });
  const paste = h("div", { hidden: true }, h("div", { class: "field" }, h("label", { for: "command" }, "A llama-server command"), command,
    h("p", { class: "quiet" }, "As you start it now; with variables in front, backslashes and all.")), button("Make a recipe of it", takeCommand, { class: "main" }), pasted);

  const verdict = h("p", { role: "status" }, "");
  const faultList = h("ul", { class: "faults" });
  const plan = h("div", {}, h("p", { class: "quiet" }, "Choose a file to see what it needs."));
  const preview = h("pre", {});
  const tabs = h("div", { class: "tabs", role: "tablist" }, [["form", "Form"], ["yaml", "YAML"], ["paste", "From a command"]].map(([value, title]) =>
    h("button", { type: "button", role: "tab", "data-mode": value, "aria-selected": "false", onclick: () => setMode(value) }, title)));
  const saving = button("Save", (event) => save({ andLaunch: false, control: event.currentTarget }));
  const launching = button("Save and load", (event) => save({ andLaunch: true, control: event.currentTarget }), { class: "main" });
  const removing = !isNew && button("Delete", (event) => remove(event.currentTarget), { class: "danger" });

  put(main,
    h("div", { class: "head" }, h("h1", {}, isNew ? "New recipe" : `Recipe of ${id}`), removing, saving, launching),
    h("div", { class: "grid" },
      h("section", { class: "sheet", "aria-label": "Recipe" }, tabs, form, yaml, paste),
      h("section", { class: "sheet aside", tabindex: 0, "aria-label": "What would become of it" }, h("h2", {}, "What would become of it"), verdict, faultList, plan,
        h("h3", {}, "As YAML"), preview)));

  function drawBackend() {
    for (const [, list] of Object.values(BACKENDS).flatMap((each) => each.groups)) for (const [name] of list) fields.delete(name);
    put(special, BACKENDS[backend.value].groups.map(([title, list], number) => group(title, add(list), number < 2)));
  }

  function drawFile() {
    const file = files.find((each) => each.path === path.value.trim());
    say(facts, file ? [file.title, file.architecture, file.quantization, bytes(file.size_bytes), file.layers && `${file.layers} layers`, file.context_length && `trained for ${count(file.context_length)} tokens`,
      { gpu: "fits on the GPUs", "gpu+ram": "fits on GPUs and RAM together", ram: "fits in RAM", no: "does not fit in this machine" }[file.fits]].filter(Boolean).join(" · ") : "");
  }

  function nameIt() {
    const file = files.find((each) => each.path === path.value.trim());
    if (file && !fields.get("id").value) { fields.get("id").value = file.id; check(); }
  }

  function readExtra() {
    const found = {};
    for (const line of extra.value.split("\n")) {
      const parts = /^\s*-{0,2}([A-Za-z0-9][\w.-]*)\s*[:=]?\s*(.*)$/.exec(line);
      if (!parts) continue;
      const [, name, value] = parts;
      if (value === "") found[name] = true;
      else { try { found[name] = JSON.parse(value); } catch { found[name] = value; } }
    }
    return found;
  }

  function values() {
    const found = { ...rest, model_path: path.value.trim() };
    for (const [name, field] of fields) {
      const value = field.value;
      if (value === undefined) delete found[name];
      else found[name] = value;
    }
    const flags = readExtra();
    if (Object.keys(flags).length) found.extra_args = flags;
    else delete found.extra_args;
    const { id: own, ...others } = found;
    return own === undefined ? others : { id: own, ...others };
  }

  function fillForm(recipe) {
    rest = { ...recipe };
    path.value = recipe.model_path ?? "";
    for (const [name, field] of fields) {
      field.value = recipe[name];
      if (recipe[name] !== undefined && name !== "id") field.element.closest("details")?.setAttribute("open", "");
      delete rest[name];
    }
    delete rest.model_path;
    delete rest.extra_args;
    extra.value = Object.entries(recipe.extra_args ?? {}).map(([name, value]) => `${name}: ${typeof value === "string" ? value : JSON.stringify(value)}`).join("\n");
    drawFile();
  }

  function drawGutter(faults) {
    const lines = text.value.split("\n").length;
    const marks = new Map(faults.filter((fault) => fault.line).map((fault) => [fault.line, fault.severity]));
    put(gutter, Array.from({ length: lines }, (_, index) => [h("span", { class: { fault: "bad", warning: "odd" }[marks.get(index + 1)] }, `${marks.has(index + 1) ? "● " : ""}${index + 1}`), "\n"]));
    text.rows = Math.max(16, Math.min(60, lines + 1));
  }

  const check = settle(async () => {
    number += 1;
    const mine = number;
    if (mode === "paste" || (mode === "form" && !path.value.trim())) return;
    let answer;
    try {
      answer = mode === "yaml" ? await call("POST", "/recipes/check", { body: text.value, type: "application/yaml" }) : await post("/recipes/check", values());
    } catch (error) {
      if (mine === number) { say(verdict, error.message); put(faultList); }
      return;
    }
    if (mine === number) drawCheck(answer);
  }, 250);

  function drawCheck(answer) {
    const faults = answer.faults;
    const isForm = mode === "form";
    for (const [name, field] of fields) field.tell(isForm ? faults.filter((fault) => fault.key === name) : []);
    say(pathTold, isForm ? faults.filter((fault) => fault.key === "model_path").map((fault) => fault.message).join(" ") : "");
    say(extraTold, isForm ? faults.filter((fault) => fault.key?.startsWith("extra_args")).map((fault) => `${fault.key.replace("extra_args.", "")}: ${fault.message}`).join(" ") : "");
    const error = answer.error;
    say(verdict, answer.ok ? (error || answer.placement?.error ? "The recipe is good, but it cannot be loaded now." : "The recipe is good.") : "The recipe cannot be saved like this.");
    put(faultList,
      faults.map((fault) => h("li", { class: fault.severity }, [!isForm && fault.line ? `line ${fault.line}: ` : "", fault.key ? `${fault.key}: ` : "", fault.message].join(""), fault.hint && h("div", { class: "quiet" }, fault.hint))),
      error && h("li", { class: "fault" }, error.detail, error.hint && h("div", { class: "quiet" }, error.hint)));
    if (!isForm) drawGutter(faults);
    put(plan, answer.plan ? planView({ ...answer.plan, placement: answer.placement }) : h("p", { class: "quiet" }, "There is no plan for it yet."));
    say(preview, answer.yaml ?? (isForm ? preview.textContent : text.value));
    saving.disabled = launching.disabled = !answer.ok;
    if (!isForm && answer.recipe) fillForm(answer.recipe);
  }

  async function setMode(next) {
    if (next === "yaml" && mode === "form") {
      const told = await attempt(() => (isNew || preview.textContent ? Promise.resolve(preview.textContent) : get(at("recipes", id, "file"))));
      if (!text.value || !isNew) text.value = text.dataset.own ?? told ?? "";
      if (isNew) text.value = told || text.value || "id: \nmodel_path: \n";
    }
    mode = next;
    form.hidden = mode !== "form";
    yaml.hidden = mode !== "yaml";
    paste.hidden = mode !== "paste";
    for (const tab of tabs.children) mark(tab, "aria-selected", String(tab.dataset.mode === mode));
    drawGutter([]);
    check();
  }

  async function takeCommand(event) {
    const answer = await attempt(() => post("/recipes/from-command", { command: command.value }), { control: event.currentTarget });
    if (!answer) return;
    fillForm(answer.recipe);
    text.value = answer.yaml;
    put(pasted, answer.notes.map((told) => h("li", {}, told)));
    note("The recipe was made; look it over", { hint: answer.notes.join(" ") || null });
    await setMode("form");
  }

  async function save({ andLaunch, control = null }) {
    const target = isNew ? "/recipes" : at("recipes", id);
    const method = isNew ? "POST" : "PUT";
    const answer = await attempt(() => (mode === "yaml" ? call(method, target, { body: text.value, type: "application/yaml" }) : call(method, target, { body: values() })), { control });
    if (!answer) return;
    note(`The recipe of ${answer.id} is saved`);
    if (andLaunch) await attempt(() => post(`${at("launch", answer.id)}?wait=false`));
    location.hash = `#/model/${encodeURIComponent(answer.id)}`;
  }

  async function remove(control) {
    if (!confirm(`Remove the recipe of ${id}? The model's file stays.`)) return;
    if (await attempt(() => del(at("recipes", id)), { control })) { note(`The recipe of ${id} is removed`); location.hash = "#/"; }
  }

  drawBackend();
  get("/v1/studio/models").then((answer) => {
    files = answer.models;
    put(choices, files.map((file) => h("option", { value: file.path }, `${file.title ?? file.name} ${bytes(file.size_bytes)}`)));
    drawFile();
    nameIt();
  }).catch(() => {});
  if (isNew) {
    if (query.get("path")) path.value = query.get("path");
  } else {
    attempt(async () => {
      const [recipe, own] = await Promise.all([get(at("recipes", id)), get(at("recipes", id, "file"))]);
      text.value = text.dataset.own = own;
      const answer = await call("POST", "/recipes/check", { body: own, type: "application/yaml" });
      fillForm(answer.recipe ?? { id, model_path: recipe.model_path });
      check();
    });
  }
  setMode("form");
}
