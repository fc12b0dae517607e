"""Models as transient systemd units. What needs rights is asked of llmstudio-launcher; the rest is only looked at.

Death is seen through a pidfd, some 2 ms after it happens; the journal is 150 to 300 ms late and only tells why.
"""

import asyncio
import contextlib
import os
import shlex
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from pathlib import Path

from llmstudiod.adapters.proc import pulse
from llmstudiod.core.errors import LauncherError
from llmstudiod.core.launch import LaunchRequest
from llmstudiod.core.launcher_protocol import Act, Verb
from llmstudiod.core.unit import PREFIX, inside_socket_path, unit_name
from llmstudiod.launchers.base import Exit, FoundUnit, Unit
from llmstudiod.launchers.journal import Journal
from llmstudiod.launchers.log_buffer import cut
from llmstudiod.launchers.privileged import PrivilegedHelper, launch

COMMAND_TIMEOUT_S = 45.0
SETTLE_S = 0.05
RETRY_S = 0.5
ASK_AGAIN_S = (0.1, 0.3, 1.0, 2.0)  # systemd executes itself anew in less
JOURNAL_LAG_S = 0.35
LAST_LINES = 50
LATE_JOURNAL_S = 3.0
EARLIER_ENTRIES = 1000  # a load writes some fifty, and what a running model says of late is a few
_SHOWN = "LoadState,ActiveState,SubState,Result,MainPID,InvocationID,ExecMainCode,ExecMainStatus,ExecMainPID"
_INTERRUPTED = ("D-Bus connection terminated", "Failed to connect to", "Connection reset by peer", "Transport endpoint")
_CLD_EXITED = "1"
_NOT_SET = (1 << 64) - 1  # systemd counts nothing
_UNIT_FAILED = "d9b373ed55a64feb8242e02dbe79a49c"  # sd-messages.h, SD_MESSAGE_UNIT_FAILURE_RESULT
_EXIT_EXEC = "203"  # systemd.exec(5), "Process Exit Codes"


def is_usable(launcher_socket: str) -> str | None:
    """Return why transient units cannot be used here, or None when they can."""
    if not Path("/run/systemd/system").is_dir():
        return "systemd is not PID 1 here"
    if not Path(launcher_socket).is_socket():
        return f"there is no launcher at {launcher_socket} (systemctl start llmstudio-launcher.socket)"
    return None


