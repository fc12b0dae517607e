"""The shells' completions: every command and option of the parser, and the models' names, quickly or not at all."""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmstudiod.ctl import main as ctl
from llmstudiod.ctl import show

DIRECTORY = Path(__file__).parents[2] / "packaging" / "completions"
BASH = DIRECTORY / "llmstudioctl.bash"
ZSH = DIRECTORY / "_llmstudioctl"
FISH = DIRECTORY / "llmstudioctl.fish"

MODELS = [
    {"id": "qwen3-32b", "name": "Qwen3 32B", "state": "ready"},
    {"id": "tiny.q4_k_m", "name": "id", "state": "stopped"},
]
KEYS = [{"name": "laptop", "admin": False, "models": ["id"]}, {"name": "ci", "admin": False, "models": None}]
# Whoever asks is noted, so that a test can see that nobody was.
STUB = """#!/bin/sh
echo "$*" >> "$0.asked"
[ -e "$0.hang" ] && exec sleep 60
[ -e "$0.fail" ] && { echo 'llmstudioctl: cannot reach the daemon' >&2; exit 8; }
case " $* " in *" key "*) cat "$0.keys" ;; *) cat "$0.json" ;; esac
"""


def options(parser: argparse.ArgumentParser) -> set[str]:
    """Return every spelling of the parser's options."""
    return {spelling for action in parser._actions for spelling in action.option_strings}


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of the commands; those of a command's own commands by both words."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                found[name] = inner
                found |= {f"{name} {word}": below for word, below in commands(inner).items()}
    return found


PARSER = ctl._parser()
COMMANDS = commands(PARSER)


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """An llmstudioctl that lists two models and two keys."""
    program = tmp_path / "bin" / "llmstudioctl"
    program.parent.mkdir()
    program.write_text(STUB)
    program.chmod(0o755)
    Path(f"{program}.json").write_text(json.dumps(MODELS, indent=2) + "\n")
    Path(f"{program}.keys").write_text(json.dumps(KEYS, indent=2) + "\n")
    return program


@pytest.fixture
def admin_socket(tmp_path: Path) -> Iterator[Path]:
    """A Unix socket; nobody answers at it, since the stub does not ask."""
    path = tmp_path / "admin.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        yield path


def environment(stub: Path, admin_socket: Path | str) -> dict[str, str]:
    """Return an environment in which the shells find the stub and nothing of the machine's own."""
    return {
        "PATH": f"{stub.parent}:/usr/bin:/bin",
        "HOME": str(stub.parent),
        "XDG_CONFIG_HOME": str(stub.parent),
        "XDG_DATA_HOME": str(stub.parent),
        "LC_ALL": "C.UTF-8",
        "LLMSTUDIO_ADMIN_SOCKET": str(admin_socket),
    }


def run(argv: list[str], env: dict[str, str], cwd: Path) -> list[str]:
    """Return the lines that a shell prints; a word on stderr is a failure."""
    done = subprocess.run(argv, env=env, cwd=cwd, check=False, capture_output=True, text=True, timeout=30)
    assert done.stderr == ""
    return done.stdout.splitlines()


def in_bash(words: list[str], stub: Path, admin_socket: Path | str) -> list[str]:
    """Return what bash offers for the last word."""
    script = (
        f'source {BASH}; COMP_WORDS=(llmstudioctl "$@"); COMP_CWORD=$#; _llmstudioctl; '
        '((${#COMPREPLY[@]})) && printf "%s\\n" "${COMPREPLY[@]}"; true'
    )
    argv = ["bash", "--norc", "--noprofile", "-c", script, "bash", *words]
    return sorted(run(argv, environment(stub, admin_socket), stub.parent))


def asked(stub: Path) -> list[str]:
    """Return the arguments with which the stub was run."""
    path = Path(f"{stub}.asked")
    return path.read_text().splitlines() if path.exists() else []


# Every command and option, in every shell


@pytest.mark.parametrize("path", [BASH, ZSH, FISH], ids=["bash", "zsh", "fish"])
def test_every_command_and_option_is_there(path: Path) -> None:
    """What the parser knows can be completed."""
    text = path.read_text()
    for name in COMMANDS:
        for word in name.split():
            assert re.search(rf"(?<![\w-]){word}(?![\w-])", text), name
    for option in options(PARSER).union(*map(options, COMMANDS.values())):
        if path is FISH:
            long = option.startswith("--")
            assert re.search(rf" -{'l' if long else 's'} {option.lstrip('-')}(?![\w-])", text), option
        elif option != "-h" or path is not BASH:  # one of two spellings is enough where space is short
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), option


