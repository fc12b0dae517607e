"""``llmstudioctl recipe``: make, edit, show and delete recipes; make one of a llama-server command."""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from llmstudiod.core.errors import BadRequestError, LlmstudioError
from llmstudiod.ctl.client import AnswerError, Client

EDITORS = ("VISUAL", "EDITOR")


class EditorError(LlmstudioError):
    """No editor can be run, or it failed."""

    exit_code = 1


def new(client: Client, arguments: argparse.Namespace) -> int:
    """Store a recipe for a GGUF, with the fields that were given."""
    path = _absolute(arguments.file)
    given = dict(map(_pair, arguments.set or ()))
    model = arguments.id or given.get("id") or _id_of(client, path)
    values: dict[str, Any] = {"id": model, "model_path": path} | given | {"id": model}
    _refuse_existing(client, str(values["id"]))
    checked = client.post("recipes", "check", body=values)
    text = checked["yaml"] or json.dumps(values)
    if arguments.edit:
        return _edit(client, str(values["id"]), text, is_new=True, as_json=arguments.json)
    return _saved(client.post("recipes", body=values), checked, as_json=arguments.json)


def edit(client: Client, arguments: argparse.Namespace) -> int:
    """Open a recipe in the editor, and store what was made of it once it is good."""
    recipe = client.get("recipes", arguments.model)
    model, file = recipe["id"], recipe["file"]
    own = Path(file) if file and os.access(file, os.W_OK) else None  # whoever may write it keeps its other recipes
    text = own.read_text("utf-8") if own else client.text("recipes", model, "file")
    return _edit(client, model, text, is_new=False, as_json=arguments.json, own=own)


def show(client: Client, arguments: argparse.Namespace) -> int:
    """Print a recipe's file, or all that holds of it as JSON."""
    if arguments.json:
        print(json.dumps(client.get("recipes", arguments.model), ensure_ascii=False, indent=2))
        return 0
    sys.stdout.write(client.text("recipes", arguments.model, "file"))
    return 0


def delete(client: Client, arguments: argparse.Namespace) -> int:
    """Remove a recipe; the model's file stays."""
    answer = client.delete("recipes", arguments.model)
    print(json.dumps(answer) if arguments.json else f"the recipe of '{arguments.model}' is removed")
    return 0


def from_command(client: Client, arguments: argparse.Namespace) -> int:
    """Print the recipe that does what a llama-server command does, or store it."""
    words = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
    command = shlex.join(words) if len(words) > 1 else words[0] if words else sys.stdin.read()
    made = client.post("recipes", "from-command", body={"command": command})
    for note in made["notes"]:
        print(f"note: {note}", file=sys.stderr)
    if arguments.save:
        _refuse_existing(client, made["recipe"]["id"])
        return _saved(client.post("recipes", body=made["recipe"]), made, as_json=arguments.json)
    sys.stdout.write(json.dumps(made, ensure_ascii=False, indent=2) + "\n" if arguments.json else made["yaml"])
    return 0


def _edit(client: Client, model: str, text: str, *, is_new: bool, as_json: bool, own: Path | None = None) -> int:
    with tempfile.NamedTemporaryFile("w+", suffix=f".{model}.yaml", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        while True:
            _run_editor(file.name)
            changed = Path(file.name).read_text("utf-8")
            if changed == text and not is_new:
                print("nothing was changed", file=sys.stderr)
                return 0
            checked = client.post_text("recipes", "check", text=changed, query="trusted=true" if own else "")
            for fault in checked["faults"]:
                place = f"line {fault['line']}: " if fault["line"] else ""
                word = "warning: " if fault["severity"] == "warning" else ""
                key = f"{fault['key']}: " if fault["key"] else ""
                print(f"{place}{word}{key}{fault['message']}", file=sys.stderr)
            if checked["ok"] and own is not None:
                _write_in_place(own, changed)
                client.post("reload")
                print(json.dumps({"success": True, "id": model}) if as_json else f"{own} is written, and in force")
                return 0
            if checked["ok"]:
                ways = ("recipes",) if is_new else ("recipes", model)
                return _saved(client.post_text(*ways, text=changed, is_put=not is_new), checked, as_json=as_json)
            if not sys.stdin.isatty() or input("edit again? [Y/n] ").strip().lower() in {"n", "no"}:
                print("the recipe was not stored", file=sys.stderr)
                return 3


def _write_in_place(file: Path, text: str) -> None:
    """Replace a file at once, with its owner and mode."""
    there = file.stat()
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        fresh.write_text(text, "utf-8")
        fresh.chmod(there.st_mode & 0o7777)
        os.chown(fresh, there.st_uid, there.st_gid)
        fresh.replace(file)
    finally:
        fresh.unlink(missing_ok=True)


def _run_editor(path: str) -> None:
    chosen = next((os.environ[name] for name in EDITORS if os.environ.get(name)), None)
    words = shlex.split(chosen) if chosen else ["sensible-editor"]
    for argv in ([*words, path], ["nano", path], ["vi", path]):
        try:
            code = subprocess.run(argv, check=False).returncode
        except FileNotFoundError:
            if chosen:
                raise EditorError(f"the editor '{chosen}' cannot be found", hint="set VISUAL or EDITOR") from None
            continue
        if code:
            raise EditorError(f"the editor ended with {code}: nothing was stored")
        return
    raise EditorError("there is no editor", hint="set VISUAL or EDITOR")


def _saved(answer: dict[str, Any], checked: dict[str, Any], *, as_json: bool) -> int:
    for fault in checked.get("faults", ()):
        if fault["severity"] == "warning":
            print(f"warning: {fault['message']}", file=sys.stderr)
    if error := checked.get("error"):
        print(f"warning: it cannot be loaded now: {error['detail']}", file=sys.stderr)
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
        raise EditorError(f"there is a recipe '{model}' already", hint=hint)


def _id_of(client: Client, path: str) -> str:
    for model in client.get("v1", "studio", "models")["models"]:
        if model["path"] == path:
            return str(model["id"])
    return Path(path).stem.lower()


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if Path(path).exists() else path


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise BadRequestError(f"--set: expected NAME=VALUE, found '{text}'")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
