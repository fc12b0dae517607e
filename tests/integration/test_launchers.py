"""One suite for every launcher: what the supervisor relies on, tried with real processes.

`tests/system/test_launchers.py` runs this very file in a booted host with LLMSTUDIO_TEST_LAUNCHER=systemd.
So it uses nothing of this tree but the package, and its payloads are found on any Debian.
"""

import asyncio
import os
import secrets
import shlex
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from llmstudiod.core.errors import LauncherError
from llmstudiod.core.launch import LaunchRequest
from llmstudiod.core.launcher_protocol import Act, Launch, Request, Verb
from llmstudiod.launchers.base import Exit, FoundUnit, Launcher, Unit
from llmstudiod.launchers.subprocess import SubprocessLauncher
from llmstudiod.launchers.systemd import SystemdLauncher
from llmstudiod.privileged.units import start_unit, stop_unit

KIND = os.environ.get("LLMSTUDIO_TEST_LAUNCHER", "subprocess")
T = TypeVar("T")
GRACE_S = 2.0  # how long a polite server may take here; the units' own ten seconds would only cost time
FOR_EVER = "while :; do sleep 0.05; done"
PYTHON = shlex.quote(sys.executable)
LISTEN = f"""exec {PYTHON} -c '
import os, socket, time
server = socket.socket(socket.AF_UNIX)
server.bind(os.environ["LLMSTUDIO_TEST_SOCKET"])
print("listening", flush=True)
time.sleep(1000)
'"""


@dataclass(frozen=True, slots=True)
class AsRoot:
    """In the place of llmstudio-launcher: what it does once it knows what to start, which here is no llama-server."""

    requests: dict[str, LaunchRequest]

    def wake(self) -> None:
        """Sleep never."""

    def close(self) -> None:
        """Hold nothing."""

    async def ask(self, request: Request) -> dict[str, Any]:
        """Start or stop a unit."""
        match request:
            case Launch(verb=Verb.START):
                await asyncio.to_thread(start_unit, self.requests[request.id])
            case Act(verb=Verb.STOP | Verb.KILL):
                await asyncio.to_thread(stop_unit, request.id, is_forced=request.verb is Verb.KILL)
            case _:
                raise NotImplementedError(request)
        return {}


@dataclass(frozen=True, slots=True)
class Rig:
    """A launcher and one model of its own: the journal keeps what the last test's model has said."""

    launcher: Launcher
    model: str
    helper: AsRoot | None = None

    @property
    def socket_path(self) -> Path:
        """Where the server listens."""
        return Path(self.launcher.socket_path(self.model))

    def request(self, *argv: str) -> LaunchRequest:
        """What starts a program as if it were the model's server."""
        request = LaunchRequest(
            model_id=self.model,
            recipe_hash="sha256:0",
            recipe_file=None,
            argv=argv,
            environment={"LLMSTUDIO_TEST_SOCKET": str(self.socket_path)},
            socket_path=str(self.socket_path),
            limits={"TimeoutStopSec": f"{GRACE_S}s"},
        )
        if isinstance(self.helper, AsRoot):
            self.helper.requests[self.model] = request
        return request

    async def start(self, script: str) -> Unit:
        """Start a shell script."""
        # Not /usr/bin/sh: whatever lies there may execute nothing but itself (`unit._executable_paths`).
        return await self.launcher.start(self.request("/bin/sh", "-c", script))

    async def wait(self, unit: Unit) -> Exit:
        """Return how the unit ended, which it must do soon."""
        return await asyncio.wait_for(self.launcher.wait(unit), 10)

    async def run_to_end(self, script: str) -> Exit:
        """Start a script that ends by itself, and return how it did."""
        return await self.wait(await self.start(script))

    async def stop(self, *, is_forced: bool = False) -> None:
        """Stop the server, which must not take long."""
        await asyncio.wait_for(self.launcher.stop(self.model, is_forced=is_forced), GRACE_S + 5)

    async def lines(self) -> list[str]:
        """Return the log so far."""
        return await self.launcher.lines(self.model, limit=100)

    async def line_with(self, word: str) -> str:
        """Return the first line of the log that has ``word``; the journal may be a moment late."""

        async def found() -> str | None:
            return next((line for line in await self.lines() if word in line), None)

        return await until(found)

    async def descendant(self) -> int:
        """Return the pid that the script wrote down for us."""
        return int((await self.line_with("descendant ")).rpartition(" ")[2])


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    """The launcher under test; what a test has left running is stopped."""
    helper = AsRoot({}) if KIND == "systemd" else None
    launcher: Launcher = (
        SystemdLauncher(helper) if helper else SubprocessLauncher(tmp_path / "run", term_grace_s=GRACE_S)
    )
    made = Rig(launcher, f"probe-{secrets.token_hex(3)}", helper)
    yield made
    await made.stop(is_forced=True)
    await launcher.close()


