"""llmstudioctl's command line: what is wrong with it is told in words, and as JSON where that is asked for."""

import argparse
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from llmstudiod import __version__
from llmstudiod.ctl.client import AnswerError, Client
from llmstudiod.ctl.command_line import words_of
from llmstudiod.ctl.look import listing, version
from llmstudiod.ctl.main import main


def ended(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Return the exit code of a wrong command line, and what was printed."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    told = capsys.readouterr()
    return int(str(caught.value.code or 0)), told.out, told.err


@pytest.mark.parametrize(
    ("word", "meant"),
    [("stop", "unload"), ("ps", "list"), ("run", "load"), ("rm", "recipe delete"), ("stauts", "status"), ("zzz", None)],
)
def test_unknown_command_is_guessed(word: str, meant: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """By the words of other programs, or by its letters."""
    code, out, err = ended([word], capsys)
    assert (code, out) == (2, "")
    assert f"llmstudioctl: there is no command '{word}'\n" in err
    assert (f"did you mean {meant}?" in err) == (meant is not None)
    assert "choose from" not in err


def test_commands_of_a_group_are_guessed_among_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    """`recipe rm` means no command of the whole program."""
    assert "did you mean revoke?" in ended(["key", "revok"], capsys)[2]
    assert "did you mean" not in ended(["recipe", "ps"], capsys)[2]


@pytest.mark.parametrize("words", [["load", "--json"], ["--json", "stop"], ["logs", "a", "-n", "x", "--json"]])
def test_wrong_usage_as_json(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As every other error."""
    code, out, err = ended(words, capsys)
    assert code == 2
    assert json.loads(out)["kind"] == "bad_request"
    assert err.startswith("usage: llmstudioctl")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    """As people try them first."""
    assert ended(["--version"], capsys)[:2] == (0, f"llmstudioctl {__version__}\n")
    assert ended(["help"], capsys)[1] == ended(["--help"], capsys)[1]
    assert ended(["help", "load"], capsys)[1].startswith("usage: llmstudioctl load")
    for options in (["--socket", "/nowhere"], ["--socket=/nowhere", "--json"]):
        assert ended([*options, "help", "load"], capsys)[1].startswith("usage: llmstudioctl load")


def test_command_of_llama_server_is_not_ours_to_read() -> None:
    """Its options may be called as ours are."""
    assert words_of(["recipe", "from-command", "--id", "a", "--json", "-m", "x", "--json"]) == [
        *("recipe", "from-command", "--id", "a", "--json", "--", "-m", "x", "--json")
    ]
    assert words_of(["recipe", "from-command"]) == ["recipe", "from-command"]
    assert words_of(["recipe", "from-command", "--", "-m"]) == ["recipe", "from-command", "--", "-m"]
    assert words_of(["load", "from-command"]) == ["load", "from-command"]


def test_unload_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """An error like the others, with its kind."""
    assert main(["unload", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["kind"] == "bad_request"


def test_gguf_is_no_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And there is a command for it."""
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(20))
    assert main(["check", str(tmp_path / "a.gguf")]) == 3
    out = capsys.readouterr().out
    assert "found a GGUF" in out
    assert f"`llmstudioctl estimate {tmp_path / 'a.gguf'}`" in out


class Refused(Client):
    """A daemon that answers some questions, and refuses the others."""

    def get(self, *parts: str, query: str = "", timeout_s: float | None = None) -> Any:
        """Answer as one with open_status does to somebody who may look and no more."""
        if parts == ("status",) and self.socket_path == "open":
            return {"version": "1", "llama_server": {"error": "there is none"}, "instances": [], "faults": []}
        raise AnswerError(403, {"detail": "you may not", "kind": "access_denied"})

    def post(self, *parts: str, query: str = "", body: object = None, timeout_s: float | None = None) -> Any:
        """Answer as one without a port."""
        return {"code": "x", "urls": [], "expires_in_s": 1}


ARGUMENTS = argparse.Namespace(json=False, sign_out=False, no_open=True)


def test_empty_list_for_somebody_who_may_look(capsys: pytest.CaptureFixture[str]) -> None:
    """What the settings say is not theirs to know, and no reason to fail."""
    assert listing(Refused("open"), ARGUMENTS) == 0
    assert capsys.readouterr().out == "no models yet\n"


def test_version_tells_what_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    """No rights, no llama-server, no daemon are three things."""
    for path, expected in (("closed", "llmstudiod you may not ask"), ("open", "llama_server not found")):
        assert version(Refused(path), ARGUMENTS) == 0
        assert expected in capsys.readouterr().out
    assert version(Client("/nowhere"), ARGUMENTS) == 0
    assert "llmstudiod not reachable" in capsys.readouterr().out


def test_web_without_a_port(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Also as JSON."""
    monkeypatch.setattr("llmstudiod.ctl.main.Client", Refused)
    monkeypatch.setattr(Refused, "from_environment", lambda _: Refused("open"))
    assert main(["web", "--json"]) == 7
    assert json.loads(capsys.readouterr().out)["detail"] == "the endpoint has no port"


def test_socket_that_may_not_be_used(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is the caller's rights, not the daemon's absence."""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert main(["list"]) == 5
    assert "you may not use the admin socket" in capsys.readouterr().err
