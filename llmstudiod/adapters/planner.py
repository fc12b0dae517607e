"""From a recipe to a launch: files found and checked, command line built, the binary's own parser asked.

Everything is checked before anything is started or evicted, so that a broken recipe costs nobody else anything.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import shlex
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmstudiod.adapters.gguf_file import HeaderCache, opened
from llmstudiod.adapters.learning import Learning
from llmstudiod.adapters.memory_meter import total_ram_bytes
from llmstudiod.adapters.model_files import resolve_model
from llmstudiod.adapters.proc import anonymous_bytes
from llmstudiod.adapters.program import Program
from llmstudiod.adapters.state_db import StateDb
from llmstudiod.core.command import Command, ModelFiles, ServerBinary, cache_ram_mib, can_dry_run
from llmstudiod.core.devices import Device, Machine
from llmstudiod.core.errors import LlmstudioError, LoadFailedError
from llmstudiod.core.gpus import plannable, positions
from llmstudiod.core.launch import Decisions, LaunchRequest, decided, launch_request
from llmstudiod.core.learned import Correction, corrected
from llmstudiod.core.memory import GPU_PROCESS_BYTES, Estimate, Run
from llmstudiod.core.model_shape import ModelShape, model_shape
from llmstudiod.core.needs import default_cache_ram_mib, memory_key, memory_limit, on_the_host, run_of
from llmstudiod.core.placement import Placement, Wish, length_of
from llmstudiod.core.reasons import explain_exit
from llmstudiod.core.recipe import Recipe, RecipeEntry
from llmstudiod.core.settings import Settings
from llmstudiod.launchers.base import Launcher

logger = logging.getLogger(__name__)

# The categories of llmstudiod.core.reasons, so that a fault has one name whether it is met before a start or at it.
_FAILURES: Mapping[str, str] = {
    "model_file_not_found": "model_not_found",
    "model_file_permission": "permission",
}


# What a dry run says for sure: the same would happen to the run itself.
_CERTAIN = frozenset({"bad_model_file", "unsupported_arch", "bad_args", "mmproj", "draft", "lora"})


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be started for a recipe, what was decided on the way, and what it needs in memory, if that is known.

    ``memory_key``: under which what it really needs is kept.
    """

    request: LaunchRequest
    command: Command
    binary: ServerBinary
    alias: str
    estimate: Estimate | None = None
    wish: Wish | None = None
    placement: Placement | None = None
    memory_key: str = ""


@dataclass(frozen=True, slots=True)
class _Found:
    """The files of a recipe, and what their headers say of their sizes."""

    files: ModelFiles
    shape: ModelShape | None
    file_bytes: int
    draft: ModelShape | None
    mmproj_bytes: int
    identities: tuple[str, ...]


