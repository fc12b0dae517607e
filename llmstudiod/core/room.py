"""Who may come and who must go, when there is not room for all. Looks at the instances and changes none.

With ``max_instances`` a model that is wanted and not resident needs a place. Wanted models are served in the
order of priority, then of their oldest waiter; each instance that is already leaving is promised to one of them.
Only an idle instance is ever stopped to make room. A busy one is asked to drain once somebody has waited for long;
if that somebody goes away, or another instance falls idle first, it serves on as if nothing had been.
Two rules keep two busy models from throwing each other out without an end: a busy one is not asked while its own
oldest waiter came earlier (it would have the place again at once), and whoever was asked comes back with no more
priority than the one that it made room for.
"""

from collections.abc import Collection

from llmstudiod.core.lifecycle import Instance, State, StopCause
from llmstudiod.core.placement import Placement

Instances = Collection[Instance]


def look(instances: Instances) -> object:
    """Return what is the same for as long as nothing has changed that decides who may come and who must go."""
    return [
        (each.state, not each.in_flight, next(iter(each.waiters), 0), each.is_vetted, each.is_proven, each.stop_cause)
        for each in instances
    ]


def wanted(instances: Instances) -> list[Instance]:
    """Return who has waiters and no process: highest priority first, then whoever has the oldest waiter."""
    found = [instance for instance in instances if instance.waiters and not instance.is_resident]
    return sorted(found, key=lambda instance: (-_rank(instance), oldest_arrival(instance)))


def leaving(instances: Instances) -> list[Instance]:
    """Return who will give its place up."""
    return [instance for instance in instances if instance.state in {State.DRAINING, State.STOPPING}]


def is_anybody_loading(instances: Instances) -> bool:
    """Whether somebody is on the way to what was promised to it."""
    return any(instance.state in {State.STARTING, State.LOADING} for instance in instances)


def recallable(instances: Instances) -> list[Instance]:
    """Return the busy ones that were only asked to go, and may serve on."""
    evicted = StopCause.EVICT
    return [each for each in instances if each.state is State.DRAINING and each.stop_cause is evicted]


def evictable(instances: Instances) -> list[Instance]:
    """Return who stays, and would not have to."""
    staying = {State.STARTING, State.LOADING, State.READY}
    return [instance for instance in instances if instance.state in staying and not instance.spec.is_pinned]


def unused(instances: Instances) -> list[Instance]:
    """Return whom nobody uses: loads that lost their last waiter, then idle ones, the first to go first."""
    candidates = evictable(instances)
    abandoned = [i for i in candidates if i.state in {State.STARTING, State.LOADING} and not i.waiters]
    return abandoned + sorted((i for i in candidates if i.is_idle), key=_eviction_order)


def busy_victims(instances: Instances, *, waited_since: float) -> list[Instance]:
    """Return the busy instances that may be asked to make room for somebody who waits since then, the first first."""
    ready = [each for each in evictable(instances) if each.state is State.READY and not each.is_idle]
    return sorted((i for i in ready if not i.waiters or oldest_arrival(i) > waited_since), key=_eviction_order)


def idle_neighbours(instances: Instances, placement: Placement | None) -> list[Instance]:
    """Return the idle ones on the same GPUs; ``placement`` None: whoever may have a part of a GPU."""
    idle = [each for each in unused(instances) if each.is_idle]
    if placement is None:
        return idle
    gpus = set(placement.gpus)
    return [each for each in idle if each.placement is None or gpus & set(each.placement.gpus)]


def may_try_again(instance: Instance, others: Instances) -> bool:
    """Whether it is worth a second try when ``others`` have gone, or on other GPUs, for somebody who waits."""
    is_placed = instance.placement is not None and bool(instance.placement.gpus)
    return bool(instance.waiters) and not instance.is_second_try and (bool(others) or is_placed)


def idle_since(instance: Instance, instances: Instances, at: float) -> float:
    """Return since when it has been idle, and those that are always loaded with it; ``at`` where one is in use."""
    fellows = [each for each in evictable(instances) if each.spec.id in instance.spec.companions]
    return max(each.idle_since if each.is_idle else at for each in (instance, *fellows))


def oldest_arrival(instance: Instance) -> float:
    """Return when the first of its waiters came."""
    return next(iter(instance.waiters.values())).arrived_at


def _eviction_order(instance: Instance) -> tuple[int, float]:
    """Lowest priority first, then the least recently used; to be loaded counts as a use."""
    return (instance.spec.priority, max(instance.last_used, instance.ready_at))


def _rank(instance: Instance) -> int:
    """Return its priority, no higher than that of whom it yields to; such chains end, since a start clears them."""
    other = instance.yields_to
    if other is None or other.is_resident or not other.waiters:
        return instance.spec.priority
    return min(instance.spec.priority, _rank(other))
