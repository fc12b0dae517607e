"""``llmstudioctl doctor``: examines the installation, and says of each thing that is wrong what to do about it."""

import argparse
import contextlib
import grp
import http.client
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmstudiod import __version__
from llmstudiod.core.errors import LlmstudioError
from llmstudiod.core.units import counted, format_bytes
from llmstudiod.ctl import show
from llmstudiod.ctl.client import Client, reason_of

ADMIN_GROUP, MODEL_GROUP = "llmstudio-admin", "llmstudio-model"
PATIENCE_S = 10.0
LAUNCHER = "llmstudio-launcher.socket"
UNITS = (
    "llmstudiod.socket",
    "llmstudiod-admin.socket",
    "llmstudio-launcher.socket",
    "llmstudio-launcher.service",
    "llmstudiod.service",
)
STATE_DIRECTORY = Path("/var/lib/llmstudio")
LEAST_FREE = 1 << 30
OK, WARNING, FAULT = "ok", "warning", "fault"
_SIGNS = {OK: ("✓", "32"), WARNING: ("!", "33"), FAULT: ("✗", "31")}


@dataclass(frozen=True, slots=True)
class Finding:
    """What was examined, how it is, and what to do."""

    topic: str
    level: str
    text: str
    hint: str | None = None


def command(client: Client, arguments: argparse.Namespace) -> int:
    """Examine everything; 1 where there is a fault."""
    findings = []
    for finding in examine(client):
        findings.append(finding)
        if not arguments.json:
            print(_line(finding), flush=True)
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], ensure_ascii=False, indent=2))
    faults = sum(finding.level == FAULT for finding in findings)
    warnings = sum(finding.level == WARNING for finding in findings)
    print(f"{counted(faults, 'fault')}, {counted(warnings, 'warning')}", file=sys.stderr)
    return 1 if faults else 0


def examine(client: Client) -> Iterator[Finding]:
    """Yield the findings, the most fundamental first."""
    client = replace(client, patience_s=PATIENCE_S)
    units = list(_units())
    yield from units
    yield from _groups()
    yield from _membership()
    try:
        status, config = client.get("status"), client.get("config")
    except LlmstudioError as error:
        yield Finding("daemon", FAULT, error.message, error.hint)
        # The question is what starts a unit that cannot run, so how that went is seen only now.
        yield from (found for found in _units() if found.level == FAULT and found not in units)
        return
    settings = config["settings"]
    yield from _daemon(status)
    yield from _launcher(client, status)
    yield from _binary(status)
    yield from _devices(client, status)
    yield from _endpoint(status)
    yield from _keys(client, settings)
    yield from _files(settings)
    yield from _log(client, status)
    yield from _recipes(status, settings)


def _units() -> Iterator[Finding]:
    if not Path("/run/systemd/system").is_dir() or shutil.which("systemctl") is None:
        yield Finding("units", WARNING, "systemd does not run here: models are plain processes of the daemon")
        return
    for unit in UNITS:
        yield _unit(unit, _shown(unit))


def _unit(unit: str, facts: dict[str, str]) -> Finding:
    """Judge a unit by what ``systemctl show`` tells of it; the first thing that is wrong is told."""
    is_socket, state, sub = unit.endswith(".socket"), facts.get("ActiveState"), facts.get("SubState", "")
    if facts.get("LoadState") == "masked":
        return Finding("units", FAULT, f"{unit} is masked", f"`systemctl unmask {unit}`")
    if facts.get("LoadState") != "loaded":
        return Finding("units", WARNING, f"{unit} is not installed", "a daemon that was started by hand needs none")
    if state == "failed":
        return Finding("units", FAULT, f"{unit} has failed", f"`systemctl status {unit}` tells why")
    if sub.startswith("auto-restart"):
        hint = f"`journalctl -u {unit.removesuffix('.service')} -n 30` tells why"
        return Finding("units", FAULT, f"{unit} ends again and again, and is started again", hint)
    if is_socket and state != "active":
        return Finding("units", FAULT, f"{unit} does not listen", f"`systemctl enable --now {unit}`")
    if is_socket and facts.get("UnitFileState") not in {"enabled", "static"}:
        return Finding(
            "units", WARNING, f"{unit} listens, and will not after the next boot", f"`systemctl enable {unit}`"
        )
    if facts.get("NeedDaemonReload") == "yes":
        return Finding("units", WARNING, f"{unit} has changed on disk", "`systemctl daemon-reload`")
    return Finding("units", OK, f"{unit} is {state} ({sub})")