async def until(condition: Callable[[], Awaitable[T | None]], *, timeout_s: float = 10) -> T:
    """Poll: neither the end of a stranger's process nor a line of the journal can be awaited."""
    deadline = time.monotonic() + timeout_s
    while not (value := await condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)
    return value


async def azip(lines: AsyncIterator[str], numbers: range) -> AsyncIterator[tuple[str, int]]:
    """Yield as many lines as there are numbers."""
    for number in numbers:
        yield await anext(lines), number


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def all_gone(*pids: int) -> None:
    """Return when none of the processes runs any more."""

    async def gone() -> bool:
        return not any(is_alive(pid) for pid in pids)

    assert await until(gone)


# Starting


async def test_server_runs_when_start_returns(rig: Rig) -> None:
    """The pid that start() tells is alive and is the server's own, not a helper's."""
    unit = await rig.start(f"exec sleep 1000; {FOR_EVER}")
    assert unit.model_id == rig.model
    assert is_alive(unit.pid)

    async def is_sleeping() -> bool:
        return await asyncio.to_thread(Path(f"/proc/{unit.pid}/comm").read_text) == "sleep\n"

    assert await until(is_sleeping)


async def test_log_lines_come(rig: Rig) -> None:
    """What the server writes to either stream is in its log, in its order."""
    await rig.start(f"echo one; echo two >&2; echo three; {FOR_EVER}")
    await rig.line_with("three")
    lines = await rig.lines()
    assert [line for line in lines if line in {"one", "two", "three"}][-3:] == ["one", "two", "three"]


async def test_followed_lines_come_as_they_are_written(rig: Rig, tmp_path: Path) -> None:
    """A follower sees the lines that are written after it began."""
    await rig.start("n=0; while :; do n=$((n+1)); echo tick $n; sleep 0.05; done")
    async with asyncio.timeout(10):
        followed = rig.launcher.follow(rig.model, limit=0)
        seen = [await anext(followed) for _ in range(3)]
    numbers = [int(line.split()[1]) for line in seen]
    assert numbers == list(range(numbers[0], numbers[0] + 3))


async def test_follower_may_begin_with_what_was_written_before(rig: Rig) -> None:
    """The last lines come first, and none is lost between them and the new ones."""
    await rig.start("n=0; while :; do n=$((n+1)); echo tick $n; sleep 0.05; done")
    await rig.line_with("tick 3")
    async with asyncio.timeout(10):
        followed = rig.launcher.follow(rig.model, limit=2000)
        seen = [line async for line, _ in azip(followed, range(20)) if line.startswith("tick ")]
    numbers = [int(line.split()[1]) for line in seen]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) > 3