def test_bash_offers_the_commands_and_no_others(stub: Path, admin_socket: Path) -> None:
    """A command that is gone must not be offered."""
    names = sorted(name for name in COMMANDS if " " not in name)
    assert in_bash([""], stub, admin_socket) == names
    assert in_bash(["--json", ""], stub, admin_socket) == names
    assert in_bash(["--socket", str(admin_socket), "lo"], stub, admin_socket) == ["load", "logs"]
    assert asked(stub) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_bash_offers_the_options_and_no_others(name: str, stub: Path, admin_socket: Path) -> None:
    """Each command has its own options, and those that every command has."""
    assert {*in_bash([*name.split(), "-"], stub, admin_socket), "-h"} == options(COMMANDS[name])
    assert {*in_bash(["-"], stub, admin_socket), "-h"} == options(PARSER)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (ZSH, r"^        ['\"]([a-z]+):"),
        (FISH, r"-n __llmstudioctl_command -a ([a-z]+)"),
    ],
    ids=["zsh", "fish"],
)
def test_zsh_and_fish_list_the_commands_and_no_others(text: Path, pattern: str) -> None:
    """Their lists are those of the parser, in its order, with its words."""
    found = re.findall(pattern, text.read_text(), re.MULTILINE)
    assert found == [name for name in COMMANDS if " " not in name]
    for parser in (PARSER, COMMANDS["key"]):
        helped = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        for choice in helped._choices_actions:
            assert str(choice.help) in text.read_text()


def test_zsh_knows_what_follows_each_command() -> None:
    """Its options, at least those that every command has."""
    branches = re.findall(r"^        ([a-z -]+(?: \| [a-z-]+)*)\)$", ZSH.read_text(), re.MULTILINE)
    told = {word for branch in branches for word in branch.split(" | ")}
    assert {word for name in COMMANDS for word in name.split()} - told == set()


# Models and files, in a real bash


@pytest.mark.parametrize("command", ["status", "load", "unload", "logs", "explain"])
def test_bash_completes_models(command: str, stub: Path, admin_socket: Path) -> None:
    """By what the running daemon lists, once, and no second one."""
    assert in_bash([command, ""], stub, admin_socket) == ["qwen3-32b", "tiny.q4_k_m"]
    assert in_bash([command, "--json", "q"], stub, admin_socket) == ["qwen3-32b"]
    assert in_bash([command, "qwen3-32b", ""], stub, admin_socket) == []
    assert asked(stub) == [f"--socket {admin_socket} list --json"] * 2


def test_bash_asks_at_the_socket_that_is_named(stub: Path, admin_socket: Path) -> None:
    """``--socket`` in any form, before or after the command, wins over the environment."""
    for words in (
        ["--socket", str(admin_socket), "load", ""],
        ["load", "--socket", str(admin_socket), ""],
        ["load", "--socket", "=", str(admin_socket), ""],
    ):
        assert in_bash(words, stub, "/nowhere") == ["qwen3-32b", "tiny.q4_k_m"], words
    assert in_bash(["load", "--socket", "/nowhere", ""], stub, admin_socket) == []


def test_bash_completes_keys(stub: Path, admin_socket: Path) -> None:
    """The commands of `key`, the names of keys, and models where a key is made for some."""
    assert in_bash(["key", ""], stub, admin_socket) == sorted(
        name.split()[1] for name in COMMANDS if name.startswith("key ")
    )
    assert in_bash(["recipe", ""], stub, admin_socket) == sorted(
        name.split()[1] for name in COMMANDS if name.startswith("recipe ")
    )
    assert in_bash(["key", "--json", "re"], stub, admin_socket) == ["revoke"]
    assert asked(stub) == []
    assert in_bash(["key", "revoke", ""], stub, admin_socket) == ["ci", "laptop"]
    assert in_bash(["key", "revoke", "ci", ""], stub, admin_socket) == []
    assert asked(stub) == [f"--socket {admin_socket} key list --json"]
    assert in_bash(["key", "add", ""], stub, admin_socket) == []
    assert in_bash(["key", "add", "--models", "t"], stub, admin_socket) == ["tiny.q4_k_m"]
    assert in_bash(["key", "add", "--models", "=", "x,q"], stub, admin_socket) == ["x,qwen3-32b"]
    assert in_bash(["key", "add", "--expires", ""], stub, admin_socket) == []
    assert in_bash(["key", "list", ""], stub, admin_socket) == []
    assert in_bash(["recipe", "edit", "q"], stub, admin_socket) == ["qwen3-32b"]


