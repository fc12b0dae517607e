"""Carries out what the launcher is asked, with systemd-run and systemctl."""

import grp
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, assert_never

from llmstudiod.core import binary_answers as about
from llmstudiod.core import unit
from llmstudiod.core.bound_file import model_files
from llmstudiod.core.command import DRY_RUN_MARK, ServerBinary, dry_run
from llmstudiod.core.errors import LauncherError
from llmstudiod.core.gpu_nodes import nvidia_minors, with_gpus
from llmstudiod.core.launch import LaunchRequest, launch_request, question, with_fallback
from llmstudiod.core.launcher_protocol import Act, Launch, Request, Verb, Write
from llmstudiod.core.settings import Settings
from llmstudiod.privileged.files import checked, looked_at
from llmstudiod.privileged.store import Store, identity

COMMAND_TIMEOUT_S, QUESTION_TIMEOUT_S = 45.0, 20.0
PIPES: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
GPU_NODES = ("nvidia*", "nvidia-caps/*", "dri/renderD*", "kfd")


class Units:
    """The launcher's verbs. Thread-safe: nothing is kept but what stands in files."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._numbers = itertools.count(1)

    def perform(self, request: Request) -> dict[str, Any]:
        """Do what is asked and return the answer, or raise an LlmstudioError that says why not."""
        settings = self._store.settings()
        match request:
            case Launch():
                wanted = self._request(request, settings)
                if request.verb is Verb.SHOW:
                    return {"command": unit.systemd_run_argv(wanted)}
                if request.verb is Verb.DRY_RUN:
                    return {"output": self._ask(replace(wanted, argv=dry_run(wanted.argv)))[1]}
                if request.verb is Verb.CHECK:
                    return {"complaint": about.complaint(self._ask(replace(wanted, argv=(*wanted.argv, "--version"))))}
                start_unit(wanted)
            case Act(verb=Verb.PROBE):
                return {"binary": self._binary(settings).as_dict()}
            case Act():
                stop_unit(request.id, is_forced=request.verb is Verb.KILL)
            case Write(verb=Verb.PUT_KEYS):
                self._store.put_keys(request.text, settings)
            case Write(verb=Verb.DELETE_RECIPE):
                self._store.delete_recipe(request.name, settings)
            case Write():
                self._store.put_recipe(request.name, request.text, settings)
            case _:
                assert_never(request)
        return {}

    def _request(self, launch: Launch, settings: Settings) -> LaunchRequest:
        """Return all that is started, derived from root's own files; the daemon adds numbers and GPUs."""
        recipe, binary = self._store.recipe(launch, settings), self._binary(settings)
        files = model_files(recipe, launch, settings.model_dirs, os.path)
        request, _ = launch_request(
            recipe, files, binary, recipe_file=launch.file, socket_path=unit.inside_socket_path(recipe.id),
            is_sandboxed=True, decisions=launch.decisions,
        )  # fmt: skip
        gpus = Path("/proc/driver/nvidia/gpus").glob("*/information")
        minors, nodes = nvidia_minors({file.parent.name: file.read_text() for file in gpus}), _gpu_nodes()
        request = with_gpus(request, recipe.gpus, launch.gpus, backends=binary.devices, minors=minors, nodes=nodes)
        bound = checked(request.files, files.chat_template_file, settings.model_dirs)
        hidden, limits = (*settings.model_dirs, settings.recipes_dir), with_fallback(request.limits, launch.memory_max)
        return _with_groups(replace(request, files=bound, hidden=hidden, limits=limits))

    def _binary(self, settings: Settings) -> ServerBinary:
        """Return the binary with what it says of itself; asked again when the file on disk has changed."""
        places = [os.path.join(directory, "llama-server") for directory in os.get_exec_path()]
        variable, on_path = os.environ.get("LLAMA_SERVER_PATH"), next(filter(os.path.isfile, places), None)
        engine = (sys.executable, "-m", "llmstudiod.engine") if find_spec("xllamacpp") else None
        found = about.chosen_binary(setting=settings.llama_server, variable=variable, on_path=on_path, engine=engine)
        real = os.path.realpath(found.argv[0])
        about.refuse_program(found, *looked_at(real), is_sandboxed=True)
        # A backend or a driver that is installed later brings devices, and the binary stays the same.
        backends = [*Path("/usr/lib").glob("*/ggml/backends*"), *Path(real).parent.glob("libggml*")]
        nodes = tuple(_gpu_nodes())
        seen = [*found.argv, *map(identity, [real, *sorted(map(str, backends))]), *nodes]
        kept = self._store.kept("binary.json")
        if kept and kept.get("identity") == seen:
            return ServerBinary.from_dict(kept["binary"])
        # It sees every GPU, and may execute what it likes, but in the sandbox.
        asked = [_with_groups(replace(question([*found.argv, flag]), devices=nodes)) for flag in about.QUESTIONS]
        answers = dict(zip(about.QUESTIONS, map(self._ask, asked), strict=True))
        _, libraries = self._ask(question(["/usr/bin/ldd", real]))
        paths = (*about.executables(real, libraries), *((sys.prefix,) if found.is_engine else ()))
        binary = replace(about.described(found, answers), executables=paths)
        self._store.keep("binary.json", {"identity": seen, "binary": binary.as_dict()})
        return binary

    def _ask(self, wanted: LaunchRequest) -> about.Answer:
        """Return how it ended and what it printed; a dry run is ended before it takes what it has counted."""
        name, output = f"llmstudio-question-{os.getpid()}-{next(self._numbers)}.service", ""
        with subprocess.Popen(unit.question_argv(wanted, unit=name, timeout_s=QUESTION_TIMEOUT_S), **PIPES) as process:
            for line in process.stdout or ():
                output += line.decode(errors="replace")
                if DRY_RUN_MARK.encode() in line:
                    _run("systemctl", "kill", "--signal=SIGKILL", name)
        return process.returncode, output