def _shown(unit: str) -> dict[str, str]:
    wanted = "LoadState,ActiveState,SubState,UnitFileState,NeedDaemonReload"
    shown = _run("systemctl", "show", f"--property={wanted}", unit)
    return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)


def _groups() -> Iterator[Finding]:
    """Look for the groups; without the models' own, no unit of a model can be started."""
    for group in (ADMIN_GROUP, MODEL_GROUP):
        try:
            grp.getgrnam(group)
        except KeyError:
            level = FAULT if group == MODEL_GROUP and _shown(LAUNCHER).get("LoadState") == "loaded" else WARNING
            yield Finding("groups", level, f"there is no group {group}", "the package makes it; `systemd-sysusers`")


def _membership() -> Iterator[Finding]:
    """Look whether the caller is in the group of those who may administer; root need not be."""
    with contextlib.suppress(KeyError):
        wanted = grp.getgrnam(ADMIN_GROUP).gr_gid
        if wanted in os.getgroups():
            yield Finding("groups", OK, f"you are in the group {ADMIN_GROUP}")
        elif os.geteuid():
            hint = f"`sudo usermod -aG {ADMIN_GROUP} {os.environ.get('USER', 'NAME')}`, then log in again"
            yield Finding("groups", WARNING, f"you are not in the group {ADMIN_GROUP}", hint)


def _daemon(status: dict[str, Any]) -> Iterator[Finding]:
    if status["version"] == __version__:
        yield Finding("daemon", OK, f"llmstudiod {__version__} answers, launcher {status['launcher']}")
        return
    text = f"the daemon is version {status['version']}, this program {__version__}"
    yield Finding("daemon", WARNING, text, "`systemctl restart llmstudiod`; running models stay")


def _launcher(client: Client, status: dict[str, Any]) -> Iterator[Finding]:
    """Ask the launcher something that changes nothing: how it would start a model, or which llama-server there is."""
    if status["launcher"] != "systemd":
        return
    model = next((item["id"] for item in status["instances"]), None)
    try:
        if model is not None:
            client.get("explain", model)
    except LlmstudioError as error:
        if getattr(error, "answer_kind", error.kind) in {"launcher", "daemon_unreachable"}:
            hint = f"`systemctl status {LAUNCHER}` and `journalctl -u llmstudio-launcher -n 30` tell why"
            yield Finding("launcher", FAULT, f"the launcher does not do its work: {error.message}", hint)
            return
    if model is not None:
        yield Finding("launcher", OK, "the launcher answers")


def _binary(status: dict[str, Any]) -> Iterator[Finding]:
    binary = status["llama_server"]
    if "error" in binary:
        yield Finding("llama-server", FAULT, binary["error"], binary["hint"])
    elif binary["is_embedded"]:
        text = f"the embedded engine is in use ({binary['version']}), which knows no GPU"
        yield Finding("llama-server", WARNING, text, "install llama-server: `apt install llama.cpp-tools`")
    else:
        text = f"{' '.join(binary['command'])}, {binary['version']}, from {binary['source']}"
        yield Finding("llama-server", OK, text)


def _devices(client: Client, status: dict[str, Any]) -> Iterator[Finding]:
    machine = client.get("gpus")
    for fault in machine["faults"]:
        yield Finding("devices", FAULT, fault)
    listed = status["llama_server"].get("devices") or []
    for gpu in machine["gpus"]:
        yield Finding("devices", OK, f"GPU {gpu['index']} {gpu['name']}, {format_bytes(gpu['memory_total'] or 0)}")
    if machine["gpus"] and not listed:
        text = "llama-server lists no device: models would run on the processor alone"
        hint = "install a llama-server built for this GPU (CUDA, ROCm or Vulkan); `llama-server --list-devices`"
        yield Finding("devices", FAULT, text, hint)
    elif not machine["gpus"]:
        yield Finding("devices", OK, "there is no GPU: models run on the processor")
    host = machine["host"]
    free = f"{format_bytes(host['memory_available'])} of {format_bytes(host['memory_total'])} RAM free"
    yield Finding("devices", OK, free)


