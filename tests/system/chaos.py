"""Chaos, drawn from a seed: under a steady load everything that can die is killed, and nothing may be lost for it.

By hand, in the root of the repository: ``python -m tests.system.chaos --minutes 60 [--seed N]``.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import secrets
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmstudiod.demo.tiny_gguf import Fault, TinyModel, write_tiny_gguf

# Relative: without tests/__init__.py the absolute name differs between pytest and python -m.
from .chaos_load import BROKEN, CHATTERS, EMBEDDER, PATIENCE_S, Load, Outcome  # noqa: TID252
from .daemon import RECIPES, SERVICE, Daemon, unit_of, wait_until  # noqa: TID252
from .host import Host, HostError  # noqa: TID252

LAUNCHER = "llmstudio-launcher.service"
JOURNALD = "systemd-journald.service"
STATE, LAUNCHER_STATE = "/var/lib/llmstudio", "/var/lib/llmstudio-launcher"
FILES = "/srv/models"
MODELS = (*CHATTERS, EMBEDDER)
# MESSAGE_IDs of PID 1; source: systemd's sd-messages.h.
STOPPING, FAILED = "de5b426a63be47a7b6ac3eaac82e2f6f", "d9b373ed55a64feb8242e02dbe79a49c"
# What a daemon says of a unit that it finds, whose recipe was taken away while no daemon was there to see it.
STRANGER = re.compile(r"(\S+): it runs, but there is no such recipe any more")
STEP = re.compile(r"(\S+): (\w+) -> (\w+): (.*)$")
OF_ITS_OWN_WILL = (
    "evicted",
    "idle unload",
    "unloaded on request",
    "its recipe",
    "nobody waits",
    "its load was cancelled",
)
SLACK_S = 3.0
REST_S = 15.0  # draining takes drain_timeout, 10 s, at most


@dataclass(frozen=True, slots=True)
class Deed:
    """One fault: what was done, when (monotonic seconds, and since 1970), and to which run of a model."""

    kind: str
    at: float
    wall: float
    invocation: str = ""
    model: str = ""


@dataclass(slots=True)
class Chaos:
    """Does harm to a host, and remembers it."""

    daemon: Daemon
    seed: int
    deeds: list[Deed] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _timers: list[threading.Timer] = field(default_factory=list)
    _serial: int = 0
    _dice: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        self._dice.seed(self.seed)

    # What is done

    def kinds(self) -> dict[Callable[[], None], int]:
        """Return every kind of harm with its weight."""
        return {
            self.restart_daemon: 3, self.terminate_daemon: 2, self.kill_daemon: 4, self.terminate_model: 4,
            self.kill_model: 6, self.crash_model: 4, self.freeze_model: 2, self.kill_follower: 4, self.kill_journald: 1,
            self.restart_journald: 1, self.kill_launcher: 5, self.change_recipe: 5, self.break_recipe: 3,
            self.replace_recipe: 3, self.write_half_a_recipe: 2, self.take_recipe_away: 2, self.fill_disk: 2,
            self.damage_state: 1, self.remove_state: 1,
            self.reload_systemd: 3, self.reexec_systemd: 2, self.unload: 4, self.force_unload: 2,
            self.load: 3, self.cancel: 2, self.reset: 1,
        }  # fmt: skip

    def strike(self) -> str:
        """Do one thing, drawn from the dice; return what."""
        kinds = self.kinds()
        chosen = self._dice.choices(list(kinds), list(kinds.values()))[0]
        try:
            chosen()
        except HostError as error:  # what should be hit has gone meanwhile
            self.notes.append(f"{chosen.__name__}: {error}")
        return chosen.__name__

    def settle(self) -> None:
        """Undo what would undo itself later."""
        for timer in self._timers:
            timer.join()
        self._free_disk()
        for model in MODELS:
            self._write_recipe(model)

    def _run(self, *argv: str, check: bool = True) -> str:
        return self.daemon.host.run(*argv, check=check).stdout

    def _did(self, kind: str, model: str = "", invocation: str = "") -> None:
        self.deeds.append(Deed(kind, time.monotonic(), time.time(), invocation, model))

    def _later(self, delay_s: float, what: Callable[[], object]) -> None:
        def act() -> None:
            with contextlib.suppress(HostError):
                what()

        timer = threading.Timer(delay_s, act)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    # The daemon

    def restart_daemon(self) -> None:
        """The ordinary restart."""
        self._did("restart daemon")
        self._run("systemctl", "restart", "--no-block", SERVICE)

    def terminate_daemon(self) -> None:
        """SIGTERM from somebody else than systemd; the socket starts the next one."""
        self._did("SIGTERM daemon")
        self._run("systemctl", "kill", "--signal=TERM", "--kill-whom=main", SERVICE, check=False)

    def kill_daemon(self) -> None:
        """SIGKILL: nothing can be written down any more."""
        self._did("SIGKILL daemon")
        self._run("systemctl", "kill", "--signal=KILL", SERVICE, check=False)

    # Models

    def _signal(self, word: str) -> tuple[str, str] | None:
        """Send a signal to some model that runs; return it and its invocation."""
        running = self._running()
        if not running:
            return None
        model = self._dice.choice(sorted(running))
        self._did(f"SIG{word} model", model, running[model])
        self._run("systemctl", "kill", f"--signal={word}", "--kill-whom=main", unit_of(model), check=False)
        return model, running[model]

    def _running(self) -> dict[str, str]:
        """Return the invocations of the models that run."""
        output = self._run(
            "systemctl", "show", "--property=Id,ActiveState,InvocationID", "llmstudio-model-*.service", check=False
        )
        found = {}
        for block in output.split("\n\n"):
            shown = dict(line.partition("=")[::2] for line in block.splitlines())
            if shown.get("ActiveState") == "active":
                found[shown["Id"].removeprefix("llmstudio-model-").removesuffix(".service")] = shown["InvocationID"]
        return found

    def terminate_model(self) -> None:
        """A polite end that nobody asked the daemon for."""
        self._signal("TERM")

    def kill_model(self) -> None:
        """A sudden end."""
        self._signal("KILL")

    def crash_model(self) -> None:
        """The end of a program with a bug."""
        self._signal("SEGV")

    def freeze_model(self) -> None:
        """It does nothing any more; sometimes it comes back, sometimes the daemon must notice."""
        hit = self._signal("STOP")
        if hit is not None and self._dice.random() < 0.8:
            self._later(
                self._dice.uniform(0.5, 4),
                lambda: self._run("systemctl", "kill", "--signal=CONT", unit_of(hit[0]), check=False),
            )

    # Around them

    def kill_follower(self) -> None:
        """The daemon's own journalctl."""
        self._did("SIGKILL journal follower")
        self._run("pkill", "-KILL", "-f", "journalctl --quiet --follow", check=False)

    def kill_journald(self) -> None:
        """The journal itself; what was on its way to it may be lost."""
        self._did("SIGKILL journald")
        self._run("systemctl", "kill", "--signal=KILL", JOURNALD, check=False)

    def restart_journald(self) -> None:
        """As after an upgrade of systemd."""
        self._did("restart journald")
        self._run("systemctl", "restart", JOURNALD, check=False)

    def kill_launcher(self) -> None:
        """In the middle of a start, if there is one."""
        model = self._dice.choice(CHATTERS)
        self._did("SIGKILL launcher", model)
        self._run("llmstudioctl", "load", "--no-wait", model, check=False)
        time.sleep(self._dice.uniform(0.0, 0.15))
        self._run("systemctl", "kill", "--signal=KILL", LAUNCHER, check=False)

    def reload_systemd(self) -> None:
        """As after every installation of a package."""
        self._did("daemon-reload")
        self._run("systemctl", "daemon-reload")

    def reexec_systemd(self) -> None:
        """As after an upgrade of systemd."""
        self._did("daemon-reexec")
        self._run("systemctl", "daemon-reexec", check=False)

    # Files

    def _recipe(self, model: str) -> str:
        self._serial += 1
        path = f"{FILES}/{'embed' if model == EMBEDDER else 'tiny'}.gguf"
        values = {
            "id": model, "model_path": path, "max_model_len": 1024, "restart_limit": 0, "threads": 1,
            "description": f"version {self._serial}", "embedding": model == EMBEDDER,
            "idle_timeout": "4s" if model == "dot" else "10m",
        }  # fmt: skip
        return json.dumps(values | ({"pooling": "mean"} if model == EMBEDDER else {}))

    def _write_recipe(self, model: str) -> None:
        self.daemon.host.write(f"{RECIPES}/{model}.yaml", self._recipe(model))

    def _reload(self) -> None:
        """Have the files read, or leave it to the daemon to notice."""
        if self._dice.random() < 0.7:
            self._run("systemctl", "reload", "--no-block", SERVICE, check=False)

    def change_recipe(self) -> None:
        """Another version that is as good."""
        self._did("change recipe", model := self._dice.choice(MODELS))
        self._write_recipe(model)
        self._reload()

    def break_recipe(self) -> None:
        """A slip of the pen; mended a while later."""
        self._did("break recipe", model := self._dice.choice(MODELS))
        self.daemon.host.write(f"{RECIPES}/{model}.yaml", "id: [\nmodel_path")
        self._reload()
        self._later(self._dice.uniform(0.5, 3), lambda: self._write_recipe(model))

    def replace_recipe(self) -> None:
        """An editor writes another file and renames it."""
        self._did("replace recipe", model := self._dice.choice(MODELS))
        self.daemon.host.write(f"{RECIPES}/.{model}.yaml.part", self._recipe(model))
        self._run("mv", f"{RECIPES}/.{model}.yaml.part", f"{RECIPES}/{model}.yaml")
        self._reload()

    def write_half_a_recipe(self) -> None:
        """A file that is written in two pieces."""
        self._did("half a recipe", model := self._dice.choice(MODELS))
        text = self._recipe(model)
        self.daemon.host.write(f"{RECIPES}/{model}.yaml", text[: len(text) // 2])
        self._reload()
        self.daemon.host.write(f"{RECIPES}/{model}.yaml", text)

    def take_recipe_away(self) -> None:
        """It comes back a moment later."""
        self._did("take recipe away", model := self._dice.choice(MODELS))
        self._run("rm", "-f", f"{RECIPES}/{model}.yaml")
        self._reload()
        self._later(self._dice.uniform(0.2, 2), lambda: self._write_recipe(model))

    def fill_disk(self) -> None:
        """Nothing can be recorded for a while, by the daemon or by the launcher."""
        self._did("fill the state directories")
        for place in (STATE, LAUNCHER_STATE):
            self._run("sh", "-c", f"dd if=/dev/zero of={place}/filler bs=4k 2>/dev/null || true")
        self._later(self._dice.uniform(1, 4), self._free_disk)

    def remove_state(self) -> None:
        """An administrator tidies up; the daemon has it open."""
        self._did("remove state.db")
        self._run("sh", "-c", f"rm -f {STATE}/state.db*")

    def _free_disk(self) -> None:
        self._run("rm", "-f", f"{STATE}/filler", f"{LAUNCHER_STATE}/filler")

    def damage_state(self) -> None:
        """The daemon dies, and its database is no database any more."""
        self._did("SIGKILL daemon")
        self._did("damage state.db")
        self._run("systemctl", "kill", "--signal=KILL", SERVICE, check=False)
        self._run("sh", "-c", f"echo damaged > {STATE}/state.db", check=False)

    # Administrators

    def _ctl(self, kind: str, *words: str) -> None:
        model = self._dice.choice(CHATTERS)
        self._did(kind, model)
        self._run("timeout", "20", "llmstudioctl", *words, model, check=False)

    def unload(self) -> None:
        """Ask for a model to go."""
        self._ctl("unload", "unload")

    def force_unload(self) -> None:
        """Ask for a model to go at once."""
        self._ctl("unload --force", "unload", "--force")

    def load(self) -> None:
        """Ask for a model to come."""
        self._ctl("load", "load", "--no-wait")

    def cancel(self) -> None:
        """Ask for a load to be given up."""
        self._ctl("cancel", "cancel")

    def reset(self) -> None:
        """Say that a failure is mended."""
        self._ctl("reset", "reset")


def prepare(host: Host, directory: Path) -> Daemon:
    """Put models, recipes and settings into an installed host, and let it listen."""
    daemon = Daemon(host)
    daemon.reset()
    host.run("mkdir", "-p", FILES, RECIPES, LAUNCHER_STATE)
    host.run("mount", "-t", "tmpfs", "-o", "size=3m,mode=0755", "tmpfs", STATE)
    host.run("mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", LAUNCHER_STATE)
    for name, model in (
        ("tiny", TinyModel(eos_bias=0.0)),
        ("embed", TinyModel(name="embed", pooling_type="mean")),
        ("cut", TinyModel(name="cut", fault=Fault.TRUNCATED)),
    ):
        write_tiny_gguf(directory / f"{name}.gguf", model)
        host.put(directory / f"{name}.gguf", f"{FILES}/{name}.gguf")
    daemon.use_settings(
        model_dirs=[FILES], auto_recipes=False, max_instances=3, drain_timeout="10s", load_stall_timeout="10s",
        restart_limit=0, wait_comment_interval="1s",
    )  # fmt: skip
    daemon.put_recipe({"id": BROKEN, "model_path": f"{FILES}/cut.gguf"})
    Chaos(daemon, 0).settle()
    daemon.listen()
    return daemon


@dataclass(slots=True)
class Report:
    """What a run has shown; ``faults`` is empty when all is well."""

    seed: int
    outcomes: list[Outcome]
    deeds: list[Deed]
    faults: list[str]

    def __str__(self) -> str:
        """Return the figures, then what is wrong."""
        words = Counter(outcome.word for outcome in self.outcomes)
        told = Counter(outcome.why.partition(":")[0] for outcome in self.outcomes if outcome.word == "told")
        took = sorted(outcome.ended - outcome.began for outcome in self.outcomes) or [0.0]
        deeds = Counter(deed.kind for deed in self.deeds)
        lines = [
            f"seed {self.seed}: {len(self.deeds)} faults, {len(self.outcomes)} requests, {len(self.faults)} findings",
            f"  requests: {dict(words)}; told why: {dict(told)}",
            f"  latency: median {took[len(took) // 2] * 1000:.0f} ms, worst {took[-1]:.1f} s",
            f"  faults: {dict(deeds)}",
        ]
        return "\n".join([*lines, *(f"  - {fault}" for fault in self.faults)])


def run(daemon: Daemon, *, seed: int, n_faults: int, n_requests: int, seconds: float) -> Report:
    """Let chaos reign until there were as many faults and requests, and for as long; then judge."""
    load, chaos = Load(seed), Chaos(daemon, seed)
    client = threading.Thread(target=_ask, args=(daemon, load), name="load")
    client.start()
    dice = random.Random(seed + 1)
    began = told_at = time.monotonic()
    try:
        while (
            len(chaos.deeds) < n_faults or len(load.outcomes) < n_requests or time.monotonic() - began < seconds
        ) and client.is_alive():
            if len(chaos.deeds) < n_faults or time.monotonic() - began < seconds:
                chaos.strike()
                time.sleep(dice.uniform(0.05, 0.6))
            else:
                time.sleep(0.2)
            if time.monotonic() - told_at > 15:
                told_at = time.monotonic()
                say(f"{told_at - began:.0f} s: {len(chaos.deeds)} faults, {len(load.outcomes)} requests")
    finally:
        chaos.settle()
        load.is_over = True
        client.join(PATIENCE_S + 30)
    return Report(seed, load.outcomes, chaos.deeds, judge(daemon, load, chaos))


def _ask(daemon: Daemon, load: Load) -> None:
    with daemon.host.network():
        asyncio.run(load.run())


def judge(daemon: Daemon, load: Load, chaos: Chaos) -> list[str]:
    """Return everything that should not be."""
    faults = [f"never answered: {each}" for each in load.in_flight.values()]
    faults += _about_requests(load, chaos)
    faults += _about_the_end(daemon)
    faults += _about_models(daemon, chaos)
    faults += _about_logs(daemon)
    return faults


def _about_requests(load: Load, chaos: Chaos) -> list[str]:
    kills = [deed.at for deed in chaos.deeds if deed.kind == "SIGKILL daemon"]
    ends = [deed.at for deed in chaos.deeds if deed.kind in {"SIGKILL daemon", "SIGTERM daemon", "restart daemon"}]
    faults = []
    for outcome in load.outcomes:
        if outcome.word == "lost":
            was_cut = any(outcome.began <= at + 0.5 and at <= outcome.ended for at in kills)
            if was_cut:
                continue
        if outcome.word == "retried" and any(abs(outcome.began - at) < REST_S for at in ends):
            continue
        if outcome.word not in {"ok", "told", "left"}:
            at = outcome.ended
            near = [f"{deed.kind} {deed.model} {deed.at - at:+.1f} s" for deed in chaos.deeds if abs(deed.at - at) < 3]
            faults.append(f"{outcome}; near it: {', '.join(near)}")
    return faults


def _about_the_end(daemon: Daemon) -> list[str]:
    """Look whether all is quiet and in order, now that nobody asks for anything."""
    faults = []

    def is_quiet() -> bool:
        shown = daemon.host.run("llmstudioctl", "status", "--json", check=False)
        if shown.returncode:
            return False
        counts, instances = (json.loads(shown.stdout)[name] for name in ("counts", "instances"))
        states = {item["state"] for item in instances}
        return counts["in_flight"] == counts["waiting"] == 0 and states <= {"ready", "stopped", "failed"}

    try:
        wait_until(is_quiet, timeout_s=60)
    except AssertionError:
        faults.append("it does not come to rest: " + daemon.ctl("status", "--json", check=False)[-2000:])
    status = json.loads(daemon.host.run("llmstudioctl", "status", "--json").stdout)
    counts = status["counts"]
    if counts["arrived"] != counts["granted"] + counts["refused"] + counts["left"] + counts["waiting"]:
        faults.append(f"the counts do not balance: {counts}")
    if counts["granted"] != counts["ended"] + counts["in_flight"]:
        faults.append(f"the counts do not balance: {counts}")
    known = {item["pid"] for item in status["instances"] if item["pid"]}
    units = {daemon.pid(line.split()[0]) for line in daemon.model_units() if " active " in line}
    servers = _servers(daemon)
    if not known == units == servers:
        told = "\n".join(_about_process(daemon, pid) for pid in known ^ units | units ^ servers)
        faults.append(f"the daemon knows {known}, systemd runs {units}, there are the processes {servers}\n{told}")
    daemon.ctl("unload", "--all", check=False)
    rest = [line for line in daemon.model_units() if " failed " not in line]
    servers = _servers(daemon)
    if rest or servers:
        faults.append(f"left behind after `unload --all`: {rest} {servers}")
    if not daemon.chat(CHATTERS[0]):
        faults.append("nothing is answered in the end")
    return faults


def _servers(daemon: Daemon) -> set[int]:
    return set(map(int, daemon.host.run("pgrep", "-x", "llama-server", check=False).stdout.split()))


def _about_process(daemon: Daemon, pid: int) -> str:
    command = f"tr '\\0' ' ' < /proc/{pid}/cmdline; cat /proc/{pid}/cgroup /proc/{pid}/stat; systemctl status {pid}"
    return daemon.host.run("sh", "-c", command, check=False).stdout


def _about_models(daemon: Daemon, chaos: Chaos) -> list[str]:
    """Look for models that ended though nobody meant them: each end was a target of ours, or the daemon says why."""
    targets = {deed.invocation for deed in chaos.deeds if deed.invocation}
    blind = [deed.wall for deed in chaos.deeds if "journald" in deed.kind]  # lines may be missing around these
    told = [
        (float(entry["__REALTIME_TIMESTAMP"]) / 1e6, str(entry.get("MESSAGE")))
        for entry in _entries(daemon, "_SYSTEMD_UNIT=" + SERVICE)
    ]
    said = [(at, found[1], found[3], found[4]) for at, text in told if (found := STEP.search(text))]
    said += [(at, found[1], "stopping", "its recipe is gone") for at, text in told if (found := STRANGER.search(text))]
    faults = []
    for entry in _entries(daemon, f"MESSAGE_ID={STOPPING}", f"MESSAGE_ID={FAILED}"):
        unit, run = str(entry.get("UNIT", "")), str(entry.get("INVOCATION_ID", ""))
        at = float(entry["__REALTIME_TIMESTAMP"]) / 1e6
        if not unit.startswith("llmstudio-model-") or any(abs(at - when) < SLACK_S for when in blind):
            continue
        model = unit.removeprefix("llmstudio-model-").removesuffix(".service")
        words = [why for when, of, new, why in said if of == model and new == "stopping" and 0 <= at - when + 0.1 < 15]
        is_meant = any(why.startswith(OF_ITS_OWN_WILL) for why in words)
        if run not in targets and not is_meant:
            faults.append(
                f"{unit} ended, and nobody meant it ({entry.get('MESSAGE')}, at {at:.3f}, run {run}): {words}"
            )
    return faults


def _about_logs(daemon: Daemon) -> list[str]:
    text = daemon.host.journal(SERVICE) + daemon.host.journal(LAUNCHER)
    words = ("Traceback", "internal error", "Task was destroyed", "never retrieved")
    lines = text.splitlines()
    found = [number for number, line in enumerate(lines) if any(word in line for word in words)]
    return ["\n    ".join(lines[number : number + 30]) for number in found[:5]]


def _entries(daemon: Daemon, *matches: str) -> list[dict[str, Any]]:
    daemon.host.run("journalctl", "--sync", check=False)
    output = daemon.host.run("journalctl", "--quiet", "--output=json", "--all", *matches).stdout
    return [json.loads(line) for line in output.splitlines()]


def save_journal(daemon: Daemon, report: Report, directory: Path) -> None:
    """Write the host's journal and the deeds to files, for whoever wants to know how it came to that."""
    journal = directory / f"chaos-{report.seed}.journal"
    journal.write_text(daemon.host.run("journalctl", "--quiet", "--output=short-precise", "--all").stdout)
    deeds = directory / f"chaos-{report.seed}.faults"
    deeds.write_text("\n".join(map(str, report.deeds)) + "\n")
    say(f"see {journal} and {deeds}")


def say(text: str) -> None:
    """Tell how far it is."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    """Run by hand, in a host of its own."""
    from .conftest import install  # noqa: TID252 - pytest's own module, and needed here alone

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 30))
    parser.add_argument("--faults", type=int, default=0)
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--keep", action="store_true", help="leave the host up for a look")
    arguments = parser.parse_args()
    say(f"seed {arguments.seed}")
    host = Host().up(is_kept=arguments.keep)
    try:
        install(host)
        with tempfile.TemporaryDirectory() as directory:
            daemon = prepare(host, Path(directory))
        report = run(
            daemon, seed=arguments.seed, n_faults=arguments.faults, n_requests=arguments.requests,
            seconds=arguments.minutes * 60,
        )  # fmt: skip
        if report.faults:
            save_journal(daemon, report, Path(tempfile.mkdtemp()))
    finally:
        if not arguments.keep:
            host.down()
        else:
            say(f"the host {host.name} is up")
    say(str(report))
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
