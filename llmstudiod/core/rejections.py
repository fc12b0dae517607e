"""What the scheduler tells whoever it turns away."""

from math import inf
from typing import Any

from llmstudiod.core.errors import (
    BackingOffError,
    ConflictError,
    LlmstudioError,
    LoadFailedError,
    LoadStalledError,
    ModelNotFoundError,
    QueueFullError,
    ShuttingDownError,
    UnavailableError,
    UpstreamCrashedError,
)
from llmstudiod.core.events import RequestArrived
from llmstudiod.core.lifecycle import Failure, Instance, State
from llmstudiod.core.units import format_duration


def at_once(instance: Instance | None, event: RequestArrived, *, is_shutting_down: bool) -> LlmstudioError | None:
    """Return what is known against a request before any answer was begun; None: it may wait."""
    if instance is None or instance.is_removed:
        return no_model(event.model)
    if is_shutting_down:
        return shutting_down()
    if event.is_load and not event.is_along:
        return None
    if instance.state is State.FAILED and event.at < instance.retry_at:
        return backing_off(instance, event.at)
    if event.is_load:
        return None  # it is the daemon's own, sends nothing, and takes no request's place
    is_granted_now = instance.state is State.READY and instance.has_room_for(event.cost_tokens)
    if len(instance.waiters) >= instance.spec.max_queue and (instance.waiters or not is_granted_now):
        return queue_full(instance)
    return None


def no_model(model: str) -> LlmstudioError:
    """There is none of this name."""
    return ModelNotFoundError(f"there is no model '{model}'", hint="see `llmstudioctl list`")


def removed(model: str) -> LlmstudioError:
    """Its recipe was removed while somebody waited."""
    return ModelNotFoundError(f"the recipe of '{model}' was removed")


def shutting_down() -> LlmstudioError:
    """The daemon stops."""
    return ShuttingDownError("the daemon is stopping", hint="try again in a moment")


def unloaded(model: str) -> LlmstudioError:
    """An operator does not want it to run."""
    return ShuttingDownError(f"'{model}' was unloaded on request", hint="ask again to load it anew")


def cancelled(model: str) -> LlmstudioError:
    """An operator gave the load up."""
    return ShuttingDownError(f"the load of '{model}' was cancelled", hint="ask again to load it anew")


def nothing_to_cancel(instance: Instance) -> LlmstudioError:
    """It is not being loaded."""
    model = instance.spec.id
    hint = f"`llmstudioctl unload {model}` stops it" if instance.is_resident else None
    return ConflictError(f"'{model}' is not being loaded: it is {instance.state}", hint=hint)


def queue_full(instance: Instance) -> LlmstudioError:
    """As many wait as may wait."""
    return QueueFullError(
        f"{len(instance.waiters)} requests already wait for '{instance.spec.id}'",
        hint="try again later, or raise max_queue",
        details={"retry_after_s": 1},
    )


def backing_off(instance: Instance, at: float) -> LlmstudioError:
    """Its last start has failed a moment ago."""
    model, failure = instance.spec.id, instance.failure
    reason = failure.message if failure else "its last start failed"
    details: dict[str, Any] = {"failure": failure.kind if failure else None}
    clears = f"`llmstudioctl reset {model}` lets it be started at once"
    if instance.retry_at == inf:
        return BackingOffError(
            f"'{model}' is not started again (restart: never): {reason}", hint=clears, details=details
        )
    wait_s = instance.retry_at - at
    details["retry_after_s"] = wait_s + 0.5
    span = format_duration(wait_s) if wait_s >= 60 else f"{max(1, round(wait_s))} s"
    message = f"'{model}' is not started again for {span}"
    if instance.is_exhausted:
        window = format_duration(instance.spec.restart_window_s)
        message += f", since it failed {instance.spec.restart_limit} times within {window}"
    hint = (failure.hint if failure else None) or clears
    return BackingOffError(f"{message}: {reason}", hint=clears if instance.is_exhausted else hint, details=details)


def failed(model: str, failure: Failure, *, was_serving: bool) -> LlmstudioError:
    """It could not be loaded, or it ended."""
    details = {"failure": failure.kind, "lines": list(failure.lines)}
    if was_serving:
        return UpstreamCrashedError(f"'{model}' ended: {failure.message}", hint=failure.hint, details=details)
    return LoadFailedError(f"cannot load '{model}': {failure.message}", hint=failure.hint, details=details)


def stall(instance: Instance) -> Failure:
    """Nothing has moved while it loaded."""
    message = f"'{instance.spec.id}' showed no progress for {instance.spec.stall_timeout_s:.0f} s while loading"
    return Failure("load_stalled", message, "see its log; load_stall_timeout sets the limit")


def stalled(failure: Failure) -> LlmstudioError:
    """The same, for whoever waited."""
    return LoadStalledError(failure.message, hint=failure.hint)


def all_pinned(model: str, max_instances: int) -> LlmstudioError:
    """Every place is taken for good."""
    return UnavailableError(
        f"cannot load '{model}': max_instances is {max_instances}, and all that run are pinned",
        hint="unpin one (pinned: false), or raise max_instances",
    )
