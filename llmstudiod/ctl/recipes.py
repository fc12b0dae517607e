"""``llmstudioctl recipe``: make, edit, show and delete recipes; make one of a llama-server command."""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

from llmstudiod.core.errors import AccessDeniedError, BadRequestError, ConfigError, ConflictError, StaleError
from llmstudiod.core.strict import BY_HAND
from llmstudiod.ctl.client import AnswerError, Client
from llmstudiod.ctl.editing import edit_recipe, read_text, tell_faults, write_in_place

_FILES = frozenset({"model_path", "draft_model", "mmproj", "chat_template_file"})


def new(client: Client, arguments: argparse.Namespace) -> int:
    """Store a recipe for a GGUF, with the fields that were given."""
    path = _absolute(arguments.file)
    given = dict(map(_pair, arguments.set or ()))
    model = arguments.id or given.get("id") or _id_of(client, path)
    values: dict[str, Any] = {"id": model, "model_path": path} | given | {"id": model}
    _refuse_existing(client, str(values["id"]))
    checked = client.post("recipes", "check", body=values)
    if arguments.edit:

        def store(changed: str, told: dict[str, Any]) -> None:
            _saved(client.post_text("recipes", text=changed), told, as_json=arguments.json)

        model, text = str(values["id"]), checked["yaml"] or json.dumps(values)
        return edit_recipe(client, model, text, store, may_stay=False, is_trusted=False, as_json=arguments.json)
    _refuse_faults(checked)
    if not arguments.force and (error := checked["error"]) and error.get("failure"):
        raise ConfigError(error["detail"], hint="--force stores the recipe all the same, for a file that is to come")
    return _saved(client.post("recipes", body=values), checked, as_json=arguments.json)


def edit(client: Client, arguments: argparse.Namespace) -> int:
    """Open a recipe in the editor, and store what was made of it once it is good."""
    model, file = _found(client, arguments.model)
    if file is not None and os.access(file, os.W_OK):  # whoever may write it keeps its other recipes
        return _edit_file(client, model, Path(file), as_json=arguments.json)
    text, tag = client.tagged_text("recipes", model, "file")
    if client.post_text("recipes", "check", text=text, query=f"id={quote(model)}")["by_hand"]:
        hint = f"`sudo llmstudioctl recipe edit {model}` edits it as root"
        raise AccessDeniedError(f"'{file}' {BY_HAND}", hint=hint)  # before somebody has made a change in vain

    def store(changed: str, checked: dict[str, Any]) -> None:
        try:
            answer = client.put_text("recipes", model, text=changed, tag=tag)
        except AnswerError as error:
            raise error.with_hint(_anew(model)) if error.answer_kind == "stale" else error from None
        _saved(answer, checked, as_json=arguments.json)

    return edit_recipe(client, model, text, store, may_stay=True, is_trusted=False, as_json=arguments.json)


def show(client: Client, arguments: argparse.Namespace) -> int:
    """Print a recipe's file, or what it says as JSON, with its state."""
    if arguments.json:
        recipe = client.get("recipes", arguments.model)
        added = {*recipe["old"], "old"}
        print(json.dumps({name: recipe[name] for name in recipe if name not in added}, ensure_ascii=False, indent=2))
        return 0
    sys.stdout.write(client.text("recipes", arguments.model, "file"))
    return 0


def delete(client: Client, arguments: argparse.Namespace) -> int:
    """Remove a recipe; the model's file stays."""
    try:
        answer = client.delete("recipes", arguments.model)
    except AnswerError as error:
        if error.answer_kind == "access_denied":
            _, file = _found(client, arguments.model)
            raise error.with_hint(
                f"`sudo rm {shlex.quote(str(file))}` removes it, with whatever else it holds"
            ) from None
        raise
    print(json.dumps(answer) if arguments.json else f"the recipe of '{arguments.model}' is removed")
    return 0


def from_command(client: Client, arguments: argparse.Namespace) -> int:
    """Print the recipe that does what a llama-server command does, or store it."""
    words = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
    if not words and sys.stdin.isatty():
        print("paste the command, then press Ctrl-D", file=sys.stderr)
    command = words[0] if len(words) == 1 else shlex.join(words) if words else sys.stdin.read()
    if not command.strip():
        hint = "give it behind from-command, or on the standard input"
        raise BadRequestError("expected a llama-server command, found nothing", hint=hint)
    query = "" if arguments.save else "trusted=true"  # what is printed goes into a file by hand, which may hold more
    made = client.post("recipes", "from-command", body={"command": command}, query=query)
    made["recipe"] = {name: _absolute_field(name, value) for name, value in made["recipe"].items()}
    if arguments.id:
        made["recipe"]["id"] = arguments.id
    checked = client.post("recipes", "check", body=made["recipe"], query=query)
    made["yaml"] = checked["yaml"] or made["yaml"]
    for note in made["notes"]:
        print(f"note: {note}", file=sys.stderr)
    if arguments.save:
        return _save_made(client, made["recipe"], checked, as_json=arguments.json)
    sys.stdout.write(json.dumps(made, ensure_ascii=False, indent=2) + "\n" if arguments.json else made["yaml"])
    return 0


