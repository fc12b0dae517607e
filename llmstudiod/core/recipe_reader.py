"""Recipes from ``/etc/llmstudio/recipes.d``: YAML or JSON, one recipe or a list in a file.

A faulty recipe is left out and told with file, line and key; the others are served. Nothing here raises for bad input.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from llmstudiod.core.flags import FlagKind, FoundFlag, find_flag, modernize, render_flag, why_denied
from llmstudiod.core.recipe import ID_PATTERN, Fault, Limits, LoadedRecipes, Recipe, RecipeEntry, Sandbox, Severity
from llmstudiod.core.recipe_names import ALIASES, FOREIGN, IGNORED, SINGLE_LINE_FIELDS, denied_environment
from llmstudiod.core.settings_reader import duration, size
from llmstudiod.core.validation import shorten, validate
from llmstudiod.core.yaml_lines import Document, Path_, parse_bytes

_FIELDS = frozenset(f.name for f in fields(Recipe))
_LIMITS = frozenset(f.name for f in fields(Limits))
_RELAXATIONS = frozenset(f.name for f in fields(Sandbox))
_DURATIONS = ("idle_timeout", "load_stall_timeout", "drain_timeout", "restart_window")
_NAMES_OF_BINARIES = frozenset({"llama_server_path", "llama_server", "llama_bin", "launch_command", "custom_command"})
_NO_FLAGS = frozenset({"extra_args", "env_vars", "gpus", "description", "tags", "status"}) | FOREIGN.keys()
_ID = re.compile(ID_PATTERN)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_CPUS = re.compile(r"\d{1,4}(-\d{1,4})?([, ]+\d{1,4}(-\d{1,4})?)*")

_WORDS: Mapping[str, str] = {
    "load_stall_timeout": "a duration of 1s or more",
    "restart_window": "a duration of 1s or more",
    "extra_args": "flags as `name: value`",
    "limits": "limits as `name: value`",
    "sandbox": "strict, or relaxations as `name: value`",
    "limits.memory_max": "a size of 1MiB or more",
    "tags": "a list of words",
    "aliases": "a list of names, at most 100",
    "tensor_split": "proportions such as [3, 1]",
    "model_path": "the path of a GGUF file",
    "mmproj": "the path of a GGUF file",
    "draft_model": "the path of a GGUF file",
    "chat_template_file": "the path of a file",
}
_HINTS: Mapping[str, str] = {
    "backend": "this version serves GGUF files with llama.cpp",
    "model_path": "give the path of a GGUF file: model_path: /models/x.gguf",
    "max_model_len": "tokens for one request; leave it out to have it chosen",
    "max_num_seqs": "requests at the same time; leave it out to have it chosen",
    "cache_type_k": "f16 is llama-server's default; leave it out, or write q8_0 to halve the KV cache",
    "cache_type_v": "f16 is llama-server's default; leave it out, or write q8_0 to halve the KV cache",
    "cache_ram": "it is in MiB: 8192 for 8 GiB",
    "n_gpu_layers": "all is every layer, auto as many as fit",
}


def parse_recipe_bytes(raw: bytes, *, file: str) -> LoadedRecipes:
    """Return the recipes of a file's content; the file's name without its ending, if any, names one without an id."""
    default_id = file.rpartition("/")[2].rpartition(".")[0] or None
    document = parse_bytes(raw, file=file)
    if isinstance(document, Fault):
        return LoadedRecipes((), (replace(document, recipe_id=default_id),))
    return parse_recipes(document, default_id=default_id)


def parse_recipes(document: Document, *, default_id: str | None) -> LoadedRecipes:
    """Return the recipes of a parsed file; ``default_id`` names a recipe that stands alone without an id."""
    raw, path = document.value, ()  # type: Any, Path_
    faults: list[Fault] = []
    if isinstance(raw, dict) and isinstance(raw.get("recipes"), list):  # the form in which vllm-studio exports
        for key in raw.keys() - {"recipes"}:
            beside = "expected nothing beside `recipes`; it has no effect"
            faults.append(Fault(beside, document.file, document.line((key,)), key, severity=Severity.WARNING))
        raw, path = raw["recipes"], ("recipes",)
    if raw is None or raw == []:
        found = "an empty file" if raw is None else "an empty list"
        hint = "write one, or remove the file; a file whose name ends in .disabled is not read"
        fault = Fault(f"expected a recipe, found {found}", document.file, document.line(path), hint=hint)
        return LoadedRecipes((), (replace(fault, recipe_id=default_id),))
    items = list(enumerate(raw)) if isinstance(raw, list) else [(None, raw)]
    entries: list[RecipeEntry] = []
    for index, item in items:
        reader = _RecipeReader(document, path if index is None else (*path, index))
        entry = reader.read(item, default_id=default_id if len(items) == 1 else None)
        if entry is None:
            faults += reader.faults
        else:
            entries.append(entry)
    return LoadedRecipes(tuple(entries), tuple(faults))


@dataclass(slots=True)
class _RecipeReader:
    """Turns one mapping into a recipe; collects what is wrong on the way."""

    document: Document
    path: Path_
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, Path_] = field(default_factory=dict)
    inner: dict[tuple[str, str], Path_] = field(default_factory=dict)  # where each flag and variable stands
    notes: list[Fault] = field(default_factory=list)

    @property
    def faults(self) -> list[Fault]:
        """The faults first: they are why the recipe is left out."""
        return sorted(self.notes, key=lambda note: note.severity is Severity.WARNING)

    def read(self, raw: Any, *, default_id: str | None) -> RecipeEntry | None:  # noqa: ANN401 - a value of YAML
        """Return the recipe, or None with the reasons in ``faults``."""
        if not isinstance(raw, dict):
            self._fault(self.path, f"expected a recipe as `key: value`, found {shorten(raw)}")
            self._name_faults(default_id)
            return None
        for key, value in raw.items():
            self._take(key, value, (*self.path, key))
        if "id" not in self.values and default_id is not None:
            self.values["id"] = default_id
        self._convert()
        if not self._has_fault():
            self._check_words()
            self._check_renamed()
        recipe = None
        if self._has_fault():
            self._validate_the_rest()
        else:
            recipe = self._validated()
        if recipe is None:
            self._name_faults(default_id)
            return None
        warnings = tuple(replace(note, recipe_id=recipe.id) for note in self.notes)
        return RecipeEntry(recipe, self.document.file, self.document.line(self.path), warnings)

    def _validate_the_rest(self) -> None:
        """Look for faults in what had none so far: people mend a file once, not fault by fault."""
        faulty = {note.key.partition(".")[0] for note in self.notes if note.key and note.severity is Severity.FAULT}
        rest = {name: value for name, value in self.values.items() if not {name, self._spelled(name)} & faulty}
        whole, self.values = self.values, {"id": "x", "model_path": "/x"} | rest
        self._validated()
        self.values = whole

    def _spelled(self, name: str) -> str:
        """Return how the file spells a field, which is how its faults are keyed."""
        place = self.origins.get(name, ())[len(self.path) :]
        return str(place[0]) if place else name

    def _name_faults(self, default_id: str | None) -> None:
        """Name the recipe in its faults: whoever asks for the model by its id finds the reason."""
        known = self.values.get("id", default_id)
        aliases = self.values.get("aliases")
        others = [self.values.get("served_model_name"), self.values.get("model_path")]
        others += aliases if isinstance(aliases, list) else [aliases]
        if not (isinstance(known, str) and _ID.fullmatch(known)):  # whoever asks for it by its file's name learns why
            others = [default_id, *others]
        claims = tuple(other for other in others if isinstance(other, str))[:100]
        recipe_id = known if isinstance(known, str) else None
        self.notes = [replace(note, recipe_id=recipe_id, claims=claims) for note in self.notes]

    # One key after the other

    def _take(self, key: str, value: Any, place: Path_) -> None:  # noqa: ANN401
        name = key.replace("-", "_")
        name = ALIASES.get(name, name)
        if name == "extra_args":
            self._take_all_extra(value, place)
        elif name == "env_vars":
            self._take_environment(value, place)
        elif name == "sandbox" and value in ("strict", {}):
            pass
        elif name in _FIELDS:
            if value is not None:
                self._set(name, value, place)
        elif name in _NAMES_OF_BINARIES:
            hint = "remove it, and set `llama_server` in llmstudiod.yaml: a recipe cannot choose what is executed"
            self._fault(place, f"expected no name of a binary in a recipe, found {shorten(value)}", hint=hint)
        elif name in IGNORED or name in FOREIGN:
            if value is not None:  # exports of vllm-studio name every field; null says nothing
                why = IGNORED.get(name) or FOREIGN[name]
                self._warn(place, "it has no effect here", hint=why)
        elif name != "status":  # vllm-studio's answers carry a status; a recipe copied from one is fine
            self._unknown(key, place)

    def _take_all_extra(self, value: Any, place: Path_) -> None:  # noqa: ANN401
        if value is None:
            return
        if not isinstance(value, dict):
            hint = "write each flag on a line of its own, such as `top_k: 40`"
            self._fault(place, f"expected flags as `name: value`, found {shorten(value)}", hint=hint)
            return
        for inner, inner_value in value.items():
            self._take_extra(inner, inner_value, (*place, inner))

    def _take_extra(self, key: str, value: Any, place: Path_) -> None:  # noqa: ANN401
        name = ALIASES.get(key.replace("-", "_"), key.replace("-", "_"))
        found = find_flag(key)
        if name in _NO_FLAGS or (found is None and name in IGNORED):
            self._take(key, value, place)
        elif reason := why_denied(key, over_http=False):
            flag = found.flag.names[0] if found else key
            self._fault(place, f"the flag {flag} is not allowed: {reason}", hint="remove it")
        elif value is None:
            return
        elif found is not None and found.flag.field:
            self._hoist(found, value, place)
        elif found is None and name in _FIELDS:
            self._set(name, value, place)
        elif self._is_new("flag", found.flag.names[0] if found else name, place):
            self._check_flag(key, value, place)
            self.values.setdefault("extra_args", {})[key] = value

    def _hoist(self, found: FoundFlag, value: Any, place: Path_) -> None:  # noqa: ANN401
        """Take a flag that has a field as that field."""
        if found.is_negated:
            if not isinstance(value, bool):
                self._fault(place, f"expected true or false, found {shorten(value)}")
                return
            value = not value
        if found.flag.field == "lora" and isinstance(value, str):
            value = _lora_argument(value, has_scales=found.flag.names[0] == "--lora-scaled")
        self._set(str(found.flag.field), value, place)

    def _check_flag(self, key: str, value: Any, place: Path_) -> None:  # noqa: ANN401
        """Check a flag's value; what the installed binary accepts is checked before a start."""
        found = find_flag(key)
        if found is not None and found.flag.kind is FlagKind.SWITCH and not isinstance(value, bool):
            self._fault(place, f"expected true or false, found {shorten(value)}")
            return
        try:
            modern = modernize({key: value}, known=frozenset()).extra_args
        except ValueError:
            return  # the flag is gone, but the installed binary may be old enough to have it
        try:
            for flag, flag_value in modern.items():
                render_flag(flag, flag_value, known=frozenset())
        except ValueError as error:
            self._fault(place, str(error), hint="`llama-server --help` says what the flag takes")

    def _take_environment(self, value: Any, place: Path_) -> None:  # noqa: ANN401
        if value is None:
            return
        if not isinstance(value, dict):
            self._fault(place, f"expected variables as `NAME: value`, found {shorten(value)}")
            return
        for name, content in value.items():
            inner = (*place, name)
            text = _environment_text(content)
            if why := denied_environment(name):
                self._fault(inner, f"no recipe may set {name}: {why}", hint="remove it")
            elif not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                self._fault(inner, f"expected the name of a variable (letters, digits and _), found {name!r}")
            elif text is None:
                self._fault(inner, f"expected text or a number, found {shorten(content)}")
            elif _CONTROL.search(text):
                self._fault(inner, f"expected text in one line, found {shorten(text)}")
            elif self._is_new("variable", name, inner):
                self.values.setdefault("env_vars", {})[name] = text

    def _set(self, name: str, value: Any, place: Path_) -> None:  # noqa: ANN401
        if self._is_new("field", name, place):
            self.values[name] = value
            self.origins[name] = place

    def _is_new(self, what: str, name: str, place: Path_) -> bool:
        """Note where a field, flag or variable is given; a second place is a fault, for which of them was meant?"""
        first = self.inner.setdefault((what, name), place)
        if first is not place:
            line = self.document.line(first)
            self._fault(place, f"{name} is given twice, first as {self._key(first)} in line {line}", hint="keep one")
        return first is place

    def _unknown(self, key: str, place: Path_) -> None:
        close = difflib.get_close_matches(key, [*_FIELDS, *ALIASES], n=1)
        flag = find_flag(key)
        if close:
            hint = f"did you mean {close[0]}?"
        elif flag is not None:
            hint = f"a flag of llama-server belongs under extra_args: {{{key}: …}}"
        else:
            hint = "the README and the example recipe tell the fields"
        self._warn(place, "there is no such field, it has no effect", hint=hint)

    # All keys together

    def _convert(self) -> None:
        """Bring what people write into the forms that the recipe's fields have."""
        values = self.values
        for name in ("tags", "aliases"):
            if isinstance(values.get(name), str):
                values[name] = [values[name]]
        for name in ("override_tensor", "spec_type"):
            if isinstance(given := values.get(name), list) and all(isinstance(item, str) for item in given):
                values[name] = ",".join(given)
        for name in ("cache_type_k", "cache_type_v"):
            if values.get(name) == "auto":  # vllm-studio's default
                del values[name]
        for name in _DURATIONS:
            self._converted(name, duration)
        self._converted("gpus", _gpus)
        self._converted("lora", _loras)
        self._converted("tensor_split", _numbers)
        if isinstance(limits := values.get("limits"), dict):
            values["limits"] = self._limits(limits, self.origins["limits"])
        if isinstance(sandbox := values.get("sandbox"), dict):
            self._check_names("relaxation", sandbox, _RELAXATIONS, self.origins["sandbox"])
            values["sandbox"] = {name: value for name, value in sandbox.items() if value is not None}

    def _converted(self, name: str, convert: Callable[[Any], Any]) -> None:
        if name in self.values:
            try:
                self.values[name] = convert(self.values[name])
            except ValueError as error:
                self._fault(self.origins[name], str(error))

    def _limits(self, raw: dict[str, Any], place: Path_) -> dict[str, Any]:
        limits = {name: value for name, value in raw.items() if value is not None}
        self._check_names("limit", limits, _LIMITS, place)
        if "memory_max" in limits:
            try:
                limits["memory_max"] = size(limits["memory_max"])
            except ValueError as error:
                self._fault((*place, "memory_max"), str(error))
        if "allowed_cpus" in limits:
            given = limits["allowed_cpus"]
            text = ",".join(map(str, given)) if isinstance(given, list) else str(given)
            if not _CPUS.fullmatch(text):
                found = f"expected numbers of CPUs such as 0-7,16, found {shorten(given)}"
                self._fault((*place, "allowed_cpus"), found)
            limits["allowed_cpus"] = text
        return limits

    def _check_names(self, what: str, given: Iterable[str], known: frozenset[str], place: Path_) -> None:
        for name in set(given) - known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(known))}"
            self._fault((*place, name), f"there is no such {what}", hint=hint)

    def _check_words(self) -> None:
        model_id = self.values.get("id")
        if not isinstance(model_id, str) or not _ID.fullmatch(model_id):
            place = self.origins.get("id")
            source = "" if place or model_id is None else " (the file's name, since the recipe has no id)"
            found = (
                "expected an id of a-z, 0-9, '.', '_' and '-' that begins with a letter or digit, 63 at most, "
                f"found {shorten(model_id)}{source}"
            )
            hint = "it names the unit and the socket; the pretty name goes into `name` or `served_model_name`"
            if isinstance(model_id, str) and _ID.fullmatch(model_id.lower()):
                hint = f"write id: {model_id.lower()}; the pretty name goes into `name` or `served_model_name`"
            elif isinstance(model_id, int | float):
                hint = f'write id: "{model_id}", with the quotes'
            self._fault(place or (*self.path, "id"), found, hint=hint)
        for name in sorted((SINGLE_LINE_FIELDS - {"id"}) & self.origins.keys()):
            if isinstance(text := self.values.get(name), str) and _CONTROL.search(text):
                self._fault(self.origins[name], f"expected text in one line, found {shorten(text)}")
        if "\0" in str(self.values.get("chat_template")):
            self._fault(self.origins["chat_template"], "expected text, found a NUL character in it")
        for name in ("served_model_name", "aliases"):
            given = self.values.get(name)
            for text in given if isinstance(given, list) else [given]:
                if isinstance(text, str) and ("," in text or _CONTROL.search(text) or text.strip() != text or not text):
                    hint = "give several names as a list in aliases: [a, b]"
                    found = f"expected a name without commas, line breaks and outer blanks, found {shorten(text)}"
                    self._fault(self.origins[name], found, hint=hint)

    def _check_renamed(self) -> None:
        """Refuse an old flag beside the field of the flag that took its place (``no_mmap`` and ``load_mode``)."""
        for (what, _), place in list(self.inner.items()):
            if what != "flag":
                continue
            key = str(place[-1])
            try:
                modern = modernize({key: self.values["extra_args"][key]}, known=frozenset()).extra_args
            except ValueError:
                continue  # a flag without a successor; told before a start, if the installed binary has not got it
            twins = {str(found.flag.field) for flag in modern if flag != key and (found := find_flag(flag))}
            for twin in twins & self.origins.keys():
                first = self.origins[twin]
                where = f"{self._key(first)} in line {self.document.line(first)}"
                self._fault(place, f"it sets {twin}, which is given as {where}", hint="keep one")

    def _validated(self) -> Recipe | None:
        result = validate(
            Recipe, self.values, document=self.document, path=self.path, origins=self.origins, words=_WORDS
        )
        if isinstance(result, Recipe):
            return result
        self.notes += [replace(fault, hint=self._hint(fault)) for fault in result]
        return None

    # Notes

    def _hint(self, fault: Fault) -> str | None:
        name = next((name for name, place in self.origins.items() if self._key(place) == fault.key), fault.key or "")
        return fault.hint or _HINTS.get(name)

    def _has_fault(self) -> bool:
        return any(note.severity is Severity.FAULT for note in self.notes)

    def _fault(self, place: Path_, message: str, *, hint: str | None = None) -> None:
        self._note(place, message, hint, Severity.FAULT)

    def _warn(self, place: Path_, message: str, *, hint: str | None = None) -> None:
        self._note(place, message, hint, Severity.WARNING)

    def _note(self, place: Path_, message: str, hint: str | None, severity: Severity) -> None:
        self.notes.append(
            Fault(message, self.document.file, self.document.line(place), self._key(place) or None, hint, severity)
        )

    def _key(self, place: Path_) -> str:
        return ".".join(str(part) for part in place[len(self.path) :])


