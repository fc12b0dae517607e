"""Recipes in an editor: what is asked before it opens, and how a file is written where not all is allowed."""

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmstudiod.core.errors import AccessDeniedError
from llmstudiod.ctl import recipes
from llmstudiod.ctl.client import AnswerError, Client
from llmstudiod.ctl.editing import EditorError, write_in_place

NOBODY = 65534
TEXT = "id: a\nmodel_path: /elsewhere/a.gguf\n"


class _Daemon(Client):
    """A daemon with one recipe, whose model file lies where nothing over HTTP may; it notes what it is told."""

    is_by_hand = False
    told: tuple[str, ...] = ()

    def get(self, *parts: str, query: str = "", timeout_s: float | None = None) -> Any:
        """Return the recipe."""
        if parts != ("recipes", "a"):
            raise AnswerError(404, {"detail": "no such model", "kind": "model_not_found"})
        return {"id": "a", "file": "/nowhere/a.yaml"}

    def tagged_text(self, *parts: str) -> tuple[str, str | None]:
        """Return its file."""
        return TEXT, '"seen"'

    def post(self, *parts: str, query: str = "", body: object = None, timeout_s: float | None = None) -> Any:
        """Check values."""
        return {"yaml": TEXT}

    def post_text(self, *parts: str, text: str, query: str = "") -> Any:
        """Check a text; it is never stored."""
        assert (parts, query) == (("recipes", "check"), "id=a")
        fault = {"key": "model_path", "message": "lies outside", "hint": None, "severity": "fault", "line": 2}
        return {"ok": False, "faults": [fault], "by_hand": self.is_by_hand}


class _ByHand(_Daemon):
    """One whose recipe a person wrote."""

    is_by_hand = True


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the editor notes that it was opened."""
    program = tmp_path / "editor"
    program.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    program.chmod(0o755)
    monkeypatch.setenv("VISUAL", str(program))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path / "opened"


def test_editor_opens_for_a_recipe_with_faults(opened: Path) -> None:
    """They may have come with other settings; it is the editor where they are mended, and nothing is stored before."""
    arguments = argparse.Namespace(model="a", json=False)
    assert recipes.edit(_Daemon("/nowhere"), arguments) == 0
    assert opened.exists()


def test_editor_does_not_open_for_a_persons_file(opened: Path) -> None:
    """Whose change would be refused is told so at once, and what to do."""
    with pytest.raises(AccessDeniedError, match=r"'/nowhere/a\.yaml' was written by hand") as refused:
        recipes.edit(_ByHand("/nowhere"), argparse.Namespace(model="a", json=False))
    assert "as root" in str(refused.value.hint)
    assert not opened.exists()


def test_recipe_that_was_changed_meanwhile_is_not_written_over(
    opened: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the editor showed is what may be replaced; what was written stays, and the next step is told."""

    class Changed(_Daemon):
        def post_text(self, *parts: str, text: str, query: str = "") -> Any:
            return {"ok": True, "faults": [], "by_hand": False, "error": None}

        def put_text(self, *parts: str, text: str, tag: str | None) -> Any:
            assert (parts, text, tag) == (("recipes", "a"), TEXT + "priority: 5\n", '"seen"')
            raise AnswerError(412, {"detail": "it was changed meanwhile", "kind": "stale", "hint": "If-Match"})

    (tmp_path / "editor").write_text('#!/bin/sh\necho "priority: 5" >> "$1"\n')
    with pytest.raises(AnswerError, match="was changed meanwhile") as refused:
        recipes.edit(Changed("/nowhere"), argparse.Namespace(model="a", json=False))
    assert refused.value.hint == "`llmstudioctl recipe edit a` shows what it says now"
    kept = Path(capsys.readouterr().err.removeprefix("what you wrote is kept in ").strip())
    assert kept.read_text() == TEXT + "priority: 5\n"


@pytest.mark.parametrize("model", ["a/b", "x" * 300, "ü" * 200, "../a"])
def test_any_id_has_a_draft(opened: Path, model: str) -> None:
    """The check says what is wrong with an id, not the name of a file."""
    values = {"file": "/elsewhere/a.gguf", "id": model, "set": None, "edit": True, "force": False, "json": True}

    class New(_Daemon):
        def post_text(self, *parts: str, text: str, query: str = "") -> Any:
            return {"ok": True, "faults": [], "id": model, "error": None}

    assert recipes.new(New("/nowhere"), argparse.Namespace(**values)) == 0
    assert Path(opened.read_text().strip()).parent == opened.parent


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that others may enter, and root's file in it that everybody may write."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        file = Path(name, "a.yaml")
        file.write_text("a long text of before\n")
        file.chmod(0o666)
        yield file


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("mode", [0o755, 0o1777], ids=["directory", "owner"])
def test_file_that_cannot_be_replaced_is_overwritten(shared: Path, mode: int) -> None:
    """By whoever may write it, but not its directory, or does not own it; owner and mode stay."""
    shared.parent.chmod(mode)
    before = shared.stat()
    os.seteuid(NOBODY)
    try:
        write_in_place(shared, TEXT)
    finally:
        os.seteuid(0)
    assert shared.read_text() == TEXT
    assert (shared.stat().st_uid, shared.stat().st_mode) == (before.st_uid, before.st_mode)
    assert [path.name for path in shared.parent.iterdir()] == ["a.yaml"]


def test_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """In a sentence."""
    with pytest.raises(EditorError, match=r"gone\.yaml' cannot be written: No such file"):
        write_in_place(tmp_path / "gone" / "gone.yaml", TEXT)