class SystemdLauncher:
    """See `llmstudiod.launchers.base.Launcher`."""

    name = "systemd"
    is_sandboxed = True
    outlives_us = True

    def __init__(self, helper: PrivilegedHelper) -> None:
        self._helper = helper
        self._journal = Journal()

    def socket_path(self, model_id: str) -> str:
        """Return the socket in the unit's own runtime directory."""
        return inside_socket_path(model_id)

    async def show(self, request: LaunchRequest) -> list[str] | None:
        """Return the systemd-run command line with which the launcher would start the unit."""
        answer = await self._helper.ask(launch(Verb.SHOW, request))
        command: list[str] = answer["command"]
        return command

    async def start(self, request: LaunchRequest) -> Unit:
        """Start the unit; a failed one of the same name is cleared away first."""
        name = unit_name(request.model_id)
        self._journal.start()
        try:
            await self._start_unit(request)
        except LauncherError as error:
            lines = [line.strip() for line in error.message.splitlines() if line.strip()]
            lines = lines or await _failed_start(name, request.argv[0])
            raise LauncherError(
                f"cannot start {name}: {lines[0]}",
                hint=error.hint or f"`systemctl status {name}` and its journal tell more",
                details={"lines": lines[:5]},
            ) from error
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S):
                shown = await _answered(name)
        except TimeoutError:
            raise LauncherError(f"cannot start {name}: systemd does not tell its state") from None
        return Unit(request.model_id, name, int(shown["MainPID"]), shown["InvocationID"])

    async def _start_unit(self, request: LaunchRequest) -> None:
        """Have the unit started, once more where systemd itself was restarted meanwhile."""
        try:
            _ = await self._helper.ask(launch(Verb.START, request))
        except LauncherError as error:
            if not any(words in error.message for words in _INTERRUPTED):
                raise
            await asyncio.sleep(RETRY_S)
            _ = await self._helper.ask(launch(Verb.START, request))

    async def wait(self, unit: Unit) -> Exit:
        """Return when the unit's process has ended and systemd has settled its state."""
        try:
            return await self._end(unit)
        finally:
            self._journal.ended(unit.invocation_id)

    async def _end(self, unit: Unit) -> Exit:
        await _process_end(unit)
        shown = await _answered(unit.name)
        while shown["InvocationID"] == unit.invocation_id and shown["ActiveState"] in {"active", "deactivating"}:
            await asyncio.sleep(SETTLE_S)
            shown = await _answered(unit.name)
        await asyncio.sleep(JOURNAL_LAG_S)
        if shown["InvocationID"] == unit.invocation_id and shown["ActiveState"] == "failed":
            return await _exit(unit.name, shown, patience_s=LATE_JOURNAL_S)
        lines = await _run_journal(unit, limit=LAST_LINES)
        return Exit("success", code=0, lines=tuple(lines))  # a unit that ended cleanly is gone at once

    async def stop(self, model_id: str, *, is_forced: bool) -> None:
        """Stop the unit: SIGTERM, ten seconds, SIGKILL, as its properties say."""
        name = unit_name(model_id)
        try:
            _ = await self._helper.ask(Act(Verb.KILL if is_forced else Verb.STOP, model_id))
        except LauncherError as error:
            hint = f"try `systemctl stop {name}` by hand"
            raise LauncherError(f"cannot stop {name}: {error.message}", hint=hint) from error

    async def lines(self, model_id: str, *, limit: int) -> list[str]:
        """Return the last lines of the unit's journal, of earlier runs too.

        Raises:
            LauncherError: The journal cannot be read.
        """
        code, output = await _run(_journalctl(f"_SYSTEMD_UNIT={unit_name(model_id)}", limit=limit))
        if code:
            raise _unreadable(output)
        return output.splitlines()

    async def first_lines(self, unit: Unit, *, limit: int) -> list[str]:
        """Return the first lines of the unit's journal since it was started."""
        lines: list[str] = []
        printed = _printed("journalctl", "-q", "-o", "cat", "--all", *_run_matches(unit))
        # Out of descriptors or time: what is there may be enough.
        with contextlib.suppress(OSError, LauncherError):
            async with asyncio.timeout(COMMAND_TIMEOUT_S), contextlib.aclosing(printed):
                async for line in printed:
                    lines.append(cut(line))
                    if len(lines) == limit:
                        break
        return lines

    def told(self, unit: Unit) -> list[str]:
        """Return what the journal's follower has brought of a run."""
        return self._journal.lines(unit.invocation_id)

    def n_told(self, unit: Unit) -> int:
        """Return how many lines the journal's follower has brought of a run."""
        return self._journal.count(unit.invocation_id)

    async def follow(self, model_id: str, *, limit: int) -> AsyncIterator[str]:
        """Yield the journal's last lines, then new ones as they come, some 200 ms late.

        Raises:
            LauncherError: The journal cannot be read, or not any more.
        """
        printed = _printed(*_journalctl(f"_SYSTEMD_UNIT={unit_name(model_id)}", limit=limit), "--follow")
        async with contextlib.aclosing(printed):
            async for line in printed:
                yield line
        raise _unreadable("journalctl ended")

    async def memory(self, unit: Unit) -> int | None:
        """Return what systemd counts for the unit; where the machine has no memory controller, what /proc tells."""
        _, output = await _run(["systemctl", "show", "--property=MemoryCurrent", "--value", unit.name])
        value = int(output) if output.strip().isdecimal() else _NOT_SET
        return pulse(unit.pid).resident if value == _NOT_SET else value

    async def find_running(self) -> list[FoundUnit]:
        """Return the units that run, with what they say of themselves in their environment."""
        # Only what is running: a unit that is just being stopped, or has failed, is cleared away by the next start.
        names = "--property=Id,ActiveState,MainPID,InvocationID,Environment"
        code, output = await _run(question := ["systemctl", "show", names, f"{PREFIX}*.service"])
        for pause_s in ASK_AGAIN_S:
            if code:
                await asyncio.sleep(pause_s)
                code, output = await _run(question)
        if code:
            raise LauncherError(f"systemd does not tell which models run: {output.strip()}")
        found = [unit for block in output.split("\n\n") if (unit := _found(block)) is not None]
        if found:
            self._journal.start(n_before=EARLIER_ENTRIES)
        return found

    async def find_failed(self) -> list[tuple[str, Exit]]:
        """Return the units that systemd keeps as failed, with the last lines of each."""
        names = f"Id,ActiveState,Environment,{_SHOWN}"
        code, output = await _run(["systemctl", "show", f"--property={names}", f"{PREFIX}*.service"])
        blocks = [_properties(block) for block in output.split("\n\n")] if not code else []
        failed = [shown for shown in blocks if shown["ActiveState"] == "failed"]
        return [(shown["Id"][len(PREFIX) : -len(".service")], await _exit(shown["Id"], shown)) for shown in failed]

    async def close(self) -> None:
        """Give up the way to the launcher; units belong to systemd."""
        self._helper.close()
        await self._journal.close()


