// The fields of a recipe's form: what there is for each backend, how a value is read and written, what is told at it.

import { freshId, h, mark, say } from "./ui.js";

const KV = ["", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "f32"];
// [name, title, kind, what it is; choices or bounds]
export const FIRST = [
  ["id", "Id", "text", "Names the unit; small letters, digits and ._-", { pattern: "[a-z0-9][a-z0-9._\\-]{0,62}", required: true, maxlength: 63 }],
  ["name", "Name", "text", "What people call it."],
];
export const COMMON = [
  ["Names", [
    ["served_model_name", "Served name", "text", "The name in /v1/models, if it is not the id."],
    ["aliases", "Aliases", "words", "Other names that requests may use, separated by commas."],
    ["description", "Description", "text", "What it is for."],
  ]],
  ["Lifecycle", [
    ["idle_timeout", "Idle timeout", "text", "After how long it is unloaded, such as 10m; 0: never. Empty: the daemon's setting."],
    ["priority", "Priority", "number", "Higher is evicted later and admitted first.", { min: -1000, max: 1000 }],
    ["concurrency_limit", "Concurrency limit", "number", "Requests at once. Empty: as many as there are slots.", { min: 1, max: 4096 }],
    ["pinned", "Pinned: never evicted, never unloaded for idleness", "check"],
    ["preload", "Preload: load it when the daemon starts", "check"],
    ["default", "Default: serves requests that name no model", "check"],
    ["unlisted", "Unlisted: not in /v1/models", "check"],
  ]],
];
export const BACKENDS = {
  llamacpp: {
    title: "llama.cpp (llama-server)",
    first: [
      ["max_model_len", "Context", "number", "Tokens that one request may use. Empty: as trained, reduced to fit.", { min: 1 }],
      ["max_num_seqs", "Slots", "number", "Requests at the same time. Empty: up to 4, as many as fit.", { min: 1, max: 256 }],
      ["n_gpu_layers", "Layers on GPU", "layers", "A number, all, or auto: as many as fit."],
      ["flash_attn", "Flash attention", "tristate", ""],
    ],
    groups: [
      ["GPUs and split", [
        ["gpus", "GPUs", "gpus", "Which may be used: numbers separated by commas, or none. Empty: all."],
        ["tensor_parallel_size", "Max GPUs", "number", "Empty: as many as it needs.", { min: 1, max: 64 }],
        ["split_mode", "Split mode", "choice", "How the model is shared among GPUs.", { choices: ["", "layer", "row", "tensor", "none"] }],
        ["tensor_split", "Tensor split", "numbers", "Parts for each GPU, such as 3,1."],
        ["main_gpu", "Main GPU", "number", "", { min: 0 }],
        ["n_cpu_moe", "MoE layers on CPU", "number", "How many layers have their experts in RAM.", { min: 0 }],
      ]],
      ["KV cache", [
        ["cache_type_k", "KV cache type K", "choice", "q8_0 halves the KV cache.", { choices: KV }],
        ["cache_type_v", "KV cache type V", "choice", "", { choices: KV }],
        ["cache_ram", "Prompt cache", "number", "MiB of RAM.", { min: 0 }],
        ["kv_unified", "Unified KV cache: the slots share one pool of tokens", "check"],
      ]],
      ["Batches and loading", [
        ["n_batch", "Batch size", "number", "Tokens; empty: 2048.", { min: 1 }],
        ["n_ubatch", "Micro-batch size", "number", "Tokens; empty: 512.", { min: 1 }],
        ["threads", "Threads", "number", "", { min: 1, max: 1024 }],
        ["load_mode", "Load mode", "choice", "How the file is read.", { choices: ["", "none", "mmap", "mlock", "mmap+mlock", "dio"] }],
      ]],
      ["Embeddings, reasoning, other files", [
        ["embedding", "Embeddings", "check"],
        ["rerank", "Reranking", "check"],
        ["pooling", "Pooling", "choice", "", { choices: ["", "none", "mean", "cls", "last", "rank"] }],
        ["reasoning_format", "Reasoning format", "choice", "How thoughts are told.", { choices: ["", "auto", "none", "deepseek", "deepseek-legacy"] }],
        ["mmproj", "Multimodal projector", "text", "A mmproj GGUF, for pictures or sound."],
        ["draft_model", "Draft model", "text", "A small GGUF that guesses ahead."],
      ]],
    ],
  },
};

