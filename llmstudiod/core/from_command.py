"""A recipe made of a ``llama-server`` command line that somebody has already."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llmstudiod.core.errors import BadRequestError
from llmstudiod.core.flag_table import INTEGER, LIST, NUMBER, ON_OFF_AUTO, RENAMED, SWITCH, FlagKind
from llmstudiod.core.flags import FoundFlag, find_flag, why_denied

_PROGRAM = re.compile(r"(^|/)(llama-server|server)(\.exe)?$")
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
_GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"
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


def recipe_from_command(command: str) -> Made:
    r"""Return the recipe that starts the same server.

    >>> recipe_from_command("llama-server -m /srv/models/a.gguf -c 8192 -np 2 -ngl 99 --top-k 40").recipe
    {'id': 'a', 'model_path': '/srv/models/a.gguf', 'max_model_len': 4096, 'max_num_seqs': 2, 'n_gpu_layers': 99, \
'extra_args': {'top-k': 40}}

    Raises:
        BadRequestError: It is no such command.
    """
    words, variables = _words(command)
    made = Made()
    _take_variables(variables, made)
    values: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for found, spelling, text in _flags(words):
        if found is None:
            extra[spelling.lstrip("-")] = True if text is None else text
            if spelling not in RENAMED:  # those are spelled anew when the model is started
                made.notes.append(f"{spelling}: not known to this llmstudiod; it is passed on if llama-server knows it")
            continue
        name = found.flag.names[0]
        if found.flag.field is None and (why := why_denied(name, over_http=True)) is not None:
            made.notes.append(f"{spelling} is left out: {_MET_ELSEWHERE.get(name, why)}")
            continue
        value = _value(found, spelling, text)
        if found.flag.field is None:
            extra[name.lstrip("-")] = _joined(extra.get(name.lstrip("-")), value)
        else:
            values[found.flag.field] = _joined(values.get(found.flag.field), value)
    _settle(values, made)
    if extra:
        made.recipe["extra_args"] = extra
    return made


def _words(command: str) -> tuple[list[str], dict[str, str]]:
    """Return the words after the program's name, and the variables set before it."""
    try:
        words = shlex.split(command.replace("\\\r\n", " ").replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise BadRequestError(
            f"the command cannot be read: {error}", hint="look for a quote that is not closed"
        ) from None
    program = next((number for number, word in enumerate(words) if _PROGRAM.search(word)), None)
    if program is None:
        program = next((number for number, word in enumerate(words) if word.startswith("-")), len(words)) - 1
    before = words[: program + 1]
    variables = dict(word.split("=", 1) for word in before if _ASSIGNMENT.match(word))
    return words[program + 1 :], variables


def _take_variables(variables: dict[str, str], made: Made) -> None:
    for name, value in variables.items():
        if name == _GPU_VARIABLE:
            made.recipe["gpus"] = [item.strip() for item in value.split(",") if item.strip()] or "none"
        else:
            made.notes.append(f"the variable {name} is left out: name it in env_vars if the model needs it")


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
        if equals:
            yield found, spelling, text
            continue
        follower = words[number] if number < len(words) else None
        if _takes_value(found, follower):
            number += 1
            yield found, spelling, follower
        else:
            yield found, spelling, None


def _takes_value(found: FoundFlag | None, follower: str | None) -> bool:
    if follower is None or (found is not None and found.flag.kind is SWITCH):
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
        raise BadRequestError(f"{spelling}: expected a number, found '{text[:40]}'") from None


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
    name = values.pop("served_model_name", None)
    stem = re.sub(r"(?:[^a-z0-9._]|-)+", "-", re.split(r"[/\\]", path)[-1].removesuffix(".gguf").lower())
    made.recipe = {
        "id": re.sub(r"-00001-of-\d{5}$", "", stem).strip("._-")[:63] or "model",
        "model_path": path,
    } | made.recipe
    if name:
        first, *more = [item.strip() for item in str(name).split(",") if item.strip()]
        made.recipe["served_model_name"] = first
        if more:
            made.recipe["aliases"] = more
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