def silent_systemctl(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have three questions fail, as while systemd executes itself anew; return the file that counts those left."""
    left, stub = directory / "left", directory / "systemctl"
    left.write_text("xxx")
    stub.write_text(
        f"""#!/bin/sh
        [ "$1" = show ] && [ -s {left} ] && {{ printf '%s' "$(cat {left} | cut -c2-)" > {left}; exit 1; }}
        exec /usr/bin/systemctl "$@"
        """
    )
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return left


@pytest.mark.skipif(KIND != "systemd", reason="only units have names that others may take")
async def test_running_units_are_found_though_systemd_is_busy(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that took no answer for none running would start them anew."""
    unit = await rig.start(FOR_EVER)
    silent_systemctl(tmp_path, monkeypatch)
    assert unit in [found.unit for found in await rig.launcher.find_running()]


@pytest.mark.skipif(KIND != "systemd", reason="only units have names that others may take")
async def test_systemctl_that_gives_no_answer_is_asked_again(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No answer is not the end of the server: it is being used."""
    unit = await rig.start(FOR_EVER)
    left = silent_systemctl(tmp_path, monkeypatch)
    waiting = asyncio.ensure_future(rig.launcher.wait(unit))  # noqa: TID251 - awaited below
    await until(lambda: asyncio.sleep(0, not left.read_text()))
    await asyncio.sleep(1)
    assert not waiting.done()
    os.kill(unit.pid, signal.SIGKILL)
    assert (await asyncio.wait_for(waiting, 10)).signal == signal.SIGKILL


async def test_missing_binary_is_told_at_once(rig: Rig) -> None:
    """A program that is not there fails the start itself, by its name."""
    with pytest.raises(LauncherError, match=r"no-such-server|No such file"):
        await rig.launcher.start(rig.request("/usr/local/bin/no-such-server", "-m", "x"))


async def test_file_that_cannot_be_executed_is_told_at_once(rig: Rig) -> None:
    """So does a file that is no program."""
    with pytest.raises(LauncherError, match=r"(?i)permission denied|not executable"):
        await rig.launcher.start(rig.request("/etc/passwd"))


async def test_name_is_free_after_a_failed_start(rig: Rig) -> None:
    """A start that failed leaves nothing in the way of the next one."""
    with pytest.raises(LauncherError):
        await rig.launcher.start(rig.request("/etc/passwd"))
    assert await rig.run_to_end("exit 0") == Exit("success", code=0)


async def test_stale_socket_is_no_obstacle(rig: Rig) -> None:
    """A server that was killed leaves its socket's file; the next one can listen all the same."""
    for _ in range(2):
        unit = await rig.start(LISTEN)
        async with asyncio.timeout(10):
            while not rig.socket_path.is_socket():
                assert is_alive(unit.pid), await rig.lines()
                await asyncio.sleep(0.02)
        os.kill(unit.pid, signal.SIGKILL)
        await rig.wait(unit)


# Ending


@pytest.mark.parametrize(
    ("script", "result", "code", "number"),
    [
        ("exit 0", "success", 0, None),
        ("exit 3", "exit-code", 3, None),
        ("exit 137", "exit-code", 137, None),
        ("kill -SEGV $$; sleep 10", "signal", None, signal.SIGSEGV),
        ("kill -KILL $$; sleep 10", "signal", None, signal.SIGKILL),
        ("kill -ABRT $$; sleep 10", "signal", None, signal.SIGABRT),
    ],
)
async def test_end_is_told(rig: Rig, script: str, result: str, code: int | None, number: int | None) -> None:
    """wait() tells code or signal, in systemd's words."""
    end = await rig.run_to_end(script)
    assert (end.result, end.code, end.signal) == (result, code, number)


async def test_kill_by_hand_is_seen_at_once(rig: Rig) -> None:
    """An end that nobody asked for is known within a second, with its signal."""
    unit = await rig.start(FOR_EVER)
    waiting = asyncio.gather(rig.wait(unit))
    await asyncio.sleep(0.1)  # so that it waits already
    os.kill(unit.pid, signal.SIGKILL)
    [end] = await asyncio.wait_for(waiting, 2)
    assert (end.result, end.signal) == ("signal", signal.SIGKILL)


async def test_last_words_come_with_the_end(rig: Rig) -> None:
    """The end carries the last lines, also the one that was written just before it, without a line end."""
    end = await rig.run_to_end("echo first; printf 'the telling line' >&2; exit 3")
    assert [line for line in end.lines if line in {"first", "the telling line"}] == ["first", "the telling line"]


async def test_last_lines_are_of_this_run(rig: Rig) -> None:
    """What the last run said does not explain this one; the log as a whole keeps both."""
    await rig.run_to_end("echo from the first run; exit 3")
    end = await rig.run_to_end("echo from the second run; exit 4")
    assert end.code == 4
    assert "from the second run" in end.lines
    assert "from the first run" not in end.lines
    assert await rig.line_with("from the first run")


@pytest.mark.skipif(KIND != "systemd", reason="only the journal can be late")
async def test_late_journal_costs_no_reason(rig: Rig) -> None:
    """What a busy journald reads only after the unit has failed, without the run's id, explains the end as well."""
    shown = await asyncio.create_subprocess_exec(
        "systemctl", "show", "--value", "--property=MainPID", "systemd-journald", stdout=asyncio.subprocess.PIPE
    )
    journald = int((await shown.communicate())[0])
    await rig.run_to_end("echo from the first run; exit 3")
    os.kill(journald, signal.SIGSTOP)
    resume = asyncio.get_running_loop().call_later(1.0, os.kill, journald, signal.SIGCONT)
    try:
        end = await rig.run_to_end("echo from the second run; exit 4")
    finally:
        resume.cancel()
        os.kill(journald, signal.SIGCONT)
    assert (end.code, [line for line in end.lines if "run" in line]) == (4, ["from the second run"])


async def test_restart_after_failure(rig: Rig) -> None:
    """After a failure the same model starts again, as another run."""
    first = await rig.start("exit 3")
    await rig.wait(first)
    second = await rig.start(FOR_EVER)
    assert second.invocation_id != first.invocation_id
    assert is_alive(second.pid)


async def test_flood_of_output_is_drained(rig: Rig) -> None:
    """A megabyte of log neither blocks the server nor costs the last line."""
    line = "x" * 99
    script = f"n=0; while [ $n -lt 10000 ]; do n=$((n+1)); echo {line}; done; echo the flood is over; exit 3"
    end = await rig.run_to_end(script)
    assert end.code == 3
    assert end.lines[-1] == "the flood is over" or "the flood is over" in end.lines


# Stopping


async def test_stop_ends_the_server(rig: Rig) -> None:
    """After stop() no process and no socket is left, and the name is free."""
    unit = await rig.start(LISTEN)
    await rig.line_with("listening")
    began = time.monotonic()
    await rig.stop()
    assert time.monotonic() - began < GRACE_S
    assert not is_alive(unit.pid)
    assert not rig.socket_path.exists()
    assert await rig.run_to_end("exit 0") == Exit("success", code=0)


async def test_stop_of_what_does_not_run_is_nothing(rig: Rig) -> None:
    """Stopping twice, or what never ran, does nothing."""
    await rig.stop()
    await rig.run_to_end("exit 3")
    await rig.stop()
    await rig.stop(is_forced=True)


async def test_polite_slow_exit_gets_its_grace(rig: Rig) -> None:
    """A server that cleans up after SIGTERM is left the time for it."""
    script = f"trap 'sleep 0.4; echo cleaned up; exit 0' TERM; echo started; {FOR_EVER}"
    unit = await rig.start(script)
    await rig.line_with("started")
    await rig.stop()
    assert not is_alive(unit.pid)
    assert await rig.line_with("cleaned up")


async def test_deaf_server_is_killed(rig: Rig) -> None:
    """One that ignores SIGTERM is killed when its time is up, and not before."""
    unit = await rig.start(f"trap '' TERM; echo started; {FOR_EVER}")
    await rig.line_with("started")
    began = time.monotonic()
    await rig.stop()
    assert time.monotonic() - began >= GRACE_S
    assert not is_alive(unit.pid)


async def test_forced_stop_does_not_wait(rig: Rig) -> None:
    """A forced stop grants no grace."""
    unit = await rig.start(f"trap '' TERM; echo started; {FOR_EVER}")
    await rig.line_with("started")
    began = time.monotonic()
    await rig.stop(is_forced=True)
    assert time.monotonic() - began < GRACE_S
    assert not is_alive(unit.pid)


async def test_wait_returns_when_somebody_stops_it(rig: Rig) -> None:
    """Who waits for the end is told of a stop, too."""
    unit = await rig.start(FOR_EVER)
    waiting = asyncio.gather(rig.wait(unit))
    await asyncio.sleep(0.1)  # so that it waits already
    await rig.stop()
    assert await asyncio.wait_for(waiting, 5)


# Descendants


HOLDS_THE_PIPE = "sleep 1000 & echo descendant $!;"
LEFT_THE_SESSION = "setsid sh -c 'sleep 1000 & echo descendant $!';"


@pytest.mark.parametrize("spawn", [HOLDS_THE_PIPE, LEFT_THE_SESSION])
async def test_descendant_does_not_hold_up_the_end(rig: Rig, spawn: str) -> None:
    """A descendant that holds the log's pipe open neither hides the end of the server nor outlives it."""
    unit = await rig.start(f"{spawn} sleep 0.3; exit 3")
    pid = await rig.descendant()
    end = await rig.wait(unit)
    assert end.code == 3
    await all_gone(pid)


@pytest.mark.parametrize("spawn", [HOLDS_THE_PIPE, LEFT_THE_SESSION])
async def test_descendant_is_gone_after_the_stop(rig: Rig, spawn: str) -> None:
    """When stop() returns, the descendants are gone as well, also one in a session of its own."""
    unit = await rig.start(f"{spawn} {FOR_EVER}")
    pid = await rig.descendant()
    assert is_alive(pid)
    await rig.stop()
    assert not is_alive(unit.pid)
    assert not is_alive(pid)


# The daemon's own end

DAEMON = """
import asyncio, sys
from pathlib import Path
from typing import Any, TypeVar
from llmstudiod.core.launch import LaunchRequest
from llmstudiod.core.launcher_protocol import Act, Launch, Request, Verb
from llmstudiod.launchers.subprocess import SubprocessLauncher

async def main():
    launcher = SubprocessLauncher(Path(sys.argv[1]))
    socket_path = launcher.socket_path("probe")
    argv = ("/bin/sh", "-c", sys.argv[2])
    unit = await launcher.start(LaunchRequest("probe", "sha256:0", None, argv, {}, socket_path))
    while not (lines := await launcher.lines("probe", limit=1)):
        await asyncio.sleep(0.02)
    print(unit.pid, lines[0].rpartition(" ")[2], flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


@pytest.mark.skipif(KIND != "subprocess", reason="a unit outlives the daemon, on purpose")
@pytest.mark.parametrize("spawn", [HOLDS_THE_PIPE, LEFT_THE_SESSION])
async def test_nothing_outlives_a_killed_daemon(tmp_path: Path, spawn: str) -> None:
    """A daemon that dies by SIGKILL takes its servers and their descendants with it, deaf ones too."""
    script = f"trap '' TERM; {spawn} {FOR_EVER}"
    daemon = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DAEMON, str(tmp_path / "run"), script, stdout=asyncio.subprocess.PIPE
    )
    assert daemon.stdout is not None
    async with asyncio.timeout(10):
        server, pid = [int(word) for word in (await daemon.stdout.readline()).split()]
    assert is_alive(server)
    assert is_alive(pid)
    daemon.kill()
    await daemon.wait()
    await all_gone(server, pid)


@pytest.mark.skipif(KIND != "systemd", reason="nothing outlives the daemon there")
async def test_units_of_an_earlier_daemon_are_found(rig: Rig) -> None:
    """A launcher that comes later finds what runs, with the recipe that it was started with, and not what failed."""
    await rig.wait(await rig.start("exit 3"))
    later = SystemdLauncher(AsRoot({}))
    assert rig.model not in [found.unit.model_id for found in await later.find_running()]
    unit = await rig.start(FOR_EVER)
    assert FoundUnit(unit, "sha256:0") in await later.find_running()
    watched = asyncio.ensure_future(later.wait(unit))  # noqa: TID251 - awaited below
    await rig.stop()
    assert (await asyncio.wait_for(watched, 10)).signal is None


@pytest.mark.skipif(KIND != "systemd", reason="only units have names that others may take")
async def test_end_is_that_of_the_unit_that_was_asked_for(rig: Rig) -> None:
    """wait() does not take another run of the same name for the one it was given."""
    first = await rig.start("exit 3")
    await rig.wait(first)
    await rig.start(FOR_EVER)
    end = await rig.wait(first)
    assert end.signal is None
