"""From a recipe to a launch: files found and checked, command line built, the binary's own parser asked.

Everything is checked before anything is started or evicted, so that a broken recipe costs nobody else anything.
"""

import asyncio
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmstudiod.adapters.binary import check_argv, find_binary, probe_binary
from llmstudiod.adapters.gguf_file import HeaderCache
from llmstudiod.adapters.model_files import resolve_model
from llmstudiod.adapters.settings import Settings
from llmstudiod.core.command import Command, ModelFiles, ServerBinary, build_command
from llmstudiod.core.recipe import Recipe, RecipeEntry, recipe_hash
from llmstudiod.errors import LlmstudioError, LoadFailedError
from llmstudiod.launchers.base import Launcher, LaunchRequest

_LIMIT_PROPERTIES: Mapping[str, str] = {
    "memory_max": "MemoryMax",
    "cpu_weight": "CPUWeight",
    "io_weight": "IOWeight",
    "allowed_cpus": "AllowedCPUs",
    "nice": "Nice",
    "tasks_max": "TasksMax",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be started for a recipe, and what was decided on the way."""

    request: LaunchRequest
    command: Command
    binary: ServerBinary
    alias: str


class Planner:
    """Makes plans; caches what it learned of the binary, of GGUF headers and of command lines found good."""

    def __init__(self, settings: Settings, launcher: Launcher, environment: Mapping[str, str]) -> None:
        self._settings = settings
        self._launcher = launcher
        self._environment = environment
        self._headers = HeaderCache()
        self._binary: tuple[tuple[object, ...], ServerBinary] | None = None
        self._binary_lock = asyncio.Lock()
        self._good_argvs: set[tuple[object, ...]] = set()

    def use_settings(self, settings: Settings) -> None:
        """Take the settings of a reload."""
        self._settings = settings

    async def binary(self) -> ServerBinary:
        """Return the binary with what it says of itself; asked again when the file on disk has changed.

        Raises:
            BinaryError: There is none, or it does not run.
        """
        async with self._binary_lock:
            found = await asyncio.to_thread(find_binary, self._settings.llama_server, self._environment)
            identity = await asyncio.to_thread(_identity, found)
            if self._binary is None or self._binary[0] != identity:
                self._binary = (identity, await probe_binary(found))
                self._good_argvs.clear()
            return self._binary[1]

    async def plan(self, entry: RecipeEntry) -> Plan:
        """Return the plan for a recipe.

        Raises:
            LlmstudioError: A file, a flag, the binary or the socket's path will not do; the message says which.
        """
        recipe = entry.recipe
        files = await asyncio.to_thread(self._find_files, recipe)
        binary = await self.binary()
        socket_path = self._launcher.socket_path(recipe.id)
        is_sandboxed = self._launcher.is_sandboxed
        command = build_command(recipe, files, binary, socket_path=socket_path, is_sandboxed=is_sandboxed)
        await self._check(recipe, files, binary)
        request = LaunchRequest(
            model_id=recipe.id,
            recipe_hash=recipe_hash(recipe),
            recipe_file=entry.file,
            argv=command.argv,
            environment=command.environment,
            socket_path=socket_path,
            files=command.files,
            limits=_limits(recipe),
            needs_gpu=bool(binary.devices) and recipe.gpus != "none",
        )
        return Plan(request, command, binary, recipe.alias)

    async def _check(self, recipe: Recipe, files: ModelFiles, binary: ServerBinary) -> None:
        """Ask the binary's own parser, outside the sandbox: it opens the files that flags name."""
        # The socket has no part in this; a path that is surely short enough keeps the message to the point.
        command = build_command(recipe, files, binary, socket_path="/run/check.sock", is_sandboxed=False)
        key = (*command.argv, *sorted(command.environment.items()))
        if key in self._good_argvs:
            return
        complaint = await check_argv(command.argv, command.environment)
        if complaint is not None:
            raise LoadFailedError(
                f"cannot load '{recipe.id}': llama-server refuses its command line: {complaint}",
                hint=f"see the recipe's fields and extra_args; `llmstudioctl explain {recipe.id}` shows the command",
                details={"failure": "bad_args", "argv": list(command.argv)},
            )
        self._good_argvs.add(key)

    def _find_files(self, recipe: Recipe) -> ModelFiles:
        """Find every file that the recipe names. Reads the disk; runs in a thread."""
        try:
            model = resolve_model(self._locate(recipe.model_path), read=self._headers.read)
            files = ModelFiles(
                model=tuple(str(path) for path in model.shards),
                mmproj=self._other(recipe.mmproj),
                draft_model=self._other(recipe.draft_model),
                chat_template_file=self._other(recipe.chat_template_file),
                lora=tuple(str(self._locate(adapter.path)) for adapter in recipe.lora),
                n_ctx_train=model.header.context_length,
            )
            if self._launcher.is_sandboxed:
                for group in files.groups():
                    for path in group:
                        _check_readable(path)
        except LlmstudioError as error:
            hint = error.hint
            raise LoadFailedError(
                f"cannot load '{recipe.id}': {error.message}", hint=hint, details={"failure": error.kind}
            ) from error
        return files

    def _other(self, path: str | None) -> str | None:
        return None if path is None else str(self._locate(path))

    def _locate(self, path: str) -> Path:
        """Return an absolute path as it is, and a relative one inside the first model directory that has it."""
        given = Path(path)
        if given.is_absolute():
            found = given if given.exists() else None
        else:
            candidates = [Path(directory) / given for directory in self._settings.model_dirs]
            found = next((candidate for candidate in candidates if candidate.exists()), None)
        if found is None:
            searched = "" if given.is_absolute() else f" (looked in {', '.join(self._settings.model_dirs)})"
            raise LoadFailedError(
                f"there is no file '{path}'{searched}",
                hint="see model_path; `ls` the directory, and check its permissions",
                details={"failure": "model_not_found"},
            )
        return found


def _identity(binary: ServerBinary) -> tuple[object, ...]:
    status = Path(binary.argv[0]).stat()
    return (*binary.argv, status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)


def _check_readable(path: str) -> None:
    """A unit has a user of its own, which nobody else knows: the file must be readable for everybody."""
    mode = os.stat(path).st_mode  # noqa: PTH116 - follows the link, as the bind mount will
    if not mode & stat.S_IROTH:
        raise LoadFailedError(
            f"'{path}' has mode {stat.S_IMODE(mode):04o}: the model's own user may not read it",
            hint=f"chmod o+r '{path}'",
            details={"failure": "permission"},
        )


def _limits(recipe: Recipe) -> dict[str, str]:
    values = {name: getattr(recipe.limits, name) for name in _LIMIT_PROPERTIES}
    limits = {_LIMIT_PROPERTIES[name]: str(value) for name, value in values.items() if value is not None}
    if "MemoryMax" in limits:
        limits["MemorySwapMax"] = "0"
    return limits