class Planner:
    """Makes plans; caches what it learned of GGUF headers and of command lines found good."""

    def __init__(
        self,
        settings: Settings,
        launcher: Launcher,
        program: Program,
        *,
        measure: Callable[[], Machine] | None = None,
        learning: Learning | None = None,
    ) -> None:
        self.learning = learning or Learning(StateDb(None), measure)
        self._measure = measure
        self.backends: tuple[str, ...] = ()
        self._last_gpus: tuple[tuple[str, ...], tuple[Device, ...]] = ((), ())
        self._gpu_fault = ""
        self._settings = settings
        self._launcher = launcher
        self._program = program
        self._headers = HeaderCache()
        self._good: tuple[ServerBinary | None, set[tuple[object, ...]]] = (None, set())
        self._cache_ram_mib = default_cache_ram_mib(total_ram_bytes())

    def use_settings(self, settings: Settings) -> None:
        """Take the settings of a reload."""
        self._settings = settings
        self._program.use_settings(settings)

    async def binary(self) -> ServerBinary:
        """Return the program that serves models.

        Raises:
            BinaryError: There is none, or it does not run.
        """
        binary = await self._program.binary()
        self.backends = binary.devices
        return binary

    def gpus(self) -> tuple[Device, ...]:
        """Return the GPUs on which memory is planned; none where llama-server finds its place itself. Blocks.

        Where they could be measured before and cannot be now, what was promised counts alone: all else seems free.
        """
        if self._measure is None or not self.backends:
            return ()
        machine = self._measure()
        found = plannable(machine, self.backends)
        backends, last = self._last_gpus
        if not found and last and backends == self.backends:
            reason = "; ".join(machine.faults) or "llama-server lists other GPUs than were found"
            if reason != self._gpu_fault:
                logger.warning("the GPUs cannot be measured, so other programs' use is not known: %s", reason)
                self._gpu_fault = reason
            return tuple(replace(each, free=each.total, processes=()) for each in last)
        self._last_gpus, self._gpu_fault = (self.backends, found), ""
        return found

    def has_nvidia(self) -> bool:
        """Whether the machine has a GPU of NVIDIA's, whatever llama-server makes of it. Blocks."""
        return self._measure is not None and any(each.kind == "CUDA" for each in self._measure().devices)

    async def plan(self, entry: RecipeEntry, placement: Placement | None = None, *, is_draft: bool = False) -> Plan:
        """Return the plan for a recipe, where it was placed if that is known.

        ``is_draft``: it is in no file yet. Whoever trusts files alone is not asked about it then.

        Raises:
            LlmstudioError: A file, a flag, the binary or the socket's path will not do; the message says which.
        """
        recipe = entry.recipe
        self._program.wake()
        found = await asyncio.to_thread(self._find_files, entry)
        binary = await self.binary()
        socket_path = self._launcher.socket_path(recipe.id)
        is_sandboxed = self._launcher.is_sandboxed
        try:
            request, command = launch_request(
                recipe,
                found.files,
                binary,
                recipe_file=entry.file,
                socket_path=socket_path,
                is_sandboxed=is_sandboxed,
                decisions=self._decisions(recipe, binary, placement),
            )
        except LoadFailedError as error:
            hint = f"{error.hint or 'see the recipe'} ({_recipe_place(entry)})"
            raise LoadFailedError(error.message, hint=hint, details=error.details) from error
        chosen = decided(recipe, request.decisions)
        run = run_of(chosen, command.context, cache_ram_mib=cache_ram_mib(chosen, binary.known_flags))
        key = memory_key(recipe, found.identities, (*binary.argv, binary.version))
        known = await asyncio.to_thread(self.learning.known, key)
        request, estimate = _with_limit(request, found, run, binary, known)
        wish = _wish(recipe, found, run, binary, await asyncio.to_thread(self.gpus), known)
        if self._program.takes_drafts or not is_draft:
            await self._check(entry, request, binary)
        return Plan(request, command, binary, recipe.alias, estimate, wish, placement, key)

    async def vet(self, entry: RecipeEntry, *, is_thorough: bool, is_draft: bool = False) -> tuple[Wish | None, bool]:
        """Return what a recipe's model needs, None where llama-server finds its place, and whether that is for sure.

        ``is_thorough``: where nothing was learned yet llama-server is asked, which takes 0.1 s and more. ``is_draft``:
        see `plan`.

        Raises:
            LlmstudioError: A file, a flag, the binary or the socket's path will not do; or llama-server cannot load it.
        """
        plan = await self.plan(entry, is_draft=is_draft)
        wish = plan.wish
        if wish is None or wish.correction.source or not can_dry_run(plan.binary):
            return wish, True
        if not is_thorough:
            return wish, False
        output = await self._program.dry_run(plan.request)
        n_devices = len(await asyncio.to_thread(self.gpus)) if wish.gpus is None else len(wish.gpus)
        found = await asyncio.to_thread(self.learning.after_dry_run, plan.memory_key, wish, n_devices, output)
        if found is not None:
            return replace(wish, correction=found), True
        paths = {file.inside: file.host for file in plan.request.files}
        failure = explain_exit(
            result="exit-code", code=1, lines=_messages(output), build=plan.binary.version, paths=paths
        )
        if failure.kind in _CERTAIN:
            details = {"failure": failure.kind, "lines": list(failure.lines[-20:])}
            message = f"cannot load '{entry.recipe.id}': {failure.message}"
            raise LoadFailedError(message, hint=failure.hint, details=details)
        return wish, True

    def learn(self, plan: Plan, log: Sequence[str], pid: int) -> None:
        """Keep what a model that was loaded by a plan really needs. Blocks."""
        if plan.wish is not None and plan.placement is not None:
            used = anonymous_bytes(pid)
            self.learning.after_load(plan.memory_key, plan.wish, plan.placement, log, pid=pid, used=used)

    def _decisions(self, recipe: Recipe, binary: ServerBinary, placement: Placement | None) -> Decisions:
        """Return what is chosen where the recipe leaves it open."""
        has_cache = "--cache-ram" in binary.known_flags and not (recipe.embedding or recipe.rerank)
        cache_ram = self._cache_ram_mib if has_cache else None
        decisions = Decisions(cache_ram=cache_ram)
        if placement is None:
            return decisions
        run = placement.run
        if placement.is_reduced:
            decisions = replace(decisions, max_model_len=length_of(run))
        if recipe.max_num_seqs is None:
            decisions = replace(decisions, max_num_seqs=run.n_seq)
        if not binary.devices or recipe.gpus == "none":
            return decisions
        split = tuple(map(int, run.proportions)) if len(placement.gpus) > 1 and recipe.tensor_split is None else ()
        return replace(decisions, n_gpu_layers=run.n_gpu_layers, tensor_split=split, gpus=placement.uuids)

    async def _check(self, entry: RecipeEntry, request: LaunchRequest, binary: ServerBinary) -> None:
        """Ask the binary's own parser, once for each command line."""
        if self._good[0] is not binary:
            self._good = (binary, set())
        key = (*request.argv, *sorted(request.environment.items()), request.recipe_hash)
        if key in self._good[1]:
            return
        complaint = await self._program.complaint(request)
        if complaint is not None:
            raise LoadFailedError(
                f"cannot load '{entry.recipe.id}': llama-server refuses its command line: {complaint}",
                hint=f"correct {_recipe_place(entry)}; `llmstudioctl explain {entry.recipe.id}` shows the command line",
                details={"failure": "bad_args", "argv": list(request.argv)},
            )
        self._good[1].add(key)

    def _find_files(self, entry: RecipeEntry) -> _Found:
        """Find every file that the recipe names. Reads the disk; runs in a thread."""
        recipe = entry.recipe
        field = "model_path"
        try:
            model = resolve_model(self._locate(recipe.model_path), read=self._headers.read)
            others: dict[str, str | None] = {}
            for field in ("mmproj", "draft_model", "chat_template_file"):
                path = getattr(recipe, field)
                others[field] = None if path is None else self._file(path)
            field = "lora"
            files = ModelFiles(
                model=tuple(str(path) for path in model.shards),
                lora=tuple(self._file(adapter.path) for adapter in recipe.lora),
                n_ctx_train=model.header.context_length,
                **others,
            )
            if self._launcher.is_sandboxed:
                field = "the sandbox"
                for path in itertools.chain.from_iterable(files.groups()):
                    _check_readable(path)
        except LlmstudioError as error:
            failure = error.details.get("failure") or _FAILURES.get(error.kind, error.kind)
            place = f" ({_recipe_place(entry)})" if failure == "model_not_found" else ""
            raise LoadFailedError(
                f"cannot load '{recipe.id}': {field}: {error.message}",
                hint=f"{error.hint or 'see the recipe'}{place}",
                details={"failure": failure},
            ) from error
        draft = None
        if files.draft_model is not None:
            with contextlib.suppress(LlmstudioError):  # llama-server tells what is wrong with it
                header = self._headers.read(Path(files.draft_model))
                draft = model_shape(header.metadata, header.tensors)
        return _Found(
            files,
            shape=model_shape(model.header.metadata, model.tensors),
            file_bytes=model.total_bytes,
            draft=draft,
            mmproj_bytes=_size(files.mmproj),
            identities=tuple(_identity(path) for path in itertools.chain.from_iterable(files.groups())),
        )

    def _file(self, path: str) -> str:
        """Return where a file is that only goes with the model; llama-server reads it, so only its kind is checked."""
        located = self._locate(path)
        with opened(located):
            return str(located)

    def _locate(self, path: str) -> Path:
        """Return an absolute path as it is, and a relative one inside the first model directory that has it."""
        if Path(path).is_absolute():
            return Path(path)
        directories = self._settings.model_dirs
        found = next((place for place in (Path(top) / path for top in directories) if _is_there(place)), None)
        if found is None:
            raise LoadFailedError(
                f"there is no '{path}' in the model directories ({', '.join(directories) or 'none are set'})",
                hint="give the whole path; ~ is not expanded" if path.startswith("~") else "give the whole path",
                details={"failure": "model_not_found"},
            )
        return found