def _save_made(client: Client, recipe: dict[str, Any], checked: dict[str, Any], *, as_json: bool) -> int:
    """Store a recipe that was made of a command; what only root's own files may say, root is told how to."""
    _refuse_existing(client, recipe["id"])
    try:
        _refuse_faults(checked)
        return _saved(client.post("recipes", body=recipe), checked, as_json=as_json)
    except AnswerError as error:
        if error.answer_kind != "access_denied":
            raise
        told: Exception = error
    except ConfigError as error:
        told = error
    directory = client.get("config")["settings"]["recipes_dir"]
    file = PurePath(directory, f"{recipe['id']}.yaml")
    hint = f"without --save it is printed: `… recipe from-command … | sudo tee {file}`"
    raise ConfigError(str(told), hint=hint, details={"faults": checked["faults"]}) from told


def _edit_file(client: Client, model: str, file: Path, *, as_json: bool) -> int:
    """Have a file edited that the caller may write, with whatever else it holds."""
    text = read_text(file)

    def store(changed: str, checked: dict[str, Any]) -> None:
        if not file.exists() or read_text(file) != text:
            raise StaleError(f"'{file}' was changed meanwhile", hint=_anew(model))
        write_in_place(file, changed)
        client.post("reload")
        _tell_check(checked)
        print(json.dumps({"success": True, "id": model}) if as_json else f"{file} is written, and in force")

    return edit_recipe(client, model, text, store, may_stay=True, is_trusted=True, as_json=as_json)


def _anew(model: str) -> str:
    return f"`llmstudioctl recipe edit {model}` shows what it says now"


def _found(client: Client, name: str) -> tuple[str, str | None]:
    """Return the id of a recipe and its file; also of one that was left out for its faults."""
    try:
        recipe = client.get("recipes", name)
    except AnswerError as error:
        if error.answer_kind != "model_not_found":
            raise
        for fault in client.get("status")["faults"]:
            if fault["file"] and name in {fault["recipe_id"], PurePath(fault["file"]).name}:
                return fault["recipe_id"] or name, fault["file"]
        raise
    return recipe["id"], recipe["file"]


def _refuse_faults(checked: dict[str, Any]) -> None:
    """Tell warnings and faults, and raise where there is a fault."""
    faults = [fault for fault in checked["faults"] if fault["severity"] == "fault"]
    tell_faults([{**fault, "line": None} for fault in checked["faults"]])  # nobody has seen a text with these lines
    if faults:
        raise ConfigError("the recipe was not stored", details={"faults": faults})


def _tell_check(checked: dict[str, Any]) -> None:
    if error := checked.get("error"):
        print(f"warning: it cannot be loaded now: {error['detail']}", file=sys.stderr)


def _saved(answer: dict[str, Any], checked: dict[str, Any], *, as_json: bool) -> int:
    _tell_check(checked)
    text = f"the recipe of '{answer['id']}' is stored; `llmstudioctl load {answer['id']}` loads it"
    print(json.dumps(answer) if as_json else text)
    return 0


def _refuse_existing(client: Client, model: str) -> None:
    try:
        found = client.get("recipes", model)
    except AnswerError as error:
        if error.answer_kind == "model_not_found":
            return
        raise
    if found["file"] is not None:
        hint = f"`llmstudioctl recipe edit {model}` changes it; --id gives another name"
        raise ConflictError(f"there is a recipe '{model}' already", hint=hint)


def _id_of(client: Client, path: str) -> str:
    for model in client.get("v1", "studio", "models")["models"]:
        if model["path"] == path:
            return str(model["id"])
    return Path(path).stem.lower()


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if Path(path).exists() else path


def _absolute_field(name: str, value: Any) -> Any:  # noqa: ANN401 - a value of JSON
    return _absolute(value) if name in _FILES and isinstance(value, str) else value


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise BadRequestError(f"--set: expected NAME=VALUE, found '{text}'")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
