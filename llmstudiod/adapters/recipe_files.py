"""Recipes from ``/etc/llmstudio/recipes.d``: YAML or JSON, one recipe or a list in a file.

A faulty recipe is left out and told with file, line and key; the others are served. Nothing here raises for bad input.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from llmstudiod.adapters.settings import duration
from llmstudiod.adapters.validation import shorten, validate
from llmstudiod.adapters.yaml_lines import Document, Path_, read_document
from llmstudiod.core.flags import find_flag
from llmstudiod.core.recipe import ID_PATTERN, Fault, Recipe, RecipeEntry, Severity
from llmstudiod.core.recipe_names import ALIASES, FOREIGN, IGNORED, SINGLE_LINE_FIELDS, denied_environment
from llmstudiod.core.units import parse_size_bytes

SUFFIXES = frozenset({".yaml", ".yml", ".json"})

_FIELDS = frozenset(f.name for f in fields(Recipe))
_DURATIONS = ("idle_timeout", "load_stall_timeout", "drain_timeout")
_ID = re.compile(ID_PATTERN)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class LoadedRecipes:
    """What a directory or a file holds: the good recipes, and the faults of the others."""

    entries: tuple[RecipeEntry, ...]
    faults: tuple[Fault, ...]


def load_recipes(directory: Path) -> LoadedRecipes:
    """Return every recipe of ``directory``; one that does not exist holds none."""
    try:
        files = sorted(
            path for path in directory.iterdir() if path.suffix in SUFFIXES and not path.name.startswith(".")
        )
    except FileNotFoundError:
        return LoadedRecipes((), ())
    except OSError as error:
        return LoadedRecipes((), (Fault(f"cannot read the directory: {error.strerror}", file=str(directory)),))
    parts = [load_recipe_file(path) for path in files]
    return LoadedRecipes(
        tuple(entry for part in parts for entry in part.entries),
        tuple(fault for part in parts for fault in part.faults),
    )


def load_recipe_file(path: Path) -> LoadedRecipes:
    """Return the recipes of one file."""
    document = read_document(path)
    if isinstance(document, Fault):
        return LoadedRecipes((), (replace(document, key=document.key or path.stem),))
    return parse_recipes(document, default_id=path.stem)


def parse_recipes(document: Document, *, default_id: str) -> LoadedRecipes:
    """Return the recipes of a parsed file; ``default_id`` names a recipe that stands alone without an id."""
    raw, path = document.value, ()  # type: Any, Path_
    if isinstance(raw, dict) and set(raw) == {"recipes"}:  # the form in which vllm-studio exports
        raw, path = raw["recipes"], ("recipes",)
    if raw is None:
        return LoadedRecipes((), (Fault("the file is empty", document.file, key=default_id),))
    items = list(enumerate(raw)) if isinstance(raw, list) else [(None, raw)]
    entries: list[RecipeEntry] = []
    faults: list[Fault] = []
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
    notes: list[Fault] = field(default_factory=list)

    @property
    def faults(self) -> list[Fault]:
        """The faults first: they are why the recipe is left out."""
        return sorted(self.notes, key=lambda note: note.severity is Severity.WARNING)

    def read(self, raw: Any, *, default_id: str | None) -> RecipeEntry | None:  # noqa: ANN401 - a value of YAML
        """Return the recipe, or None with the reasons in ``faults``."""
        if not isinstance(raw, dict):
            self._fault((), f"expected a recipe as `key: value`, found {shorten(raw)}")
            return None
        for key, value in raw.items():
            self._take(key, value, (*self.path, key))
        if "id" not in self.values and default_id is not None:
            self.values["id"] = default_id
        self._convert()
        if not self._has_fault():
            self._check_words()
        recipe = None if self._has_fault() else self._validated()
        if recipe is None:
            # The id helps whoever asks for the model by name to find the reason.
            known = str(self.values.get("id", ""))
            self.notes = [replace(note, key=note.key or known) for note in self.notes]
            return None
        return RecipeEntry(recipe, self.document.file, self.document.line(self.path), tuple(self.notes))

    # One key after the other

    def _take(self, key: str, value: Any, place: Path_) -> None:  # noqa: ANN401
        name = key.replace("-", "_")
        name = ALIASES.get(name, name)
        if name == "extra_args" and isinstance(value, dict):
            for inner, inner_value in value.items():
                self._take_extra(inner, inner_value, (*place, inner))
        elif name == "env_vars":
            self._take_environment(value, place)
        elif name in _FIELDS:
            if value is not None:
                self._set(name, value, place)
        elif name in {"llama_server_path", "llama_server", "llama_bin", "launch_command", "custom_command"}:
            hint = "set `llama_server` in llmstudiod.yaml: a recipe cannot choose what is executed"
            self._fault(place, "no recipe may name the binary", hint=hint)
        elif name == "sandbox":
            if value not in ("strict", None, {}):
                self._fault(place, f"expected strict, found {shorten(value)}", hint="this version has no relaxations")
        elif name in IGNORED or name in FOREIGN:
            why = IGNORED.get(name) or FOREIGN[name]
            self._warn(place, f"has no effect here: {why}")
        elif name != "status":  # vllm-studio's answers carry a status; a recipe copied from one is fine
            self._unknown(key, place)

    def _take_extra(self, key: str, value: Any, place: Path_) -> None:  # noqa: ANN401
        name = ALIASES.get(key.replace("-", "_"), key.replace("-", "_"))
        if name in {"env_vars", "gpus", "description", "tags", "status"} or name in IGNORED or name in FOREIGN:
            self._take(key, value, place)
            return
        match = find_flag(key)
        if match is not None and match.flag.denied:
            self._fault(place, f"the flag {match.flag.names[0]} is not allowed: {match.flag.denied}")
        elif match is not None and match.flag.field:
            if value is not None:
                twin = match.flag.field
                if match.is_negated:
                    value = not value if isinstance(value, bool) else value
                self._set(twin, value, place)
        else:
            self.values.setdefault("extra_args", {})[key] = value
            self.origins.setdefault("extra_args", place[:-1])

    def _take_environment(self, value: Any, place: Path_) -> None:  # noqa: ANN401
        if value is None:
            return
        if not isinstance(value, dict):
            self._fault(place, f"expected variables as `NAME: value`, found {shorten(value)}")
            return
        for name, content in value.items():
            why = denied_environment(name)
            text = {True: "true", False: "false", None: ""}.get(content) if content in (True, False, None) else content
            if why:
                self._fault((*place, name), f"no recipe may set {name}: {why}")
            elif not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or not isinstance(text, str | int | float):
                self._fault((*place, name), f"expected a variable and its text, found {name}={shorten(content)}")
            elif _CONTROL.search(str(text)):
                self._fault((*place, name), "expected text in one line, found control characters")
            else:
                self.values.setdefault("env_vars", {})[name] = str(text)

    def _set(self, name: str, value: Any, place: Path_) -> None:  # noqa: ANN401
        if name in self.values:
            first = self.document.line(self.origins[name])
            self._fault(place, f"{name} is given twice, first as {self.origins[name][-1]} in line {first}")
            return
        self.values[name] = value
        self.origins[name] = place

    def _unknown(self, key: str, place: Path_) -> None:
        close = difflib.get_close_matches(key, [*_FIELDS, *ALIASES], n=1)
        flag = find_flag(key)
        if close:
            hint = f"did you mean {close[0]}?"
        elif flag is not None:
            hint = f"a flag of llama-server belongs under extra_args: {{{key}: …}}"
        else:
            hint = "llmstudio-recipe(5) lists the fields"
        self._warn(place, "there is no such field; it has no effect", hint=hint)

    # All keys together

    def _convert(self) -> None:
        """Bring what people write into the forms that the recipe's fields have."""
        values = self.values
        for name in ("tags", "aliases"):
            if isinstance(values.get(name), str):
                values[name] = [values[name]]
        for name in _DURATIONS:
            self._converted(name, duration)
        if isinstance(limits := values.get("limits"), dict) and "memory_max" in limits:
            self._converted("limits", lambda raw: raw | {"memory_max": parse_size_bytes(raw["memory_max"])})
        self._converted("gpus", _gpus)
        self._converted("lora", _loras)
        self._converted("tensor_split", _numbers)
        if isinstance(values.get("override_tensor"), list):
            values["override_tensor"] = ",".join(map(str, values["override_tensor"]))
        if isinstance(values.get("extra_args"), list | str | int):
            self._fault(self.origins["extra_args"], f"expected flags as `name: value`, found {values['extra_args']!r}")

    def _converted(self, name: str, convert: Any) -> None:  # noqa: ANN401 - one of the functions below
        if name in self.values:
            try:
                self.values[name] = convert(self.values[name])
            except ValueError as error:
                self._fault(self.origins[name], str(error))

    def _check_words(self) -> None:
        model_id = self.values.get("id")
        if not isinstance(model_id, str) or not _ID.fullmatch(model_id):
            self._fault(
                self.origins.get("id", self.path),
                f"expected an id of a-z, 0-9, '.', '_' and '-' that begins with a letter or digit (63 at most), "
                f"found {shorten(model_id)}",
                hint="it names the unit and the socket; put the pretty name into `name` or `served_model_name`",
            )
        for name in sorted(SINGLE_LINE_FIELDS & set(self.values)):
            if isinstance(text := self.values[name], str) and _CONTROL.search(text):
                self._fault(self.origins[name], f"expected text in one line, found {shorten(text)}")
        for name in ("served_model_name", "aliases"):
            given = self.values.get(name) or ()
            for text in [given] if isinstance(given, str) else given:
                if isinstance(text, str) and ("," in text or _CONTROL.search(text) or not text.strip()):
                    hint = "llama-server reads a comma as the end of a name"
                    self._fault(self.origins[name], f"expected a name without commas, found {text!r}", hint=hint)

    def _validated(self) -> Recipe | None:
        result = validate(Recipe, self.values, document=self.document, path=self.path, origins=self.origins)
        if isinstance(result, Recipe):
            return result
        self.notes += result
        return None

    # Notes

    def _has_fault(self) -> bool:
        return any(note.severity is Severity.FAULT for note in self.notes)

    def _fault(self, place: Path_, message: str, *, hint: str | None = None) -> None:
        self._note(place, message, hint, Severity.FAULT)

    def _warn(self, place: Path_, message: str, *, hint: str | None = None) -> None:
        self._note(place, message, hint, Severity.WARNING)

    def _note(self, place: Path_, message: str, hint: str | None, severity: Severity) -> None:
        inner = place[len(self.path) :]
        key = ".".join(str(part) for part in inner) or None
        self.notes.append(Fault(message, self.document.file, self.document.line(place), key, hint, severity))


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
        return [float(part) for part in raw.split(",")]
    except ValueError:
        raise ValueError(f"expected proportions such as 3,1, found {raw!r}") from None


def _loras(raw: Any) -> Any:  # noqa: ANN401
    items = raw if isinstance(raw, list) else [raw]
    result: list[Mapping[str, Any]] = []
    for item in items:
        if isinstance(item, str):
            result.append({"path": item})
        elif isinstance(item, dict) and set(item) <= {"path", "scale"}:
            result.append(item)
        else:
            raise ValueError(f"expected a path, or path and scale, found {shorten(item)}")
    return result
