"""Models as transient systemd units, through ``systemd-run``.

Death is seen through a pidfd, some 2 ms after it happens; the journal is 150 to 300 ms late and only tells why.
"""

import asyncio
import grp
import os
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from llmstudiod.errors import LauncherError
from llmstudiod.launchers.base import Exit, LaunchRequest, Unit
from llmstudiod.launchers.unit import PREFIX, inside_socket_path, systemd_run_argv, unit_name

GROUP = "llmstudio-model"
COMMAND_TIMEOUT_S = 45.0
SETTLE_S = 0.05
RETRY_S = 0.5
JOURNAL_LAG_S = 0.35
LAST_LINES = 50
_SHOWN = "LoadState,ActiveState,SubState,Result,MainPID,InvocationID,ExecMainCode,ExecMainStatus"
_CLD_EXITED = "1"
_NOT_LOADED = 5  # systemctl(1), "Exit Status"
_EXIT_EXEC = "203"  # systemd.exec(5), "Process Exit Codes"


def is_usable() -> str | None:
    """Return why transient units cannot be used here, or None when they can."""
    if not Path("/run/systemd/system").is_dir():
        return "systemd is not PID 1 here"
    if os.geteuid() != 0:
        return "starting units needs root"
    if shutil.which("systemd-run") is None:
        return "systemd-run is not installed"
    return None


class SystemdLauncher:
    """See `llmstudiod.launchers.base.Launcher`."""

    name = "systemd"
    is_sandboxed = True

    def __init__(self) -> None:
        self._units: dict[str, Unit] = {}
        self._left: list[str] | None = None
        self._clean_up_lock = asyncio.Lock()

    def socket_path(self, model_id: str) -> str:
        """Return the socket in the unit's own runtime directory."""
        return inside_socket_path(model_id)

    async def start(self, request: LaunchRequest) -> Unit:
        """Start the unit; a failed one of the same name is cleared away first."""
        await self.clean_up()  # before our first unit, or it would be taken for a left one
        name = unit_name(request.model_id)
        argv = systemd_run_argv(request, group=_group())
        code, output = await _run(argv)
        if code and "already loaded" in output:
            await self._clear(name)
            code, output = await _run(argv)
        if code:
            lines = [line.strip() for line in output.splitlines() if line.strip()]
            lines = lines or await _failed_start(name, request.argv[0])
            raise LauncherError(
                f"cannot start {name}: {lines[0]}",
                hint=f"`systemctl status {name}` and its journal tell more",
                details={"lines": lines[:5]},
            )
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S):
                shown = await _answered(name)
        except TimeoutError:
            raise LauncherError(f"cannot start {name}: systemd does not tell its state") from None
        unit = Unit(request.model_id, name, int(shown["MainPID"]), shown["InvocationID"])
        self._units[request.model_id] = unit
        return unit

    async def wait(self, unit: Unit) -> Exit:
        """Return when the unit's process has ended and systemd has settled its state."""
        await _process_end(unit)
        shown = await _answered(unit.name)
        while shown["InvocationID"] == unit.invocation_id and shown["ActiveState"] in {"active", "deactivating"}:
            await asyncio.sleep(SETTLE_S)
            shown = await _answered(unit.name)
        if shown["InvocationID"] != unit.invocation_id or shown["ActiveState"] != "failed":
            return Exit("success", code=0)  # a unit that ended cleanly is gone at once
        await asyncio.sleep(JOURNAL_LAG_S)
        lines = await _journal(f"_SYSTEMD_INVOCATION_ID={unit.invocation_id}", limit=LAST_LINES)
        status = int(shown["ExecMainStatus"] or 0)
        if shown["ExecMainCode"] == _CLD_EXITED:
            return Exit(shown["Result"], code=status, lines=tuple(lines))
        return Exit(shown["Result"], signal=status, lines=tuple(lines))

    async def stop(self, model_id: str, *, is_forced: bool) -> None:
        """Stop the unit: SIGTERM, ten seconds, SIGKILL, as its properties say."""
        name = unit_name(model_id)
        if is_forced:
            await _run(["systemctl", "kill", "--signal=SIGKILL", name])
        complaint = await self._clear(name)
        if complaint is not None:
            raise LauncherError(f"cannot stop {name}: {complaint}", hint=f"try `systemctl stop {name}` by hand")
        self._units.pop(model_id, None)

    @staticmethod
    async def _clear(name: str) -> str | None:
        """Stop a unit and free its name; return what systemctl had against it."""
        # A unit is ordered before llmstudiod.service, so that at shutdown the daemon drains first. But then the stop of
        # the daemon would wait for us, and an ordered stop of the unit for the daemon's: this one must not wait.
        code, output = await _run(["systemctl", "stop", "--job-mode=ignore-dependencies", name])
        await _run(["systemctl", "reset-failed", name])
        return None if code in (0, _NOT_LOADED) else output.strip() or f"systemctl ended with {code}"

    async def lines(self, model_id: str, *, limit: int) -> list[str]:
        """Return the last lines of the unit's journal, of earlier runs too."""
        return await _journal(f"_SYSTEMD_UNIT={unit_name(model_id)}", limit=limit)

    async def follow(self, model_id: str, *, limit: int) -> AsyncIterator[str]:
        """Yield the journal's last lines, then new ones as they come, some 200 ms late."""
        process = await asyncio.create_subprocess_exec(
            "journalctl", "-q", "-f", "-n", str(limit), "-o", "cat", "--all", f"_SYSTEMD_UNIT={unit_name(model_id)}",
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            limit=1 << 20,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            while line := await process.stdout.readline():
                yield line.decode(errors="replace").rstrip("\n")
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def clean_up(self) -> list[str]:
        """Stop units that an earlier daemon left, once: nobody would watch or unload them."""
        async with self._clean_up_lock:
            if self._left is None:
                self._left = await self._stop_left()
            return self._left

    async def _stop_left(self) -> list[str]:
        _, output = await _run(["systemctl", "list-units", "--all", "--plain", "--no-legend", f"{PREFIX}*.service"])
        names = [line.split()[0] for line in output.splitlines() if line.split()]
        await asyncio.gather(*(self._clear(name) for name in names))
        return [name.removeprefix(PREFIX).removesuffix(".service") for name in names]

    async def close(self) -> None:
        """Units belong to systemd; there is nothing to give up."""


def _group() -> str | None:
    """Return the group of the models' sockets where the package has made it."""
    try:
        return grp.getgrnam(GROUP).gr_name
    except KeyError:
        return None  # with DynamicUser= systemd would silently invent one


async def _run(argv: Sequence[str]) -> tuple[int, str]:
    """Run a command of systemd's; return its exit code and what it printed."""
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as error:  # out of descriptors, processes or memory
        return 125, f"cannot run {argv[0]}: {error.strerror}"
    try:
        output, _ = await asyncio.wait_for(process.communicate(), COMMAND_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()
        return 124, f"{argv[0]} did not answer within {COMMAND_TIMEOUT_S:.0f} s"
    return process.returncode or 0, output.decode(errors="replace")


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
    shown = dict.fromkeys(_SHOWN.split(","), "") | {"MainPID": "0"}
    for line in output.splitlines():
        key, _, value = line.partition("=")
        shown[key] = value
    return shown


async def _journal(*matches: str, limit: int) -> list[str]:
    _, output = await _run(["journalctl", "-q", "-o", "cat", "--all", "-n", str(limit), *matches])
    return output.splitlines()


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
