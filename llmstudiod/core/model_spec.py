"""What the scheduler must know of a model: its recipe, and the settings where the recipe says nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmstudiod.core.lifecycle import ModelSpec, Restart
from llmstudiod.core.recipe import Recipe, recipe_hash
from llmstudiod.core.settings import Settings
from llmstudiod.core.sharing import relations


@dataclass(frozen=True, slots=True)
class LifecycleDefaults:
    """The daemon's settings that a recipe may override. Seconds and counts."""

    idle_timeout_s: float = 600.0
    drain_timeout_s: float = 60.0
    stall_timeout_s: float = 120.0
    concurrency_limit: int = 0
    max_queue: int = 64
    restart_limit: int = 3
    restart_window_s: float = 600.0
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def lifecycle_defaults(settings: Settings) -> LifecycleDefaults:
    """Return the part of the settings that recipes may override."""
    return LifecycleDefaults(
        idle_timeout_s=settings.idle_timeout,
        drain_timeout_s=settings.drain_timeout,
        stall_timeout_s=settings.load_stall_timeout,
        concurrency_limit=settings.concurrency_limit,
        max_queue=settings.max_queue,
        restart_limit=settings.restart_limit,
        restart_window_s=settings.restart_window,
        groups=settings.groups,
    )


def model_spec(recipe: Recipe, defaults: LifecycleDefaults) -> ModelSpec:
    """Return what the scheduler must know of a recipe."""

    def choose(own: float | None, default: float) -> float:
        return default if own is None else own

    excludes, companions = relations(defaults.groups, recipe.id)
    return ModelSpec(
        id=recipe.id,
        recipe_hash=recipe_hash(recipe),
        priority=recipe.priority,
        is_pinned=recipe.pinned,
        is_kv_unified=recipe.kv_unified,
        idle_timeout_s=choose(recipe.idle_timeout, defaults.idle_timeout_s),
        drain_timeout_s=choose(recipe.drain_timeout, defaults.drain_timeout_s),
        stall_timeout_s=choose(recipe.load_stall_timeout, defaults.stall_timeout_s),
        concurrency_limit=recipe.concurrency_limit or defaults.concurrency_limit,
        max_queue=defaults.max_queue,
        restart=_restart(recipe),
        restart_limit=defaults.restart_limit if recipe.restart_limit is None else recipe.restart_limit,
        restart_window_s=choose(recipe.restart_window, defaults.restart_window_s),
        excludes=excludes,
        companions=companions,
    )


def _restart(recipe: Recipe) -> Restart:
    """Return what the recipe says; one that is to be there before anybody asks comes back by itself."""
    if recipe.restart is not None:
        return Restart(recipe.restart)
    return Restart.ALWAYS if recipe.pinned or recipe.preload else Restart.ON_REQUEST
