"""Finding llama-server and asking it, with small programs in its place."""

import importlib.util
import os
import select
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llmstudiod.adapters.binary import check_argv, probe_binary
from llmstudiod.adapters.find_binary import find_binary
from llmstudiod.core.binary_answers import refuse_program
from llmstudiod.core.command import ServerBinary
from llmstudiod.core.errors import BinaryError
from tests.unit.fake_server import calls, write_program

HAS_ENGINE = importlib.util.find_spec("xllamacpp") is not None


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A program that behaves."""
    return write_program(tmp_path / "llama-server")


def test_setting_wins_then_variable_then_path(tmp_path: Path) -> None:
    """Where the binary comes from, in that order, and the source is named."""
    (tmp_path / "bin").mkdir()
    setting, variable, on_path = (str(write_program(tmp_path / name)) for name in ("a", "b", "bin/llama-server"))
    environment = {"LLAMA_SERVER_PATH": variable, "PATH": str(tmp_path / "bin")}
    assert find_binary(setting, environment) == ServerBinary((setting,), "llama_server")
    assert find_binary(None, environment) == ServerBinary((variable,), "LLAMA_SERVER_PATH")
    assert find_binary("", environment | {"LLAMA_SERVER_PATH": ""}) == ServerBinary((on_path,), "PATH")


def test_path_entry_that_is_relative_gives_an_absolute_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit that runs it has another working directory."""
    write_program(tmp_path / "llama-server")
    monkeypatch.chdir(tmp_path)
    assert find_binary(None, {"PATH": "."}).argv == (str(tmp_path / "llama-server"),)


@pytest.mark.skipif(not HAS_ENGINE, reason="the embedded engine is not installed")
def test_embedded_engine_is_the_last_resort() -> None:
    """Without any llama-server, the engine of the Python package serves."""
    found = find_binary(None, {"PATH": "/nonexistent"})
    assert found.is_engine
    assert found.argv[1:] == ("-m", "llmstudiod.engine")


@pytest.mark.skipif(HAS_ENGINE, reason="the embedded engine is installed")
def test_no_binary_at_all_says_what_to_install() -> None:
    """The hint names packages and the setting."""
    with pytest.raises(BinaryError, match="there is no llama-server") as caught:
        find_binary(None, {"PATH": "/nonexistent"})
    assert "apt install" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("path", "words", "hint"),
    [
        ("llama-server", "expected an absolute path, found 'llama-server'", "/usr/bin/llama-server"),
        ("{tmp}/no", "expected a program, found no file '{tmp}/no'", "set llama_server"),
        ("{tmp}", "expected a program, found no file '{tmp}'", "set llama_server"),
        (
            "{tmp}/a file",
            "expected a program, found '{tmp}/a file', which is not executable",
            "chmod +x '{tmp}/a file'",
        ),
    ],
)
@pytest.mark.parametrize("source", ["llama_server", "LLAMA_SERVER_PATH"])
def test_named_binary_that_will_not_do_is_told(path: str, words: str, hint: str, source: str, tmp_path: Path) -> None:
    """A binary that somebody named is never passed over for another one; the fault says who named it."""
    write_program(tmp_path / "a file", mode=0o644)
    path, words, hint = (text.format(tmp=tmp_path) for text in (path, words, hint))
    with pytest.raises(BinaryError) as caught:
        find_binary(*((path, {}) if source == "llama_server" else (None, {"LLAMA_SERVER_PATH": path})))
    assert caught.value.message == f"{source}: {words}"
    assert hint in str(caught.value.hint)


def test_script_is_refused_where_it_could_start_nothing() -> None:
    """The sandbox executes the program alone; without one a wrapper does."""
    found = ServerBinary(("/opt/wrapper.sh",), "llama_server")
    refuse_program(found, 0o755, b"#!", is_sandboxed=False)
    refuse_program(found, 0o755, b"\x7fE", is_sandboxed=True)
    with pytest.raises(BinaryError, match=r"found the script '/opt/wrapper.sh'") as caught:
        refuse_program(found, 0o755, b"#!", is_sandboxed=True)
    assert "name the program that it starts" in str(caught.value.hint)
    refuse_program(replace(found, is_engine=True), 0o755, b"#!", is_sandboxed=True)