async def _printed(*argv: str) -> AsyncGenerator[str]:
    """Yield the lines that journalctl prints, until it or whoever reads has enough.

    Raises:
        LauncherError: It cannot be run, or fails.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            limit=1 << 20,
        )  # fmt: skip
    except OSError as error:
        raise _unreadable(f"cannot run {argv[0]}: {error.strerror}") from error
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:  # longer than any line may be: what is left of it comes next
                continue
            if not line:
                break
            yield line.decode(errors="replace").rstrip("\n")
        told = (await process.stderr.read()).decode(errors="replace")
        if await process.wait():
            raise _unreadable(told)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _run(argv: Sequence[str]) -> tuple[int, str]:
    """Run a command of systemd's; return its exit code and its output, or what it says of its failure."""
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:  # out of descriptors, processes or memory
        return 125, f"cannot run {argv[0]}: {error.strerror}"
    try:
        output, errors = await asyncio.wait_for(process.communicate(), COMMAND_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()
        return 124, f"{argv[0]} did not answer within {COMMAND_TIMEOUT_S:.0f} s"
    code = process.returncode or 0
    return code, (errors or output if code else output).decode(errors="replace")


def _found(block: str) -> FoundUnit | None:
    """Return the running unit that ``systemctl show`` describes in a block of lines."""
    shown = dict(line.partition("=")[::2] for line in block.splitlines())
    pid = int(shown.get("MainPID") or 0)
    if shown.get("ActiveState") != "active" or not pid:
        return None
    try:
        words = shlex.split(shown.get("Environment", ""))
    except ValueError:
        return None
    environment = dict(word.partition("=")[::2] for word in words)
    model, recipe_hash = environment.get("LLMSTUDIO_MODEL"), environment.get("LLMSTUDIO_RECIPE_HASH")
    if model is None or recipe_hash is None or shown["Id"] != unit_name(model):
        return None
    return FoundUnit(Unit(model, shown["Id"], pid, shown["InvocationID"]), recipe_hash)


async def _exit(name: str, shown: Mapping[str, str], *, patience_s: float = 0.0) -> Exit:
    """Return how a failed unit ended, with its last lines; a journald that is behind is waited for."""
    run = shown["InvocationID"]
    unit = Unit("", name, int(shown["ExecMainPID"] or 0), run)
    deadline = time.monotonic() + patience_s
    while not (lines := await _run_journal(unit, limit=LAST_LINES)) and time.monotonic() < deadline:
        is_complete = bool(await _journal(f"INVOCATION_ID={run}", f"MESSAGE_ID={_UNIT_FAILED}", "_PID=1", limit=1))
        await asyncio.sleep(SETTLE_S)  # what systemd says of the end may come before the process's own last words
        if is_complete:
            deadline = 0.0
    status = int(shown["ExecMainStatus"] or 0)
    if shown["ExecMainCode"] == _CLD_EXITED:
        return Exit(shown["Result"], code=status, lines=tuple(lines))
    return Exit(shown["Result"], signal=status, lines=tuple(lines))


async def _answered(name: str) -> dict[str, str]:
    """Return a unit's properties; ask until there is an answer, for systemd may be busy or just being upgraded.

    No answer is not "not loaded": taken for the end of the server, it would cut off everybody who is being served.
    """
    while (shown := await _show(name)) is None:  # noqa: ASYNC110 - systemd tells nobody when it can be asked again
        await asyncio.sleep(RETRY_S)
    return shown


async def _show(name: str) -> dict[str, str] | None:
    code, output = await _run(["systemctl", "show", f"--property={_SHOWN}", name])
    if code:
        return None
    return _properties(output)


def _properties(block: str) -> dict[str, str]:
    """Return what ``systemctl show`` tells of one unit; what it does not tell is empty."""
    shown = dict.fromkeys(_SHOWN.split(","), "") | {"MainPID": "0"}
    for line in block.splitlines():
        key, _, value = line.partition("=")
        shown[key] = value
    return shown


def _journalctl(*matches: str, limit: int) -> list[str]:
    return ["journalctl", "-q", "-o", "cat", "--all", "-n", str(limit), *matches]


async def _journal(*matches: str, limit: int) -> list[str]:
    """Return the last lines; none where the journal cannot be read, for it only explains what is known already."""
    code, output = await _run(_journalctl(*matches, limit=limit))
    return [] if code else output.splitlines()


def _unreadable(told: str) -> LauncherError:
    """Return the error that says why the journal cannot be read; journalctl's own words are no lines of a log."""
    lines = told.strip().splitlines() or ["journalctl failed"]
    hint = "llmstudiod.service needs `SupplementaryGroups=systemd-journal`" if "permission" in lines[0] else None
    return LauncherError(f"the journal cannot be read: {lines[0]}", hint=hint)


async def _run_journal(unit: Unit, *, limit: int) -> list[str]:
    """Return the last lines of one run, for as long as somebody may want to know how it ended."""
    return list(map(cut, await _journal(*_run_matches(unit), limit=limit)))


def _run_matches(unit: Unit) -> tuple[str, ...]:
    """Return what tells journalctl which lines are of a run.

    What journald reads only after the unit has failed bears no invocation id: systemd has taken the link away by then
    from which journald learns it. The process that wrote it is told all the same.
    """
    run = f"_SYSTEMD_INVOCATION_ID={unit.invocation_id}"
    return "--boot", run, "+", f"_SYSTEMD_UNIT={unit.name}", f"_PID={unit.pid}"


async def _process_end(unit: Unit) -> None:
    """Return when the unit's process has ended; it need not be our child."""
    try:
        pidfd = os.pidfd_open(unit.pid)
    except OSError:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        # The number may have gone to another process before it was opened: only now is it tied to ours.
        shown = await _answered(unit.name)
        if (shown["MainPID"], shown["InvocationID"]) == (str(unit.pid), unit.invocation_id):
            await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


async def _failed_start(name: str, program: str) -> list[str]:
    """Return why a unit was not executed, the cause first.

    systemd-run prints nothing when the sandbox or exec(2) fails: with Type=exec that is a failed job like any other.
    """
    await asyncio.sleep(JOURNAL_LAG_S)
    told = await _journal(f"UNIT={name}", limit=LAST_LINES)
    # What the child says before exec(2) has no invocation id: this run is what follows the last "Starting".
    began = max((index for index, line in enumerate(told) if line.startswith("Starting ")), default=0)
    lines = [line.removeprefix(f"{name}: ") for line in told[began:] if line.startswith(f"{name}: ")]
    if ((await _show(name)) or {}).get("ExecMainStatus") == _EXIT_EXEC:
        # At this step the sandbox hides journald from the child, so its own words are lost.
        lines.insert(0, f"'{program}' is not executable inside the unit (203/EXEC)")
    return lines or ["systemd-run gave no reason"]
