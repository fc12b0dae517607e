"""When a model that failed may be started again: back-off with jitter, and a budget of failures.

Each failure in a row doubles or trebles the wait; the first of a model that was ready costs none. Whoever fails
``restart_limit`` times within ``restart_window_s`` has used its budget up: it is left alone until the first of these
failures is that long ago, unless an administrator resets it, its recipe changes, or it has been ready for a minute in
between. 0 is no limit. What failed before there was a process backs off, and that is all: it is no crash.
"""

from math import inf

from llmstudiod.core.lifecycle import Instance, PastFailure, Restart

BACK_OFF_S = (2.0, 5.0, 15.0, 60.0, 300.0)
JITTER = 0.2
STABLE_S = 60.0


def note_failure(instance: Instance, at: float, *, chance: float, is_crash: bool = True) -> None:
    """Count a failure and say when the next start may be; ``chance`` is from 0 to 1, and spreads the starts."""
    spec = instance.spec
    if instance.ready_at and at - instance.ready_at > STABLE_S:
        forget_failures(instance, at)
    instance.ready_at = 0.0
    instance.failures += 1
    wait_s = BACK_OFF_S[min(instance.failures, len(BACK_OFF_S)) - 1]
    instance.retry_at = at + wait_s * (1 + JITTER * chance)
    recent = tuple(each for each in instance.failed_at if each > at - spec.restart_window_s)
    recent += (at,) if is_crash else ()
    instance.failed_at = recent[-spec.restart_limit :] if spec.restart_limit else ()
    instance.is_exhausted = is_crash and bool(spec.restart_limit) and len(instance.failed_at) >= spec.restart_limit
    if instance.is_exhausted:
        instance.retry_at = max(instance.retry_at, instance.failed_at[0] + spec.restart_window_s)
    if spec.restart is Restart.NEVER:
        instance.retry_at = inf


def recall_failures(instance: Instance, past: PastFailure, at: float) -> None:
    """Go on with an earlier daemon's failures; a clock that was wrong keeps it down no longer than others."""
    spec = instance.spec
    instance.failures = past.failures
    instance.failed_at = tuple(each for each in past.failed_at if at - spec.restart_window_s < each <= at)
    instance.retry_at = past.retry_at
    if spec.restart is not Restart.NEVER:
        instance.retry_at = min(past.retry_at, at + max(spec.restart_window_s, BACK_OFF_S[-1]))
    is_over = not spec.restart_limit or len(instance.failed_at) < spec.restart_limit
    instance.is_exhausted = not is_over and instance.retry_at > at


def forget_failures(instance: Instance, at: float) -> None:
    """Let it be started as if it had never failed."""
    instance.failures, instance.failed_at, instance.retry_at, instance.is_exhausted = 0, (), at, False