async def test_binary_tells_version_flags_and_devices(program: Path) -> None:
    """One probe asks four questions and keeps the answers."""
    found = await probe_binary(ServerBinary((str(program),), "PATH"))
    assert found == ServerBinary(
        argv=(str(program),),
        source="PATH",
        version="11669 (abc)",
        known_flags=frozenset({"-m", "--model", "--n-gpu-layers", "--offline"}),
        devices=("CUDA0",),
        device_labels=("A",),
        device_bytes=(81000 << 20,),
    )
    assert sorted(calls(program)) == ["--completion-bash", "--help", "--list-devices", "--version"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            "echo starting; echo 'libcuda.so.1: cannot open' >&2; exit 127",
            "ended with exit code 127: libcuda.so.1: cannot",
        ),
        ("exit 3", "ended with exit code 3: it printed nothing"),
        ("kill -SEGV $$", "was killed by SIGSEGV: it printed nothing"),
    ],
)
async def test_binary_that_does_not_run_is_told(body: str, words: str, tmp_path: Path) -> None:
    """The command line, how it ended, and its last words."""
    program = write_program(tmp_path / "x", body)
    with pytest.raises(BinaryError) as caught:
        await probe_binary(ServerBinary((str(program),), "PATH"))
    assert caught.value.message.startswith(f"`{program} --version` {words}")
    assert caught.value.hint


async def test_file_of_another_format_is_told(tmp_path: Path) -> None:
    """A program of another machine cannot be executed at all."""
    program = tmp_path / "x"
    program.write_bytes(b"\x7fELF\0\0\0\0")
    program.chmod(0o755)
    with pytest.raises(BinaryError, match="Exec format error") as caught:
        await probe_binary(ServerBinary((str(program),), "PATH"))
    assert caught.value.hint


def has_ended(pid: int) -> bool:
    """Tell whether a process ends within seconds; one that init has not reaped yet has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], 5)[0])
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    "body",
    ["echo $$ >> {pids}; exec sleep 100", "sleep 100 & echo $! >> {pids}; exit 0"],
    ids=["hangs", "leaves a child with the pipe"],
)
async def test_binary_that_hangs_is_given_up_and_ended(body: str, tmp_path: Path) -> None:
    """A driver that hangs holds nobody up for ever, and nothing is left running."""
    program = write_program(tmp_path / "x", body.format(pids=tmp_path / "pids"))
    start = time.monotonic()
    with pytest.raises(BinaryError, match=r"did not end within 0\.5 s"):
        await probe_binary(ServerBinary((str(program),), "PATH"), timeout_s=0.5)
    assert time.monotonic() - start < 10
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 4
    assert all(has_ended(int(pid)) for pid in pids)


async def test_good_command_line_has_no_complaint(program: Path) -> None:
    """The parser is asked with all arguments and --version, so no model is read."""
    assert await check_argv([str(program), "-m", "/x"], {}) is None
    assert calls(program) == ["-m /x --version"]


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("echo noise; echo 'error: invalid argument: -x'; echo 'usage: …'; exit 1", "error: invalid argument: -x"),
        ("echo 'error while handling argument \"-c\": stoi'; exit 1", 'error while handling argument "-c": stoi'),
        ("echo 'terminate called'; exit 134", "terminate called"),
        ("exit 2", "it ended with exit code 2"),
        ("kill -ABRT $$", "it was killed by SIGABRT"),
    ],
)
async def test_complaint_is_the_telling_line(body: str, complaint: str, tmp_path: Path) -> None:
    """Of all that the parser prints, the line that says what is wrong."""
    assert await check_argv([str(write_program(tmp_path / "x", body))], {}) == complaint


async def test_environment_of_the_daemon_does_not_reach_the_binary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLAMA_ARG_* would change what is being checked; the recipe's own variables are there."""
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "7")
    program = write_program(tmp_path / "x", 'echo "error: $LLAMA_ARG_CTX_SIZE/$OWN"; exit 1')
    assert await check_argv([str(program)], {"OWN": "x"}) == "error: /x"