const split = (value, by) => { const found = value.split(by).map((item) => item.trim()).filter(Boolean); return found.length ? found : undefined; };
// What is no number is sent as it is: the daemon says what it expected.
const numeral = (item) => (Number.isNaN(Number(item)) ? item : Number(item));
const READ = {
  text: (value) => value.trim() || undefined,
  number: (value) => (value === "" ? undefined : numeral(value)),
  words: (value) => split(value, ","),
  numbers: (value) => split(value, /[,\s]+/)?.map(numeral),
  layers: (value) => { const text = value.trim(); return text === "" || text === "auto" ? undefined : /^\d+$/.test(text) ? Number(text) : text; },
  gpus: (value) => { const text = value.trim(); return text === "none" ? text : split(text, ","); },
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

/** A field with its label, its key, its help and what the daemon says of it. */
export class Field {
  constructor([name, title, kind, help, options = {}], change) {
    const id = freshId("recipe-");
    Object.assign(this, { name, kind });
    this.control = control(kind, id, options, change);
    this.told = h("p", { class: "told", id: `${id}-told` });
    this.help = h("p", { class: "quiet", id: `${id}-help` }, help);
    mark(this.control, "aria-describedby", `${id}-help ${id}-told`);
    const label = [h("label", { for: id }, title), " ", h("code", { class: "key" }, name)];
    this.element = kind === "check" ? h("div", { class: "field check" }, this.control, label, this.told)
      : h("div", { class: "field" }, label, this.control, this.help, this.told);
  }

  get value() { return this.kind === "check" ? this.control.checked || undefined : READ[this.kind](this.control.value); }

  set value(value) {
    if (this.kind === "check") this.control.checked = Boolean(value);
    else this.control.value = WRITE[this.kind]?.(value) ?? value ?? "";
  }

  tell(faults) { tellAt(this, faults); }
}

/** Tell faults at a place of the form, {element, control, told}, and open the group that it is in. */
export function tellAt(place, faults) {
  const isBad = faults.some((fault) => fault.severity === "fault");
  say(place.told, faults.map((fault) => fault.message).join(" "));
  place.element.classList.toggle("odd", faults.length > 0);
  place.element.classList.toggle("bad", isBad);
  if (faults.length) place.element.closest("details")?.setAttribute("open", "");
  mark(place.control, "aria-invalid", isBad ? "true" : null);
}

/** Return the flags of extra_args and what cannot be read of them; one is written NAME: VALUE, or as on a command line. */
export function readFlags(text) {
  const flags = {};
  const faults = [];
  text.split("\n").forEach((line, index) => {
    if (!line.trim()) return;
    const parts = /^\s*(?:([A-Za-z0-9][\w.-]*)\s*(?:[:=]\s*(.*?))?|--?([A-Za-z0-9][\w.-]*)(?:\s*[:=\s]\s*(.*?))?)\s*$/.exec(line);
    const name = parts && (parts[1] ?? parts[3]);
    if (!name) { faults.push({ key: "extra_args", severity: "fault", message: `line ${index + 1} is not NAME: VALUE` }); return; }
    if (name in flags) faults.push({ key: "extra_args", severity: "fault", message: `line ${index + 1}: ${name} is given twice` });
    const value = parts[2] ?? parts[4] ?? "";
    if (value === "") flags[name] = true;
    else { try { flags[name] = JSON.parse(value); } catch { flags[name] = value; } }
  });
  return { flags, faults };
}

/** Return flags as lines that `readFlags` reads as the same. */
export function writeFlags(flags) {
  return Object.entries(flags ?? {}).map(([name, value]) => `${name}: ${typeof value === "string" && isPlain(value) ? value : JSON.stringify(value)}`).join("\n");
}

function isPlain(text) {
  if (text === "" || text !== text.trim() || text.includes("\n")) return false;
  try { JSON.parse(text); return false; } catch { return true; }
}
