"""A recipe in an editor: checked after each round, stored once it is good, and never lost where it is not."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llmstudiod.core.errors import ConfigError, LlmstudioError
from llmstudiod.ctl.client import Client

EDITORS = ("VISUAL", "EDITOR")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]")
_SHOWN_CHARS = 63  # as many as an id may have

Store = Callable[[str, dict[str, Any]], None]


class EditorError(LlmstudioError):
    """No editor can be run, or it failed."""

    exit_code = 1


def edit_recipe(
    client: Client, model: str, text: str, store: Store, *, may_stay: bool, is_trusted: bool, as_json: bool
) -> int:
    """Have a recipe edited until it is good, and stored by ``store``, which takes the text and what the check told.

    ``may_stay``: the text is stored already, so one that is not changed is left alone. ``is_trusted``: its file is the
    caller's own to write.

    Raises:
        EditorError: No editor can be run, or it failed.
        ConfigError: It has faults, and is not edited again.
    """
    query = (f"id={quote(model)}" if may_stay else "new=true") + ("&trusted=true" if is_trusted else "")
    with _draft(model, text) as file:
        while True:
            _run_editor(str(file))
            changed = read_text(file)
            if changed == text and may_stay:
                print("nothing was changed", file=sys.stderr)
                if as_json:
                    print(json.dumps({"success": True, "id": model, "changed": False}))
                return 0
            checked = client.post_text("recipes", "check", text=changed, query=query)
            tell_faults(checked["faults"])
            if checked["ok"]:
                store(changed, checked)
                file.unlink()
                return 0
            if as_json or not _wants_again():
                raise ConfigError("the recipe was not stored", details={"faults": checked["faults"]})


def tell_faults(faults: list[dict[str, Any]]) -> None:
    """Print what is wrong with a text, on the standard error."""
    for fault in faults:
        place = f"line {fault['line']}: " if fault["line"] else ""
        word = "warning: " if fault["severity"] == "warning" else ""
        key = f"{fault['key']}: " if fault["key"] else ""
        print(f"{place}{word}{key}{fault['message']}", file=sys.stderr)
        if fault["hint"]:
            print(f"    hint: {fault['hint']}", file=sys.stderr)


def read_text(file: Path) -> str:
    """Return what a file says.

    Raises:
        EditorError: It cannot be read, or is no UTF-8.
    """
    try:
        return file.read_text("utf-8")
    except OSError as error:
        raise EditorError(f"'{file}' cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        found = f"0x{error.object[error.start]:02x} at byte {error.start}"
        raise EditorError(f"'{file}': expected text in UTF-8, found {found}") from error


def write_in_place(file: Path, text: str) -> None:
    """Replace a file at once, with its owner and mode.

    Where the directory or another owner does not let that happen, the file itself is written, by whoever may.

    Raises:
        EditorError: It cannot be written.
    """
    try:
        try:
            _replace(file, text)
        except PermissionError:
            file.write_text(text, "utf-8")
    except OSError as error:
        raise EditorError(f"'{file}' cannot be written: {error.strerror}") from error


def _replace(file: Path, text: str) -> None:
    there = file.stat()
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        fresh.write_text(text, "utf-8")
        fresh.chmod(there.st_mode & 0o7777)
        os.chown(fresh, there.st_uid, there.st_gid)
        fresh.replace(file)
    finally:
        fresh.unlink(missing_ok=True)


@contextlib.contextmanager
def _draft(model: str, text: str) -> Iterator[Path]:
    """Return a file with the text; what was made of it and not stored stays, and it is said where."""
    shown = _NOT_IN_NAMES.sub("-", model)[:_SHOWN_CHARS]  # an id that is none is for the check to refuse
    descriptor, name = tempfile.mkstemp(prefix="llmstudio-", suffix=f".{shown}.yaml")
    file = Path(name)
    with open(descriptor, "w", encoding="utf-8") as stream:  # noqa: PTH123 - it is a descriptor
        stream.write(text)
    try:
        yield file
    finally:
        if file.exists():
            if file.read_text("utf-8", "replace") == text:
                file.unlink()
            else:
                print(f"what you wrote is kept in {file}", file=sys.stderr)


def _wants_again() -> bool:
    if not sys.stdin.isatty():
        return False
    try:
        return input("edit again? [Y/n] ").strip().lower() not in {"n", "no"}
    except EOFError:
        print(file=sys.stderr)
        return False


def _run_editor(path: str) -> None:
    chosen = next((os.environ[name] for name in EDITORS if os.environ.get(name)), None)
    words = shlex.split(chosen) if chosen else ["sensible-editor"]
    for argv in ([*words, path], ["nano", path], ["vi", path]):
        try:
            code = subprocess.run(argv, check=False).returncode
        except OSError as error:
            if chosen and isinstance(error, FileNotFoundError):
                raise EditorError(f"the editor '{chosen}' cannot be found", hint="set VISUAL or EDITOR") from None
            if chosen:
                raise EditorError(
                    f"the editor '{chosen}' cannot be run: {error.strerror}", hint="set VISUAL or EDITOR"
                ) from None
            continue
        if code:
            raise EditorError(f"the editor ended with {code}: nothing was stored")
        return
    raise EditorError("there is no editor", hint="set VISUAL or EDITOR")