def test_bash_completes_files(stub: Path, admin_socket: Path) -> None:
    """For ``check``, as many as wanted, and for the socket."""
    (stub.parent / "a recipe.yaml").touch()
    assert in_bash(["check", "a"], stub, admin_socket) == ["a recipe.yaml"]
    assert in_bash(["check", "a recipe.yaml", "a"], stub, admin_socket) == ["a recipe.yaml"]
    assert in_bash(["--socket", "a"], stub, admin_socket) == ["a recipe.yaml"]
    assert in_bash(["--socket", "=", "a"], stub, admin_socket) == ["a recipe.yaml"]
    assert in_bash(["logs", "-n", ""], stub, admin_socket) == []
    assert in_bash(["logs", "-n", "5", "t"], stub, admin_socket) == ["tiny.q4_k_m"]
    assert in_bash(["list", ""], stub, admin_socket) == []
    assert in_bash(["nonsense", ""], stub, admin_socket) == []


def test_bash_is_silent_when_the_daemon_is_down(stub: Path, admin_socket: Path) -> None:
    """No socket: nothing is run. A daemon that fails: no names, no words."""
    assert in_bash(["load", ""], stub, stub.parent / "no.sock") == []
    assert asked(stub) == []
    Path(f"{stub}.fail").touch()
    assert in_bash(["load", ""], stub, admin_socket) == []


def test_bash_does_not_wait_for_a_daemon_that_hangs(stub: Path, admin_socket: Path) -> None:
    """Two seconds, then no names."""
    Path(f"{stub}.hang").touch()
    assert in_bash(["load", ""], stub, admin_socket) == []


def test_list_is_printed_as_the_completions_read_it(capsys: pytest.CaptureFixture[str]) -> None:
    """They read the ids with sed, a key a line: what prints them must go on doing so."""
    for field, listed in (("id", MODELS), ("name", KEYS)):
        _ = show.print_json(listed)
        printed = capsys.readouterr().out
        found = re.findall(rf'^    "{field}": "([^"]*)",?$', printed, re.MULTILINE)
        assert found == [str(item[field]) for item in listed]


# The other shells, where they are installed


def test_zsh_can_read_its_file() -> None:
    """No error of syntax."""
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    assert run(["zsh", "-n", str(ZSH)], dict(os.environ), DIRECTORY) == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", [name for name in COMMANDS if " " not in name]),
        ("load ", ["qwen3-32b", "tiny.q4_k_m"]),
        ("logs -n 5 q", ["qwen3-32b"]),
        ("unload --f", ["--force"]),
        ("list ", []),
        ("key ", [name.split()[1] for name in COMMANDS if name.startswith("key ")]),
        ("recipe ", [name.split()[1] for name in COMMANDS if name.startswith("recipe ")]),
        ("recipe edit ", ["qwen3-32b", "tiny.q4_k_m"]),
        ("recipe new --e", ["--edit"]),
        ("key --json re", ["revoke"]),
        ("key revoke ", ["ci", "laptop"]),
        ("key add --models ", ["qwen3-32b", "tiny.q4_k_m"]),
        ("key add --ex", ["--expires"]),
        ("key list ", []),
        ("load --socket nowhere ", []),
        ("load --socket=nowhere ", []),
    ],
)
def test_fish_completes(line: str, expected: list[str], stub: Path, admin_socket: Path) -> None:
    """In a real fish."""
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    script = f"source {FISH}; complete -C 'llmstudioctl {line}'"
    argv = [shutil.which("fish") or "fish", "--no-config", "-c", script]
    offered = [text.partition("\t")[0] for text in run(argv, environment(stub, admin_socket), stub.parent)]
    assert sorted(offered) == sorted(expected)
