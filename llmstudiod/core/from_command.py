"""A recipe made of a ``llama-server`` command line that somebody has already."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llmstudiod.core.errors import BadRequestError
from llmstudiod.core.flag_table import INTEGER, LIST, NUMBER, ON_OFF_AUTO, RENAMED, SWITCH, FlagKind
from llmstudiod.core.flags import FoundFlag, find_flag, modernize, why_denied
from llmstudiod.core.pasted_command import read_pasted
from llmstudiod.core.recipe_names import denied_environment

_UNIT = re.compile(r"\d+[kKmMgG]")
_GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"
_DOWNLOADS = frozenset({"--hf-repo", "--model-url", "--docker-repo"})
_MET_ELSEWHERE = {
    "--host": "the endpoint's address is llmstudiod.socket's",
    "--port": "the endpoint's port is llmstudiod.socket's",
    "--api-key": "keys are made with `llmstudioctl key add`",
    "--device": "gpus: names the GPUs that may be used",
    "--fit": "the daemon fits the model into what is free",
    "--metrics": "GET /metrics tells of all models",
}


@dataclass(slots=True)
class Made:
    """A recipe as plain values, and what of the command went elsewhere, or nowhere."""

    recipe: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def recipe_from_command(command: str, *, over_http: bool = True) -> Made:
    """Return the recipe that starts the same server.

    ``over_http``: it is to be stored that way, so what only a file by hand may have is left out.

    >>> made = recipe_from_command("llama-server -m /srv/models/a.gguf -c 8192 -np 2 --top-k 40").recipe
    >>> made["id"], made["max_model_len"], made["max_num_seqs"], made["extra_args"]
    ('a', 4096, 2, {'top-k': 40})

    Raises:
        BadRequestError: It is no such command.
    """
    pasted = read_pasted(command)
    made = Made(notes=pasted.notes)
    _take_variables(pasted.variables, made, over_http=over_http)
    reader = _Flags(made, over_http=over_http)
    for found, spelling, text in _flags(pasted.words):
        reader.take(found, spelling, text)
    reader.finish()
    return made


def _take_variables(variables: dict[str, str], made: Made, *, over_http: bool) -> None:
    for name, value in variables.items():
        if name == _GPU_VARIABLE:
            made.recipe["gpus"] = [item.strip() for item in value.split(",") if item.strip()] or "none"
        elif why := denied_environment(name):
            made.notes.append(f"the variable {name} is left out: {why}")
        elif over_http:
            made.notes.append(
                f"the variable {name} is left out: recipes over HTTP have none; name it in env_vars of a file by hand"
            )
        else:
            made.recipe.setdefault("env_vars", {})[name] = value


@dataclass(slots=True)
class _Flags:
    """Sorts the flags into fields and extra_args."""

    made: Made
    over_http: bool
    values: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    old: dict[str, object] = field(default_factory=dict)
    download: str | None = None

    def take(self, found: FoundFlag | None, spelling: str, text: str | None) -> None:
        """Take one flag."""
        if found is None:
            self._take_unlisted(spelling, text)
            return
        name = found.flag.names[0]
        if found.flag.field is None and (why := why_denied(name, over_http=True)) is not None:
            self.download = text or spelling if name in _DOWNLOADS else self.download
            self.made.notes.append(f"{spelling} is left out: {_MET_ELSEWHERE.get(name, why)}")
            return
        value = _value(found, spelling, text)
        if found.flag.field is None:
            self.extra[name.lstrip("-")] = _joined(self.extra.get(name.lstrip("-")), value)
        elif _is_default(found.flag.field, value):
            self.made.notes.append(f"{spelling} {text} is left out: it is llama-server's word for its own choice")
        else:
            self.values[found.flag.field] = _joined(self.values.get(found.flag.field), value)

    def _take_unlisted(self, spelling: str, text: str | None) -> None:
        renamed = RENAMED.get(spelling)
        if renamed is None:
            self._take_unknown(spelling, text)
        elif renamed.flag is None:
            self.made.notes.append(f"{spelling} is left out: llama-server has it no more; {renamed.hint}")
        elif renamed.on is not None:
            self.old[spelling] = True
        elif successor := find_flag(renamed.flag):
            self.take(successor, spelling, text)

    def _take_unknown(self, spelling: str, text: str | None) -> None:
        name = spelling.lstrip("-")
        if why := why_denied(spelling, over_http=False):
            self.made.notes.append(f"{spelling} is left out: {why}")
        elif self.over_http:
            self.made.notes.append(
                f"{spelling}: not known to this llmstudiod, so it is left out; extra_args of a file by hand may have it"
            )
        else:
            self.extra[name] = True if text is None else text
            self.made.notes.append(
                f"{spelling}: not known to this llmstudiod; it is passed on, and a start fails if llama-server "
                "does not know it either"
            )

    def finish(self) -> None:
        """Put the recipe together."""
        if "model_path" not in self.values and self.download is not None:
            raise BadRequestError(
                f"the command names no file: llmstudiod does not download '{self.download[:200]}'",
                hint="download it first, such as by `hf download REPO FILE.gguf --local-dir /srv/models`, "
                "and write `-m /srv/models/FILE.gguf` instead",
            )
        try:
            modern = modernize(self.old, known=frozenset())
        except ValueError as error:
            raise BadRequestError(str(error)) from None
        for flag, value in modern.extra_args.items():
            found = find_flag(flag)
            if found is not None and found.flag.field is not None:
                self.values.setdefault(found.flag.field, value)
        self.made.notes += modern.notes
        _settle(self.values, self.made)
        if self.extra:
            self.made.recipe["extra_args"] = self.extra


def _is_default(name: str, value: object) -> bool:
    """Whether a value is one of those by which llama-server chooses itself: negative, or no thread at all."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return is_number and (int(str(value)) < 0 or (name == "threads" and value == 0))


