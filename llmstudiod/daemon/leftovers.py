"""Servers that run though this daemon did not start them: an earlier one's, or a start that it still asked for.

One with a recipe is taken over. One without is stopped, but not at first sight: recipes that were moved away for a
moment, or a disk that is mounted late, are no wish to end a model.
"""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable

from llmstudiod.core.errors import LlmstudioError
from llmstudiod.core.recipe import Severity
from llmstudiod.launchers.base import FoundUnit, Launcher
from llmstudiod.supervisor import Supervisor

FIRST_LOOKS_S, LOOK_S = (2.0, 8.0, 20.0), 60.0
GRACE_S = 30.0

logger = logging.getLogger("llmstudiod")


class Leftovers:
    """Looks for such servers, at the start and now and then; knows which of them have no recipe, and since when.

    ``reload`` reads the recipes again; ``can_read_recipes`` tells whether their directory can be read at all.
    """

    def __init__(
        self,
        launcher: Launcher,
        supervisor: Supervisor,
        *,
        clock: Callable[[], float],
        reload: Callable[[], Awaitable[None]],
        can_read_recipes: Callable[[], Awaitable[bool]],
    ) -> None:
        self._launcher, self._supervisor, self._clock = launcher, supervisor, clock
        self._reload, self._can_read_recipes = reload, can_read_recipes
        self._unknown_since: dict[tuple[str, str], float] = {}  # by model and run
        self._known_now = asyncio.Event()

    @property
    def any_unknown(self) -> bool:
        """Whether a server runs that has no recipe."""
        return bool(self._unknown_since)

    async def adopt(self) -> None:
        """Take over the servers that an earlier daemon left; before the first request, which would start them anew."""
        try:
            running = await self._launcher.find_running()
        except LlmstudioError as error:
            logger.error("%s", error)  # noqa: TRY400 - no bug
            return
        for found in running:
            if not self._is_unknown(found):
                await self._supervisor.adopt(found)
        self._note([found for found in running if self._is_unknown(found)])

    async def keep_looking(self) -> None:
        """Look now and then, and at once when the recipe of one that had none is there."""
        if not self._launcher.outlives_us:
            return
        for pause_s in itertools.chain(FIRST_LOOKS_S, itertools.repeat(LOOK_S)):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._known_now.wait()
            self._known_now.clear()
            await self.look()

    def recipes_were_read(self) -> None:
        """Have those taken over at once that have a recipe by now."""
        if any(self._supervisor.view(model) is not None for model, _ in self._unknown_since):
            self._known_now.set()

    async def look(self) -> None:
        """Take over what came up behind our back, and stop what has had no recipe for long enough."""
        down = {shown.id: shown.since for shown in self._supervisor.views() if not shown.is_resident}
        try:
            running = await self._launcher.find_running()
        except LlmstudioError as error:
            logger.warning("%s", error)
            return
        for found in running:
            model = found.unit.model_id
            shown = self._supervisor.view(model)
            # Unless something has happened to it meanwhile.
            if shown is not None and down.get(model) == shown.since and not shown.is_resident:
                logger.warning(
                    "%s: %s runs, and was not started by this daemon: it is taken over", model, found.unit.name
                )
                await self._supervisor.adopt(found)
        unknown = [found for found in running if self._is_unknown(found)]
        self._note(unknown)
        until = self._clock() - GRACE_S
        due = [found for found in unknown if self._unknown_since[_run(found)] <= until and not self._is_faulty(found)]
        if due and await self._can_read_recipes():
            await self._reload()  # a change that nobody has noticed yet
            for found in due:
                if self._is_unknown(found) and not self._is_faulty(found) and await self._can_read_recipes():
                    await self._stop(found.unit.model_id)

    def _is_unknown(self, found: FoundUnit) -> bool:
        return self._supervisor.view(found.unit.model_id) is None

    def _is_faulty(self, found: FoundUnit) -> bool:
        """Return whether a recipe of this name is there, though it cannot be read: mending it brings it back."""
        model = found.unit.model_id
        faults = self._supervisor.catalogue.faults
        return any(fault.severity is Severity.FAULT and model in {fault.recipe_id, *fault.claims} for fault in faults)

    def _note(self, unknown: list[FoundUnit]) -> None:
        before, now = self._unknown_since, self._clock()
        self._unknown_since = {_run(found): before.get(_run(found), now) for found in unknown}
        for model, _ in self._unknown_since.keys() - before.keys():
            logger.warning("%s: it runs, and no recipe has this name: unless one has, it is stopped soon", model)

    async def _stop(self, model: str) -> None:
        logger.warning("%s: it runs, but there is no such recipe any more: it is stopped", model)
        try:
            await self._launcher.stop(model, is_forced=False)
        except LlmstudioError as error:
            logger.error("%s", error)  # noqa: TRY400 - no bug


def _run(found: FoundUnit) -> tuple[str, str]:
    return found.unit.model_id, found.unit.invocation_id
