"""The follower of the journal: what it believes, and that its own end costs nothing."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from llmstudiod.core.errors import LauncherError
from llmstudiod.launchers.journal import MAX_ENDED, MAX_KNOWN, MAX_RUNS, Journal, message
from llmstudiod.launchers.log_buffer import MAX_BYTES, MAX_LINE_CHARS, MAX_LINES
from llmstudiod.launchers.privileged import PrivilegedClient
from llmstudiod.launchers.systemd import SystemdLauncher

UNIT = "llmstudio-model-a.service"
# Stands in for journalctl: prints what a file holds line by line, then ends or waits, as the file's name says.
FAKE = """\
#!/bin/sh
here=$(dirname "$0")
echo "$@" >> "$here/calls"
n=$(wc -l < "$here/calls")
cat "$here/say-$n" 2>/dev/null || exec sleep 1000
test -e "$here/stay-$n" && exec sleep 1000
exit 1
"""


def entry(text: object, number: int, *, unit: object = UNIT, run: object = "r1", **more: object) -> str:
    """Return one line of journalctl's JSON."""
    fields: dict[str, Any] = {"__CURSOR": f"c{number}", "MESSAGE": text, "_SYSTEMD_UNIT": unit}
    return json.dumps(fields | {"_SYSTEMD_INVOCATION_ID": run} | more)


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A directory with a journalctl of our own."""
    program = tmp_path / "journalctl"
    program.write_text(FAKE)
    program.chmod(0o755)
    return tmp_path


async def followed(
    fake: Path, *says: list[str], until: str, stays: bool = True, n_before: int = 0
) -> tuple[Journal, list[str]]:
    """Follow what each call says, until a line has come; return the journal and how journalctl was called."""
    for number, lines in enumerate(says, 1):
        (fake / f"say-{number}").write_text("".join(f"{line}\n" for line in lines))
    if stays:
        (fake / f"stay-{len(says)}").touch()
    journal = Journal((str(fake / "journalctl"),))
    journal.start(n_before=n_before)
    async with asyncio.timeout(10):
        while until not in journal.lines("r1"):  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)
    return journal, (fake / "calls").read_text().splitlines()


async def test_lines_by_run(fake: Path) -> None:
    """Each run has its own lines, in order; odd messages are read as well."""
    lines = [entry("one", 1), entry("other", 2, run="r2"), entry([104, 105, 255], 3), entry(["a", "b"], 4)]
    journal, _ = await followed(fake, [*lines, "{broken", entry(None, 5), entry("end", 6)], until="end")
    assert journal.lines("r1") == ["one", "hi\ufffd", "a", "b", "", "end"]
    assert journal.lines("r2") == ["other"]
    assert journal.lines("r3") == []
    await journal.close()


async def test_forged_entries_are_ignored(fake: Path) -> None:
    """Our fields can be written by anybody; those that journald vouches for cannot."""
    forged = [
        entry("forged", 1, unit="user@1000.service", LLMSTUDIO="model", LLMSTUDIO_MODEL="a"),
        entry("forged", 2, unit=None),
        entry("forged", 3, unit=[UNIT, "x"]),
        entry("forged", 4, run=None),
        json.dumps({"MESSAGE": "forged", "_SYSTEMD_UNIT": UNIT, "_SYSTEMD_INVOCATION_ID": "r1"}),
    ]
    journal, _ = await followed(fake, [*forged, entry("true", 9)], until="true")
    assert journal.lines("r1") == ["true"]
    await journal.close()


async def test_goes_on_after_its_own_death(fake: Path) -> None:
    """Journalctl ends: the next one begins behind what was read."""
    journal, calls = await followed(fake, [entry("one", 1)], [entry("two", 2)], until="two")
    assert journal.lines("r1") == ["one", "two"]
    assert "--lines=0" in calls[0]
    assert "--after-cursor=c1" in calls[1]
    assert all("LLMSTUDIO=model" in call for call in calls)
    await journal.close()


async def test_bad_cursor_is_given_up(fake: Path) -> None:
    """A journal that was vacuumed does not know the cursor: a little of the past is read again, nothing twice."""
    says = [[entry("one", 1)], [], [], [entry("one", 1), entry("two", 2)]]
    journal, calls = await followed(fake, *says, until="two")
    assert journal.lines("r1") == ["one", "two"]
    assert "--since=" in calls[3]
    await journal.close()


async def test_cursor_is_kept_for_as_long_as_there_are_entries(fake: Path) -> None:
    """However many there were before: an end that follows new entries is no failure."""
    many = [entry(f"line {number}", number) for number in range(MAX_KNOWN + 10)]
    says = [[entry(f"again {n}", 10_000 + n)] for n in range(3)]
    journal, calls = await followed(fake, many, *says, [entry("end", 20_000)], until="end")
    assert all("--after-cursor=" in call for call in calls[1:]), calls
    await journal.close()


async def test_entries_of_before_are_read_for_runs_that_go_on(fake: Path) -> None:
    """What a model wrote while no daemon ran."""
    journal, calls = await followed(fake, [entry("one", 1)], until="one", n_before=70)
    assert "--lines=70" in calls[0]
    await journal.close()


async def test_without_journalctl(tmp_path: Path) -> None:
    """It is not there: nothing is known, and nothing fails."""
    journal = Journal((str(tmp_path / "nowhere"),))
    journal.start()
    await asyncio.sleep(0.05)
    assert journal.lines("r1") == []
    await journal.close()


async def test_memory_is_bounded(fake: Path) -> None:
    """A chatty model loses its oldest lines."""
    many = [entry(f"line {number}", number) for number in range(MAX_LINES + 50)]
    journal, _ = await followed(fake, [*many, entry("end", 9999)], until="end")
    assert len(journal.lines("r1")) == MAX_LINES
    await journal.close()


async def test_long_lines_are_cut(fake: Path) -> None:
    """A client can have them written: neither one line nor all of them take much."""
    long = [entry(f"{number} " + "é" * 48_000, number) for number in range(300)]
    journal, _ = await followed(fake, [*long, entry("end", 9999)], until="end")
    lines = journal.lines("r1")
    assert max(map(len, lines)) == MAX_LINE_CHARS + 1
    assert sum(len(line) * 4 for line in lines) <= MAX_BYTES
    await journal.close()


async def test_runs_that_ended_are_forgotten(fake: Path) -> None:
    """But for a few, whose last lines may still come."""
    runs = [f"r{number}" for number in range(MAX_ENDED + 3)]
    journal, _ = await followed(fake, [entry("x", n, run=run) for n, run in enumerate(runs)], until="x")
    async with asyncio.timeout(10):
        while not journal.lines(runs[-1]):  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)
    for run in runs[:-1]:
        journal.ended(run)
    assert [run for run in runs if journal.lines(run)] == runs[2:]
    await journal.close()


async def test_runs_are_bounded(fake: Path) -> None:
    """The oldest runs are forgotten first."""
    many = [entry(f"line {number}", number, run=f"r{number}") for number in range(MAX_RUNS + 10)]
    journal, _ = await followed(fake, [*many, entry("end", 9999)], until="end")
    kept = [number for number in range(MAX_RUNS + 10) if journal.lines(f"r{number}") and number != 1]
    assert kept[0] == 11
    assert len(kept) == MAX_RUNS - 1
    await journal.close()


def test_messages() -> None:
    """Text, bytes as numbers, several of them, nothing."""
    assert [message(value) for value in ("a", [97], ["a", [98]], None, 5, [300])] == [
        "a",
        "a",
        "a\nb",
        "",
        "",
        "\n"[:0],
    ]


# One model's log, by the launcher

DENIED = "No journal files were opened due to insufficient permissions."


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A journalctl that is found first; what it does is written there."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path / "journalctl"


def say(program: Path, script: str) -> SystemdLauncher:
    """Let journalctl do this, and return a launcher that asks it."""
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return SystemdLauncher(PrivilegedClient("/nowhere"))


async def test_what_journalctl_says_of_itself_is_no_line(on_path: Path) -> None:
    """A warning beside the lines is not among them, and one instead of them is an error with the next step."""
    assert await say(on_path, "echo noise >&2; echo one").lines("a", limit=5) == ["one"]
    with pytest.raises(LauncherError, match="the journal cannot be read: No journal files") as refused:
        await say(on_path, f"echo '{DENIED}' >&2; exit 1").lines("a", limit=5)
    assert "SupplementaryGroups=systemd-journal" in str(refused.value.hint)


async def test_follower_tells_why_it_ended(on_path: Path) -> None:
    """It goes on for as long as journalctl does, so its end is a failure."""
    denied = say(on_path, f"echo one; echo '{DENIED}' >&2; exit 1").follow("a", limit=5)
    assert await anext(denied) == "one"
    with pytest.raises(LauncherError, match=DENIED):
        await anext(denied)
    ended = say(on_path, "exit 0").follow("a", limit=5)
    with pytest.raises(LauncherError, match="journalctl ended"):
        await anext(ended)


async def test_line_of_a_mebibyte_ends_no_follower(on_path: Path) -> None:
    """A model's clients choose how long its lines are; what comes after one is told."""
    launcher = say(on_path, "echo one; head -c 3000000 /dev/zero | tr '\\0' x; echo; echo two; exec sleep 60")
    lines = launcher.follow("a", limit=5)
    async with asyncio.timeout(10):
        assert await anext(lines) == "one"
        while await anext(lines) != "two":
            pass


async def test_journalctl_that_is_gone_is_told(on_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For lines and for the follower alike."""
    launcher = SystemdLauncher(PrivilegedClient("/nowhere"))
    monkeypatch.setenv("PATH", str(on_path.parent))
    with pytest.raises(LauncherError, match="cannot run journalctl"):
        await launcher.lines("a", limit=5)
    with pytest.raises(LauncherError, match="cannot run journalctl"):
        await anext(launcher.follow("a", limit=5))