def _flags(words: list[str]) -> Iterator[tuple[FoundFlag | None, str, str | None]]:
    """Return each flag, as it was spelled, with its value."""
    number = 0
    while number < len(words):
        word = words[number]
        number += 1
        if not word.startswith("-"):
            raise BadRequestError(f"expected a flag of llama-server, found '{word[:100]}'")
        spelling, equals, text = word.partition("=")
        found = find_flag(spelling)
        if found is None and spelling.startswith("--") and (short := find_flag(spelling[1:])):
            found, spelling = short, spelling[1:]  # a long dash may have been one
        if equals:
            yield found, spelling, text
            continue
        follower = words[number] if number < len(words) else None
        if _takes_value(found, spelling, follower):
            number += 1
            yield found, spelling, follower
        else:
            yield found, spelling, None


def _takes_value(found: FoundFlag | None, spelling: str, follower: str | None) -> bool:
    is_old_switch = spelling in RENAMED and RENAMED[spelling].on is not None
    if follower is None or is_old_switch or (found is not None and found.flag.kind is SWITCH):
        return False
    looks_like_flag = follower.startswith("-") and not re.fullmatch(r"-\d+(\.\d+)?", follower)
    return found is not None and found.flag.kind is not ON_OFF_AUTO if looks_like_flag else True


def _value(found: FoundFlag, spelling: str, text: str | None) -> Any:  # noqa: ANN401 - a value of JSON
    kind = found.flag.kind
    if kind is SWITCH:
        return not found.is_negated
    if text is None:
        if kind is ON_OFF_AUTO:
            return True
        raise BadRequestError(f"{spelling}: expected a value after it, found none")
    if kind in {INTEGER, NUMBER}:
        return _number(spelling, text, kind)
    if kind is ON_OFF_AUTO:
        return {"on": True, "off": False, "1": True, "0": False, "true": True, "false": False}.get(text, text)
    if found.flag.field in {"n_gpu_layers", "spec_draft_n_gpu_layers"}:
        return _layers(spelling, text)
    if kind is LIST and found.flag.field != "served_model_name":
        return [item for item in text.split(",") if item]
    return text


def _number(spelling: str, text: str, kind: FlagKind) -> float | int:
    try:
        return int(text) if kind is INTEGER else float(text)
    except ValueError:
        is_short = _UNIT.fullmatch(text) is not None
        hint = f"llama-server takes this for {text[:-1]}: write the number in full" if is_short else None
        raise BadRequestError(f"{spelling}: expected a number, found '{text[:40]}'", hint=hint) from None


def _layers(spelling: str, text: str) -> int | str:
    if text in {"all", "auto"}:
        return text
    count = _number(spelling, text, INTEGER)
    return int(count) if count >= 0 else "all"


def _joined(earlier: Any, value: Any) -> Any:  # noqa: ANN401
    return [*earlier, *value] if isinstance(earlier, list) and isinstance(value, list) else value


def _settle(values: dict[str, Any], made: Made) -> None:
    """Turn llama-server's meanings into a recipe's where they differ."""
    path = values.pop("model_path", None)
    if path is None:
        raise BadRequestError("the command names no model", hint="expected `-m FILE.gguf`")
    if re.match(r"[A-Za-z]:[\\/]", path):
        made.notes.append(f"'{path}' is a path of Windows: name where the file lies on this machine")
    name = values.pop("served_model_name", None)
    stem = re.sub(r"(?:[^a-z0-9._]|-)+", "-", re.split(r"[/\\]", path)[-1].removesuffix(".gguf").lower())
    made.recipe = {
        "id": re.sub(r"-00001-of-\d{5}$", "", stem).strip("._-")[:63] or "model",
        "model_path": path,
    } | made.recipe
    names = [item.strip() for item in str(name or "").split(",") if item.strip()]
    if names:
        made.recipe["served_model_name"] = names[0]
    if names[1:]:
        made.recipe["aliases"] = names[1:]
    slots = values.get("max_num_seqs")
    if isinstance(slots, int) and slots < 1:  # llama-server's word for auto
        del values["max_num_seqs"]
        slots = None
    total = values.get("max_model_len")
    if total == 0:
        del values["max_model_len"]
    elif isinstance(total, int) and slots and slots > 1 and not values.get("kv_unified"):
        values["max_model_len"] = max(1, total // slots)
        made.notes.append(
            f"-c {total} is shared by {slots} slots: max_model_len is what one request may use, {total // slots}"
        )
    lora = values.get("lora")
    if isinstance(lora, list):
        values["lora"] = [_adapter(item) for item in lora]
    if isinstance(values.get("override_tensor"), list):
        values["override_tensor"] = ",".join(values["override_tensor"])
    if isinstance(values.get("spec_type"), list):
        values["spec_type"] = ",".join(values["spec_type"])
    split = values.get("tensor_split")
    if isinstance(split, list):
        values["tensor_split"] = [_number("--tensor-split", item, NUMBER) for part in split for item in part.split("/")]
    made.recipe |= values


def _adapter(text: str) -> dict[str, Any]:
    path, colon, scale = text.rpartition(":")
    if colon and re.fullmatch(r"-?\d+(\.\d+)?", scale):
        return {"path": path, "scale": float(scale)}
    return {"path": text}