def _endpoint(status: dict[str, Any]) -> Iterator[Finding]:
    if not status["ports"]:
        hint = "`systemctl status llmstudiod.socket` tells why; `ss -ltnp 'sport = :8080'` tells who has its port"
        yield Finding("endpoint", FAULT, "the endpoint has no port", hint)
    for port in status["ports"]:
        connection = http.client.HTTPConnection("localhost", port, timeout=10)
        try:
            connection.request("GET", "/health")
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException) as error:
            hint = f"`ss -ltnp 'sport = :{port}'` tells who listens there"
            yield Finding("endpoint", FAULT, f"http://localhost:{port} does not answer: {reason_of(error)}", hint)
        else:
            level = OK if answer.status == 200 else FAULT
            yield Finding("endpoint", level, f"http://localhost:{port}/v1 answers ({answer.status})")
        finally:
            connection.close()


def _keys(client: Client, settings: dict[str, Any]) -> Iterator[Finding]:
    try:
        keys = client.get("keys")["keys"]
    except LlmstudioError as error:
        yield Finding("keys", FAULT, error.message, error.hint)
        return
    if keys:
        yield Finding("keys", OK, counted(len(keys), "key"))
    elif settings["allow_open_listener"]:
        text = "allow_open_listener lets everybody in who reaches the port"
        yield Finding("keys", WARNING, text, "`llmstudioctl key add NAME` makes a key")
    else:
        yield Finding("keys", OK, "no keys: only programs of this machine are let in")


def _files(settings: dict[str, Any]) -> Iterator[Finding]:
    found = [Path(directory) for directory in settings["model_dirs"] if Path(directory).is_dir()]
    if not found:
        directory = next(iter(settings["model_dirs"]), "model_dirs in llmstudiod.yaml")
        yield Finding("disk", WARNING, "there is no model directory", f"make one: {directory}")
    for directory in (*found, STATE_DIRECTORY):
        try:
            free = shutil.disk_usage(directory).free
        except OSError:
            continue
        text = f"{directory}: {format_bytes(free)} free"
        if free < LEAST_FREE:
            yield Finding("disk", WARNING, text, "models and what the daemon keeps need room")
        else:
            yield Finding("disk", OK, text)


def _log(client: Client, status: dict[str, Any]) -> Iterator[Finding]:
    model = next((item["id"] for item in status["instances"]), None)
    if model is None or status["launcher"] != "systemd":
        return
    try:
        client.get("logs", model, query="limit=1")
    except LlmstudioError as error:
        yield Finding("journal", FAULT, f"the daemon: {error.message}", error.hint)
    else:
        yield Finding("journal", OK, "the daemon reads the models' journal")


def _recipes(status: dict[str, Any], settings: dict[str, Any]) -> Iterator[Finding]:
    told = [fault for fault in status["faults"] if fault["file"] != settings["keys_file"]]  # which has its own topic
    n_faults = sum(fault["severity"] == "fault" for fault in told)
    hint = "`llmstudioctl check` tells each with its line"
    if n_faults:
        yield Finding("recipes", FAULT, f"{counted(n_faults, 'fault')} in recipes or settings", hint)
    models = counted(len(status["instances"]), "model")
    if n_warnings := len(told) - n_faults:
        yield Finding("recipes", WARNING, f"{models}, {counted(n_warnings, 'warning')}", hint)
    elif not n_faults:
        yield Finding("recipes", OK, models)
    for item in status["instances"]:
        if item["state"] == "failed":
            yield Finding("models", WARNING, f"{item['id']} has failed: {item['reason']}", item["hint"])
        for alert in item["alerts"]:
            yield Finding("models", WARNING, f"{item['id']}: {alert}")


def _run(*argv: str) -> str:
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _line(finding: Finding) -> str:
    sign, code = _SIGNS[finding.level]
    shown = f"\x1b[{code}m{sign}\x1b[0m" if show.has_colours() else sign
    hint = f"\n  {'':<13} {finding.hint}" if finding.hint else ""
    return f"{shown} {finding.topic:<13} {finding.text}{hint}"
