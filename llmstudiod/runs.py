"""The servers outside the core: each run of a model is planned, started, probed, watched and stopped here.

What happens is told to the supervisor as events; nothing is decided here but how a server is asked.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from llmstudiod.adapters import probe
from llmstudiod.adapters.planner import Plan, Planner
from llmstudiod.adapters.probe import NotOurs, SlotsSeen
from llmstudiod.adapters.proc import Pulse
from llmstudiod.core.errors import LlmstudioError
from llmstudiod.core.events import (
    BecameReady,
    Event,
    LoadProgressed,
    PlanVetted,
    StartUnit,
    StopUnit,
    UnitFailed,
    UnitGone,
    UnitHung,
    UnitStarted,
    VetPlan,
    Warned,
    WatchUnit,
)
from llmstudiod.core.lifecycle import Failure, InstanceView
from llmstudiod.core.load_log import Expected, expected, read_load
from llmstudiod.core.reasons import explain_exit
from llmstudiod.core.recipe import Recipe, RecipeEntry, recipe_hash
from llmstudiod.core.vigil import Alarms, Look, Movement, Verdict, Vigil
from llmstudiod.launchers.base import FoundUnit, Launcher, Unit

logger = logging.getLogger(__name__)

PROGRESS_PERIOD_S, DESERTED_S = 0.5, 5.0
LOG_LINES, LOG_TRIES, LOG_LAG_S = 1000, 4, 0.5  # a load writes some fifty, and the journal is late
BUSY_LOOK_S, IDLE_LOOK_S, SOON_S = 5.0, 15.0, 1.0
TOKEN_S, KEPT_WITHIN_S = 30.0, 0.5
STOP_PAUSES_S = (0.5, 2.0, 0.0)
HUNG_HINT = "a request starts it anew, where its recipe lets it; its log and `dmesg` may tell why"
INTERNAL = Failure("internal", "an internal error, see the daemon's log")

Spawn = Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]


class Upstreams(Protocol):
    """The proxy's connections, as far as the supervisor must steer them."""

    def open(self, model: str, run: int, socket_path: str) -> None:
        """Allow connections to this run's socket."""

    def close(self, model: str, run: int) -> None:
        """Cut every connection of this run; exchanges in flight end with an error."""


@dataclass(slots=True)
class Run:
    """The present run of a model, outside the core."""

    number: int
    task: asyncio.Task[None] | None = None
    plan: Plan | None = None
    recipe: Recipe | None = None  # that it was started with; None: not known any more
    alias: str | None = None  # the name that the server knows itself by; None: a recipe of before said which
    unit: Unit | None = None
    is_ready: bool = False  # it was, and clients may have written into its log since
    verdict: Failure | None = None  # what we found out ourselves; it explains the end that we then bring about
    kept: Future[None] | None = None  # where its model lies is on the disk, or cannot be
    launched: asyncio.Event = field(default_factory=asyncio.Event)