def start_unit(request: LaunchRequest) -> None:
    """Start a model's unit and return when its program is being executed; LauncherError when systemd has not."""
    argv = unit.systemd_run_argv(request)
    code, output = _run(*argv)
    if code and "already loaded" in output:  # a run of before, which the daemon does not watch
        if unit.runs_as_asked(_run(*unit.show_argv(request.model_id))[1], request):
            return  # it was asked for by a daemon that ended before it had the answer
        stop_unit(request.model_id, is_forced=False)
        code, output = _run(*argv)
    if code:
        raise LauncherError(output.strip()[:2000], details={"program": request.argv[0]})


def stop_unit(model_id: str, *, is_forced: bool) -> None:
    """Stop a model's unit and free its name; one that is not there is stopped. LauncherError when systemd has not."""
    if is_forced:
        _run("systemctl", "kill", "--signal=SIGKILL", unit.unit_name(model_id))
    code, output = _run(*unit.stop_argv(model_id))
    _run("systemctl", "reset-failed", unit.unit_name(model_id))
    if code not in (0, 5):  # 5: it is not loaded; systemctl(1), "Exit Status"
        raise LauncherError(output.strip() or f"systemctl ended with {code}")


def _run(*argv: str) -> about.Answer:
    """Run a command of systemd's; return its exit code and what it printed."""
    try:
        done = subprocess.run(argv, check=False, timeout=COMMAND_TIMEOUT_S, **PIPES)
    except subprocess.TimeoutExpired:
        return 124, f"{argv[0]} did not answer within {COMMAND_TIMEOUT_S:.0f} s"
    return done.returncode, done.stdout.decode(errors="replace")


def _gpu_nodes() -> list[str]:
    """Return the nodes of all GPUs. What is missing at a unit's start stays forbidden to it, so CUDA's are made now."""
    if os.path.exists("/dev/nvidiactl") and not os.path.exists("/dev/nvidia-uvm"):
        # In a unit of its own, since the launcher may load no driver.
        _run("systemd-run", "--quiet", "--wait", "--collect", "--no-ask-password", "nvidia-modprobe", "-u", "-c=0")
    return sorted(str(node) for kind in GPU_NODES for node in Path("/dev").glob(kind) if not node.is_dir())


def _with_groups(request: LaunchRequest) -> LaunchRequest:
    """Return the request with the groups that may open its nodes, where not everybody may."""
    closed = {node.st_gid for node in map(os.stat, request.devices) if node.st_gid and not node.st_mode & 0o006}
    return replace(request, device_groups=tuple(sorted(g.gr_name for g in grp.getgrall() if g.gr_gid in closed)))