def _size(path: str | None) -> int:
    if path is None:
        return 0
    with opened(Path(path)) as (_, status):
        return status.st_size


def _identity(path: str) -> str:
    with opened(Path(path)) as (_, status):
        return f"{status.st_dev}:{status.st_ino}:{status.st_mtime_ns}:{status.st_size}"


def _messages(output: Sequence[str]) -> list[str]:
    """Return the lines of ``--log-jsonl`` as llama-server's log has them, warnings and less left out."""
    messages = []
    for line in output:
        try:
            logged = json.loads(line)
            text, is_error = str(logged["msg"]), logged["level"] == "error"
        except (ValueError, RecursionError, KeyError, TypeError):
            text, is_error = line, True
        messages += text.splitlines() if is_error else []
    return messages


def _with_limit(
    request: LaunchRequest, found: _Found, run: Run, binary: ServerBinary, known: Correction
) -> tuple[LaunchRequest, Estimate | None]:
    """Return the request with a limit on host memory where the recipe sets none, and the need, if it is known.

    With GPUs the need is an upper bound: whatever goes there is not in RAM.
    """
    if found.shape is None:
        return request, None
    need = corrected(on_the_host(found.shape, run, draft=found.draft, mmproj_bytes=found.mmproj_bytes), known)
    if "MemoryMax" in request.limits:
        return request, need
    gpu = GPU_PROCESS_BYTES * len(binary.devices)
    limit = memory_limit(need, found.shape, run, file_bytes=found.file_bytes) + gpu
    return replace(request, limits={"MemoryMax": str(limit), "MemorySwapMax": "0", **request.limits}), need