class Runs:
    """One run for each model at most; ``post`` takes the events, ``spawn`` the tasks."""

    def __init__(
        self,
        *,
        launcher: Launcher,
        planner: Planner,
        upstreams: Upstreams,
        pulse: Callable[[Unit], Pulse],
        clock: Callable[[], float],
        entry: Callable[[str], RecipeEntry],
        view: Callable[[str], InstanceView | None],
        post: Callable[[Event], None],
        spawn: Spawn,
    ) -> None:
        self._launcher = launcher
        self._planner = planner
        self._upstreams = upstreams
        self._pulse = pulse
        self._clock = clock
        self._entry = entry
        self._view = view
        self._post = post
        self._spawn = spawn
        self._runs: dict[str, Run] = {}
        self._found: dict[str, FoundUnit] = {}

    def of(self, model: str) -> Run | None:
        """Return the present run of a model, or the last one."""
        return self._runs.get(model)

    def found(self, unit: FoundUnit) -> None:
        """Remember a unit of an earlier daemon; `watch` will ask for it."""
        self._found[unit.unit.model_id] = unit

    def start(self, action: StartUnit) -> None:
        """Begin a run."""
        before = self._runs.get(action.model)
        run = self._runs[action.model] = Run(action.run)
        run.task = self._spawn(self._start(action, run, before.unit if before else None), f"start {action.model}")

    def watch(self, action: WatchUnit) -> None:
        """Go on with a unit that was found."""
        run = self._runs[action.model] = self._adopted(action)
        run.task = self._spawn(self._watch(action.model, run), f"watch {action.model}")

    def stop(self, action: StopUnit) -> None:
        """End a run."""
        _ = self._spawn(self._stop(action), f"stop {action.model}")

    def vet(self, action: VetPlan) -> None:
        """Make a plan without carrying it out."""
        _ = self._spawn(self._vet(action), f"check {action.model}")

    def _adopted(self, action: WatchUnit) -> Run:
        found = self._found.pop(action.model)
        entry = self._entry(action.model)
        is_same = found.recipe_hash == recipe_hash(entry.recipe)
        run = Run(action.run, unit=found.unit, alias=entry.recipe.alias if is_same else None)
        run.launched.set()
        run.recipe = entry.recipe if is_same else None
        return run

    async def _vet(self, action: VetPlan) -> None:
        """Make the plan without carrying it out."""
        failure: Failure | None = INTERNAL
        wish, is_proven = None, True
        try:
            wish, is_proven = await self._planner.vet(self._entry(action.model), is_thorough=action.is_thorough)
            failure = None
        except LlmstudioError as error:
            failure = _failure_of(error)
        finally:
            self._post(PlanVetted(self._clock(), action.model, action.recipe_hash, failure, wish, is_proven))

    async def _start(self, action: StartUnit, run: Run, before: Unit | None) -> None:
        """Plan and start, then watch: the whole life of one run."""
        model = action.model
        try:
            entry = self._entry(model)
            run.plan = await self._planner.plan(entry, action.placement)
            run.recipe, run.alias = entry.recipe, entry.recipe.alias
            run.unit = await self._launcher.start(run.plan.request)
        except LlmstudioError as error:
            self._failed(model, run.number, _failure_of(error))
            return
        except Exception:  # a bug must fail the start, not leave its waiters hanging
            self._failed(model, run.number, INTERNAL)
            raise
        finally:
            run.launched.set()
        logger.info("%s: %s was started, pid %d", model, run.unit.name, run.unit.pid)
        self._post(UnitStarted(self._clock(), model, run.number))
        if self._launcher.outlives_us and before is not None:  # it is over for sure: it had the same name
            self._planner.learning.forget(before.invocation_id)
        if self._launcher.outlives_us and action.placement is not None:
            run.kept = self._planner.learning.remember(run.unit.invocation_id, action.placement)
        await self._watch(model, run)

    async def _watch(self, model: str, run: Run) -> None:
        """Wait until a unit that runs is ready, then for its end."""
        unit = run.unit
        assert unit is not None
        readiness = self._spawn(self._await_ready(model, run), f"probe {model}")
        try:
            end = await self._launcher.wait(unit)
        except Exception:  # whatever it is, a server that nobody watches must not be taken for a ready one
            await self._stop_unit(model, is_forced=True)
            self._failed(model, run.number, INTERNAL)
            raise
        finally:
            readiness.cancel()
            self._upstreams.close(model, run.number)
        plan = run.plan or await self._plan_again(model, run)
        failure = run.verdict or explain_exit(
            result=end.result, code=end.code, signal=end.signal, lines=end.lines,
            build=plan.binary.version if plan else None, was_ready=run.is_ready, paths=_paths(plan),
        )  # fmt: skip
        self._failed(model, run.number, failure)

    async def _plan_again(self, model: str, run: Run) -> Plan | None:
        """Return how a server that was found had been started, for the names of its files; None: not known any more.

        Only a load that failed names any; of others the reason must not wait for this.
        """
        if run.recipe is None or run.is_ready or run.verdict is not None:
            return None
        try:
            return await self._planner.plan(self._entry(model))
        except LlmstudioError:
            return None  # its file may be the very thing that is gone
        except Exception:  # a bug must not swallow the end that others wait for
            logger.exception("%s: its plan cannot be made again", model)
            return None

    def _failed(self, model: str, run: int, failure: Failure) -> None:
        self._post(UnitFailed(self._clock(), model, run, failure))

    async def _await_ready(self, model: str, run: Run) -> None:
        assert run.unit is not None
        socket_path = self._launcher.socket_path(model)
        watchers = [self._spawn(self._watch_progress(model, run), f"progress {model}")]
        if run.plan is None:
            watchers.append(self._spawn(self._miss_socket(model, run, socket_path), f"socket of {model}"))
        try:
            facts = await probe.wait_ready(socket_path, alias=run.alias)
        finally:
            for watcher in watchers:
                watcher.cancel()
        if isinstance(facts, NotOurs):
            message = f"'{facts.alias}' answers at its socket instead of '{run.alias}'"
            run.verdict = Failure("socket", message, "is another server using this socket?")
            await self._stop_unit(model, is_forced=True)
            return
        if run.kept is not None:  # since long, as a rule: a daemon that is killed now leaves the next one its promise
            await asyncio.wait([asyncio.wrap_future(run.kept)], timeout=KEPT_WITHIN_S)
        run.is_ready = True
        self._upstreams.open(model, run.number, socket_path)
        self._post(BecameReady(self._clock(), model, run.number, facts))
        vigil = self._spawn(self._keep_vigil(model, run, socket_path), f"vigil over {model}")
        try:
            try:
                await self._heed_load(model, run)
            except Exception:  # whatever it is, the vigil must outlast it
                logger.exception("%s: the log of its load cannot be read", model)
            await vigil
        finally:
            vigil.cancel()

    async def _miss_socket(self, model: str, run: Run, socket_path: str) -> None:
        """Tell when a server that was found has lost its socket: it runs, does nothing, and nobody can reach it."""
        assert run.unit is not None
        since, last = self._clock(), None
        while self._clock() - since < DESERTED_S:
            mark = (await asyncio.to_thread(self._pulse, run.unit)).mark
            # One that was started a moment ago does not listen yet, and loads drivers for longer than that.
            if mark != last or not probe.is_deserted(socket_path):
                since, last = self._clock(), mark
            await asyncio.sleep(PROGRESS_PERIOD_S)
        failure = Failure("socket", "nobody listens at its socket, though it runs", "was the socket removed?")
        logger.error("%s: %s: it is started anew", model, failure.message)
        self._post(UnitHung(self._clock(), model, run.number, failure))

    async def _heed_load(self, model: str, run: Run) -> None:
        """Read the log of a load that is over: what is not as it was asked for, and what the model needed."""
        assert run.unit is not None
        learning, invocation_id, plan = self._planner.learning, run.unit.invocation_id, run.plan
        lines: list[str] = []
        told = await asyncio.to_thread(learning.recall_warnings, invocation_id) if plan is None else None
        if told is None:
            if not (lines := await self._load_lines(run.unit)):
                return
            told = read_load(lines, await self._expected(model, run)).warnings
        if told:
            self._post(Warned(self._clock(), model, run.number, told))
        for warning in told:
            logger.warning("%s: %s", model, warning)
        if lines and self._launcher.outlives_us:
            learning.remember_warnings(invocation_id, told)
        # Once for each file, settings and build: it counts instead of the estimate.
        if plan and plan.wish and plan.placement and not plan.wish.correction.is_of_a_run:
            await asyncio.to_thread(self._planner.learn, plan, lines, run.unit.pid)

    async def _load_lines(self, unit: Unit) -> list[str]:
        """Return the lines of a load that is over; none where they have scrolled away."""
        for _ in range(LOG_TRIES):
            lines = await self._launcher.first_lines(unit, limit=LOG_LINES)
            if any("listening on" in line for line in lines):  # all of the load has been logged then
                return lines
            await asyncio.sleep(LOG_LAG_S)
        return []

    async def _expected(self, model: str, run: Run) -> Expected:
        """Return what a start asked for, as far as that is known."""
        shown = self._view(model)
        if run.recipe is None or shown is None:
            return Expected()
        with contextlib.suppress(LlmstudioError):
            await self._planner.binary()  # it says which GPUs it sees
        lists_gpus = bool(self._planner.backends)
        has_gpus = lists_gpus or await asyncio.to_thread(self._planner.has_nvidia)
        return expected(run.recipe, shown.placement, lists_gpus=lists_gpus, has_gpus=has_gpus)

    async def _keep_vigil(self, model: str, run: Run, socket_path: str) -> None:
        """Look after a ready server for as long as it runs; tell when it does not answer any more."""
        shown = self._view(model)
        vigil = Vigil(self._clock(), patience_s=shown.spec.stall_timeout_s if shown else 120.0)
        verdict, alarms = Verdict.WELL, Alarms()
        while verdict is not Verdict.HUNG:
            shown = self._view(model)
            if shown is None or shown.run != run.number:
                return
            is_busy = shown.in_flight > 0
            await asyncio.sleep(SOON_S if verdict is Verdict.WAIT else BUSY_LOOK_S if is_busy else IDLE_LOOK_S)
            assert run.unit is not None
            is_alarmed = alarms.are_new(self._launcher.told(run.unit), self._launcher.n_told(run.unit))
            verdict = vigil.look(await self._look(model, run, socket_path, is_alarmed=is_alarmed))
            if verdict is Verdict.ASK:
                is_embedding = run.recipe is not None and (run.recipe.embedding or run.recipe.rerank)
                answered = await probe.produces_a_token(socket_path, is_embedding=is_embedding, within_s=TOKEN_S)
                look = await self._look(model, run, socket_path)
                verdict = vigil.asked(look, has_answered=answered, within_s=TOKEN_S)
        failure = Failure("hung", f"it does not answer any more: {vigil.reason}", HUNG_HINT, tuple(alarms.last))
        logger.error("%s: %s", model, failure.message)
        self._post(UnitHung(self._clock(), model, run.number, failure))

    async def _look(self, model: str, run: Run, socket_path: str, *, is_alarmed: bool = False) -> Look:
        assert run.unit is not None
        status, _ = await probe.get(socket_path, "/health")
        shown = self._view(model)
        n_in_flight = shown.in_flight if shown else 0
        slots = await probe.slots(socket_path) if status and n_in_flight else SlotsSeen(None, 0)
        pulse = await asyncio.to_thread(self._pulse, run.unit)
        return Look(
            at=self._clock(),
            answers=status != 0,
            n_in_flight=n_in_flight,
            slots=slots.progress if slots else None,
            is_mute=slots is None,
            n_free=slots.n_free if slots else 0,
            cpu_s=pulse.cpu_s,
            is_stopped=pulse.is_stopped,
            is_alarmed=is_alarmed,
        )

    async def _watch_progress(self, model: str, run: Run) -> None:
        """Tell the scheduler whenever something moves in a loading server, so that only a standstill counts."""
        unit = run.unit
        assert unit is not None
        shown = self._view(model)
        movement = Movement(self._clock(), patience_s=shown.spec.stall_timeout_s if shown else 120.0)
        n_bytes = await asyncio.to_thread(_file_bytes, run.plan)
        while True:
            seen = await asyncio.to_thread(self._pulse, unit)
            lines = self._launcher.told(unit)
            mark = (seen.mark, self._launcher.n_told(unit))
            if movement.is_seen(self._clock(), mark, cpu_s=seen.cpu_s):
                facts = read_load(lines, Expected())
                in_memory = min(0.95, (seen.resident or 0) / n_bytes) if n_bytes else 0.0
                progress = max(facts.progress, in_memory)
                self._post(LoadProgressed(self._clock(), model, run.number, progress, facts.stage))
            await asyncio.sleep(PROGRESS_PERIOD_S)

    async def _stop(self, action: StopUnit) -> None:
        """Stop a run, also one that is only just being started."""
        run = self._runs.get(action.model)
        self._upstreams.close(action.model, action.run)
        if run is not None and run.task is not None:
            if run.plan is None:
                run.task.cancel()  # planning can be dropped
            # A systemd-run under way is left to finish, so that there is a unit to stop.
            launched = self._spawn(_wait_for(run.launched), f"launch of {action.model}")
            await asyncio.wait({run.task, launched}, return_when=asyncio.FIRST_COMPLETED)
            launched.cancel()
        await self._stop_unit(action.model, is_forced=action.is_forced)
        if run is not None and run.task is not None:
            run.task.cancel()
        self._post(UnitGone(self._clock(), action.model, action.run))

    async def _stop_unit(self, model: str, *, is_forced: bool) -> None:
        """Stop a model's unit, more than once if need be: systemd may be restarting itself.

        A failure is told and no more: whoever waits for the end must not wait for ever.
        """
        for pause_s in STOP_PAUSES_S:
            try:
                await self._launcher.stop(model, is_forced=is_forced)
            except LlmstudioError as error:
                logger.error("%s: cannot be stopped: %s", model, error)  # noqa: TRY400 - a user's error, no bug
                await asyncio.sleep(pause_s)
            except Exception:
                logger.exception("%s: cannot be stopped", model)
                return
            else:
                return


def _paths(plan: Plan | None) -> dict[str, str]:
    """Return the names of a server's files outside by the ones inside."""
    return {file.inside: file.host for file in plan.request.files} if plan else {}


def _file_bytes(plan: Plan | None) -> int:
    """Return how much a load has to read, as far as that is known."""
    paths = [file.host for file in plan.request.files] or [plan.request.model_path] if plan else []
    try:
        return sum(Path(path).stat().st_size for path in paths if path)
    except OSError:
        return 0


async def _wait_for(event: asyncio.Event) -> None:
    await event.wait()


def _failure_of(error: LlmstudioError) -> Failure:
    message = error.message.partition(": ")[2] if error.message.startswith("cannot load '") else error.message
    lines: Mapping[str, Any] = error.details
    kind, told = str(lines.get("failure") or error.kind), tuple(lines.get("lines", ()))
    return Failure(kind, message, error.hint, told, never_ran=True)
