// Choosing a GGUF: an input with a list below it of what is on disk, with what each file's header says.

import { bytes, count, freshId, h, mark, put } from "./ui.js";

const FITS = { gpu: "fits on the GPUs", "gpu+ram": "fits on GPUs and RAM together", ram: "fits in RAM", no: "does not fit in this machine" };
const AT_ONCE = 40;

/** Return what is known of a file, in one line. */
export function factsOf(file) {
  return [file.architecture, file.quantization, bytes(file.size_bytes), file.layers && `${file.layers} layers`,
    file.context_length && `trained for ${count(file.context_length)} tokens`, file.shards > 1 && `${file.shards} parts`, FITS[file.fits],
    file.has_recipe && `has a recipe: ${file.recipe_ids.join(", ")}`].filter(Boolean).join(" · ");
}

/** Return {element, control, told, offer, known}: the field of the path. `change` is called with each letter. */
export function filePicker(change) {
  const id = freshId("recipe-path-");
  let files = [];
  let shown = [];
  let active = -1;
  const told = h("p", { class: "told", id: `${id}-told` });
  const facts = h("p", { class: "quiet", id: `${id}-facts` });
  const list = h("ul", { class: "files", id: `${id}-list`, role: "listbox", "aria-label": "Files on disk", hidden: true });
  const more = h("p", { class: "quiet small", hidden: true });
  const control = h("input", {
    id, required: true, spellcheck: "false", autocomplete: "off", placeholder: " ", role: "combobox", "aria-autocomplete": "list",
    "aria-expanded": "false", "aria-controls": list.id, "aria-describedby": `${id}-facts ${id}-told`,
    oninput: () => { tell(); open(); change(); }, onfocus: () => open(), onclick: () => open(), onblur: () => close(), onkeydown: steer,
  });
  const box = h("div", { class: "picker" }, control, list);
  const element = h("div", { class: "field" }, h("label", { for: id }, "GGUF file"), " ", h("code", { class: "key" }, "model_path"), box, more, facts, told);

  const known = () => files.find((file) => file.path === control.value.trim());

  function wanted() {
    const words = known() ? [] : control.value.toLowerCase().split(/\s+/).filter(Boolean);
    return files.filter((file) => words.every((word) => `${file.path} ${file.title ?? ""} ${file.quantization ?? ""}`.toLowerCase().includes(word)));
  }

  function open() {
    const found = wanted();
    shown = found.slice(0, AT_ONCE);
    active = -1;
    put(list, shown.map((file, number) => h("li", { id: `${list.id}-${number}`, role: "option", "aria-selected": String(file === known()), onmousedown: (event) => { event.preventDefault(); choose(file); } },
      h("strong", {}, file.title ?? file.name), " ", h("span", { class: "quiet" }, file.name), h("div", { class: "quiet small" }, factsOf(file)))));
    more.hidden = found.length <= AT_ONCE;
    put(more, `${found.length - AT_ONCE} more: type a part of the name`);
    show(shown.length > 0);
  }

  function show(isOpen) {
    list.hidden = !isOpen;
    mark(control, "aria-expanded", String(isOpen));
    if (!isOpen) mark(control, "aria-activedescendant", null);
  }

  function close() { show(false); more.hidden = true; }

  function choose(file) {
    control.value = file.path;
    tell();
    close();
    change();
  }

  function steer(event) {
    if (event.key === "Escape" && !list.hidden) { event.preventDefault(); close(); return; }
    if (event.key === "Enter" && !list.hidden && active >= 0) { event.preventDefault(); choose(shown[active]); return; }
    if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
    event.preventDefault();
    if (list.hidden) open();
    if (!shown.length) return;
    active = (active + (event.key === "ArrowDown" ? 1 : active < 0 ? 0 : -1) + shown.length) % shown.length;
    [...list.children].forEach((item, number) => mark(item, "aria-selected", String(number === active)));
    mark(control, "aria-activedescendant", list.children[active].id);
    list.children[active].scrollIntoView({ block: "nearest" });
  }

  function tell() {
    const file = known();
    put(facts, file ? [file.title, factsOf(file)].filter(Boolean).join(" · ") : "");
  }

  /** Offer the files that there are. */
  function offer({ models, roots }) {
    files = models;
    tell();
    if (!files.length) put(facts, `There is no GGUF in the model directories yet: put one into ${roots.map((root) => root.path).join(" or ") || "one (model_dirs in the settings)"}.`);
    else if (document.activeElement === control) open();
  }

  return { element, control, told, offer, known, tell, get files() { return files; } };
}
