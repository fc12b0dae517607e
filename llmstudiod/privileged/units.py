"""Carries out what the launcher is asked, with systemd-run and systemctl."""

import contextlib
import grp
import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, assert_never

from llmstudiod.adapters.find_binary import find_binary
from llmstudiod.core import launcher_protocol as ask
from llmstudiod.core.binary_answers import QUESTIONS, Answer, complaint, described, executables
from llmstudiod.core.command import ServerBinary
from llmstudiod.core.errors import LauncherError
from llmstudiod.core.gpu_nodes import gpu_nodes, nvidia_minors
from llmstudiod.core.launch import LaunchRequest, launch_request, question
from llmstudiod.core.unit import inside_socket_path, question_argv, systemd_run_argv, unit_name
from llmstudiod.privileged.files import checked, model_files
from llmstudiod.privileged.store import Store, identity

MODEL_GROUP = "llmstudio-model"
COMMAND_TIMEOUT_S = 45.0
QUESTION_TIMEOUT_S = 20.0
_NOT_LOADED = 5  # systemctl(1), "Exit Status"


class Units:
    """The launcher's verbs. Thread-safe: nothing is kept but what stands in files."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._numbers = itertools.count(1)

    def perform(self, request: ask.Request) -> dict[str, Any]:
        """Do what is asked, and return the answer.

        Raises:
            LlmstudioError: It is refused, or it failed.
        """
        settings = self._store.settings()
        match request:
            case ask.Start():
                start_unit(self._request(request))
            case ask.Show():
                return {"command": systemd_run_argv(self._request(request), group=_group())}
            case ask.Check():
                wanted = self._request(request)
                return {"complaint": complaint(self._ask(replace(wanted, argv=(*wanted.argv, "--version"))))}
            case ask.Stop():
                stop_unit(request.id, is_forced=request.is_forced)
            case ask.Reset():
                _run("systemctl", "reset-failed", unit_name(request.id))
            case ask.Probe():
                return {"binary": self._binary().as_dict()}
            case ask.PutRecipe():
                self._store.put_recipe(request.file, request.text, settings)
            case ask.DeleteRecipe():
                self._store.delete_recipe(request.file, settings)
            case ask.PutKeys():
                self._store.put_keys(request.text, settings)
            case _:
                assert_never(request)
        return {}

    def _request(self, launch: ask.Launch) -> LaunchRequest:
        settings = self._store.settings()
        recipe = self._store.recipe(launch, settings)
        files = model_files(recipe, launch, settings.model_dirs)
        binary = self._binary()
        socket_path = inside_socket_path(recipe.id)
        request, command = launch_request(
            recipe, files, binary, recipe_file=launch.file, socket_path=socket_path, is_sandboxed=True
        )
        gpus = launch.gpus or (recipe.gpus if isinstance(recipe.gpus, tuple) else None)
        nodes = () if recipe.gpus == "none" else gpu_nodes(binary.devices, gpus, minors=_minors(), nodes=_nodes())
        fallback = {"MemoryMax": str(launch.memory_max), "MemorySwapMax": "0"} if launch.memory_max else {}
        return replace(
            request,
            files=checked(command.files, files.chat_template_file),
            limits={**fallback, **request.limits},
            devices=nodes,
            device_groups=_groups(nodes),
        )

    def _binary(self) -> ServerBinary:
        """Return the binary with what it says of itself; asked again when the file on disk has changed."""
        found = find_binary(self._store.settings().llama_server, os.environ)
        real = os.path.realpath(found.argv[0])
        seen = [*found.argv, *identity(real)]
        kept = self._store.kept("binary.json")
        if kept and kept["identity"] == seen:
            return ServerBinary.from_dict(kept["binary"])
        # It sees every GPU, and may execute what it likes, but in the sandbox.
        nodes = _nodes()
        asked = [
            replace(question([*found.argv, flag]), devices=nodes, device_groups=_groups(nodes)) for flag in QUESTIONS
        ]
        with ThreadPoolExecutor(len(asked) + 1) as pool:
            *answers, (_, libraries) = pool.map(self._ask, [*asked, question(["/usr/bin/ldd", real])])
        paths = (*executables(real, libraries), *((sys.prefix,) if found.is_engine else ()))
        binary = replace(described(found, dict(zip(QUESTIONS, answers, strict=True))), executables=paths)
        self._store.keep("binary.json", {"identity": seen, "binary": binary.as_dict()})
        return binary

    def _ask(self, wanted: LaunchRequest) -> Answer:
        unit = f"llmstudio-question-{os.getpid()}-{next(self._numbers)}.service"
        return _run(*question_argv(wanted, unit=unit, timeout_s=QUESTION_TIMEOUT_S))


def start_unit(request: LaunchRequest) -> None:
    """Start a model's unit; return when its program is being executed.

    Raises:
        LauncherError: systemd has not started it; the journal tells why.
    """
    if "/dev/nvidiactl" in request.devices and not os.path.exists("/dev/nvidia-uvm"):
        # A node that is missing now stays forbidden to the unit. The launcher itself may load no driver.
        _run("systemd-run", "--quiet", "--wait", "--collect", "--no-ask-password", "nvidia-modprobe", "-u", "-c=0")
    argv = systemd_run_argv(request, group=_group())
    code, output = _run(*argv)
    if code and "already loaded" in output:  # a failed run of before: its reason was to be seen until now
        _run("systemctl", "reset-failed", unit_name(request.model_id))
        code, output = _run(*argv)
    if code:
        raise LauncherError(output.strip()[:2000], details={"program": request.argv[0]})


def stop_unit(model_id: str, *, is_forced: bool) -> None:
    """Stop a model's unit and free its name; one that is not there is stopped.

    Raises:
        LauncherError: systemd could not.
    """
    name = unit_name(model_id)
    if is_forced:
        _run("systemctl", "kill", "--signal=SIGKILL", name)
    # A unit is ordered before llmstudiod.service, so that at shutdown the daemon drains first. But then the stop of the
    # daemon would wait for us, and an ordered stop of the unit for the daemon's: this one must not wait.
    code, output = _run("systemctl", "stop", "--job-mode=ignore-dependencies", name)
    _run("systemctl", "reset-failed", name)
    if code not in (0, _NOT_LOADED):
        raise LauncherError(output.strip() or f"systemctl ended with {code}")


def _run(*argv: str) -> Answer:
    """Run a command of systemd's; return its exit code and what it printed."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        done = subprocess.run(argv, check=False, timeout=COMMAND_TIMEOUT_S, **pipes)  # type: ignore[call-overload]
    except subprocess.TimeoutExpired:
        return 124, f"{argv[0]} did not answer within {COMMAND_TIMEOUT_S:.0f} s"
    return done.returncode, done.stdout.decode(errors="replace")


def _group() -> str | None:
    """Return the group of the models' sockets where the package has made it; DynamicUser= would invent one."""
    with contextlib.suppress(KeyError):
        return grp.getgrnam(MODEL_GROUP).gr_name
    return None


def _nodes() -> tuple[str, ...]:
    patterns = ("nvidia*", "nvidia-caps/*", "dri/renderD*", "kfd")
    return tuple(sorted(str(node) for pattern in patterns for node in Path("/dev").glob(pattern) if not node.is_dir()))


def _minors() -> list[tuple[str, int]]:
    files = Path("/proc/driver/nvidia/gpus").glob("*/information")
    return nvidia_minors({file.parent.name: file.read_text() for file in files})


def _groups(nodes: Sequence[str]) -> tuple[str, ...]:
    """Return the groups that may open the nodes, where not everybody may."""
    closed = {status.st_gid for status in map(os.stat, nodes) if status.st_gid and not status.st_mode & 0o006}
    known = {group.gr_gid: group.gr_name for group in grp.getgrall()}
    return tuple(sorted(known[gid] for gid in closed & known.keys()))