def _environment_text(content: Any) -> str | None:  # noqa: ANN401
    """Return a variable's text, or None for what has none."""
    if isinstance(content, bool):
        return "true" if content else "false"
    if content is None:
        return ""
    return str(content) if isinstance(content, str | int | float) else None


def _gpus(raw: Any) -> tuple[str, ...] | str | None:  # noqa: ANN401
    if raw in ("none", ""):
        return "none"
    if raw == "auto":
        return None
    items: Iterable[Any] = raw.split(",") if isinstance(raw, str) else raw if isinstance(raw, list) else [raw]
    names = tuple(str(item).strip() for item in items)
    for name in names:
        if not re.fullmatch(r"\d{1,3}|(GPU|MIG)-[0-9A-Za-z/-]{1,80}", name):
            raise ValueError(f"expected indices or UUIDs of GPUs, auto or none, found {shorten(raw)}")
    return names


def _numbers(raw: Any) -> Any:  # noqa: ANN401
    if not isinstance(raw, str):
        return raw
    try:
        return [float(part) for part in re.split("[,/]", raw)]  # llama-server reads both
    except ValueError:
        raise ValueError(f"expected proportions such as 3,1, found {shorten(raw)}") from None


def _loras(raw: Any) -> Any:  # noqa: ANN401
    items = raw if isinstance(raw, list) else [raw]
    result: list[Mapping[str, Any]] = []
    for item in items:
        given = {"path": item} if isinstance(item, str) else item
        is_adapter = isinstance(given, dict) and given.keys() <= {"path", "scale"} and "path" in given
        if not is_adapter or (isinstance(given["path"], str) and _CONTROL.search(given["path"])):
            raise ValueError(f"expected a path, or `path: …` and `scale: …`, found {shorten(item)}")
        result.append(given)
    return result


def _lora_argument(text: str, *, has_scales: bool) -> list[Any]:
    """Return the adapters of ``--lora A,B`` or ``--lora-scaled A:0.5,B:1``."""
    adapters: list[Any] = []
    for part in text.split(","):
        path, _, scale = part.rpartition(":")
        adapters.append({"path": path, "scale": scale} if has_scales and path else part)
    return adapters