def _wish(
    recipe: Recipe, found: _Found, run: Run, binary: ServerBinary, gpus: Sequence[Device], known: Correction
) -> Wish | None:
    """Return what the model needs and what its recipe sets; None where llama-server finds its place itself.

    Raises:
        LoadFailedError: The recipe names a GPU that is not there, or splits the model over more than there are.
    """
    if found.shape is None or recipe.override_tensor:
        return None
    is_on_cpu = not binary.devices or recipe.gpus == "none"
    if not is_on_cpu and not gpus:
        return None
    allowed = () if is_on_cpu else positions(recipe, gpus)
    n_allowed = len(gpus) if allowed is None else len(allowed)
    if not is_on_cpu and len(recipe.tensor_split or ()) > n_allowed:
        message = f"tensor_split has {len(recipe.tensor_split or ())} parts, and there are {n_allowed} GPUs"
        raise LoadFailedError(f"cannot load '{recipe.id}': {message}", hint="give one part for each GPU")
    if recipe.main_gpu is not None and (recipe.split_mode == "none" or recipe.tensor_parallel_size == 1):
        allowed = _main_gpu(recipe, range(len(gpus)) if allowed is None else allowed)
    layers = {"auto": None, "all": found.shape.n_layers + 1}
    return Wish(
        recipe.id,
        found.shape,
        run,
        gpus=allowed,
        max_gpus=recipe.tensor_parallel_size,
        n_gpu_layers=layers[recipe.n_gpu_layers] if isinstance(recipe.n_gpu_layers, str) else recipe.n_gpu_layers,
        tensor_split=recipe.tensor_split,
        split_mode=recipe.split_mode,
        is_context_open=recipe.max_model_len is None,
        are_slots_open=recipe.max_num_seqs is None,
        correction=known,
        draft=found.draft,
        mmproj_bytes=found.mmproj_bytes,
    )


def _main_gpu(recipe: Recipe, allowed: Sequence[int]) -> tuple[int, ...]:
    """Return the one that a recipe names among those that it allows."""
    if recipe.main_gpu is None or not allowed:
        return tuple(allowed)
    if recipe.main_gpu >= len(allowed):
        message = f"main_gpu: expected 0 to {len(allowed) - 1}, a place among the GPUs that it may use"
        raise LoadFailedError(
            f"cannot load '{recipe.id}': {message}, found {recipe.main_gpu}", hint="`llmstudioctl gpus` shows them"
        )
    return (allowed[recipe.main_gpu],)


def _recipe_place(entry: RecipeEntry) -> str:
    if entry.file is None:
        return "the model's file: it has no recipe"
    return f"the recipe in {entry.file}:{entry.line}" if entry.line else f"the recipe in {entry.file}"


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError:
        return True  # opening it tells why it cannot be had
    return True


def _check_readable(path: str) -> None:
    """A unit has a user of its own, which nobody else knows: the file must be readable for everybody."""
    with opened(Path(path)) as (_, status):  # follows the link, as the bind mount will
        mode = status.st_mode
    if not mode & stat.S_IROTH:
        raise LoadFailedError(
            f"'{path}' has mode {stat.S_IMODE(mode):04o}: the model's own user may not read it",
            hint=f"chmod o+r {shlex.quote(path)}",
            details={"failure": "permission"},
        )
