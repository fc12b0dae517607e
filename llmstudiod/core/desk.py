"""Where each request is: waiting in one instance, in flight in one instance, or gone.

The scheduler's desk for requests. It grants in the order in which they came, and counts them.
"""

from dataclasses import asdict, dataclass

from llmstudiod.core.errors import LlmstudioError
from llmstudiod.core.events import Action, Done, Grant, Refuse, RequestArrived
from llmstudiod.core.lifecycle import Instance, State, Waiter


@dataclass(slots=True)
class Counts:
    """What became of the requests since the daemon's start; loads by hand are not among them.

    ``arrived == granted + refused + left + waiting`` and ``granted == ended + in_flight``, in every moment.
    """

    arrived: int = 0
    granted: int = 0
    refused: int = 0
    left: int = 0  # their clients went away while they waited
    ended: int = 0


class Desk:
    """Holds the tickets; ``actions`` is where the answers go."""

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self.counts = Counts()
        self._waiting_in: dict[int, Instance] = {}
        self._flying_in: dict[int, tuple[Instance, int]] = {}

    @property
    def is_anybody_waiting(self) -> bool:
        """Whether there is a waiter anywhere."""
        return bool(self._waiting_in)

    def counted(self) -> dict[str, int]:
        """Return the counts by name, with who waits and who is in flight now."""
        waiting = sum(not self._is_load(ticket) for ticket in self._waiting_in)
        return {**asdict(self.counts), "waiting": waiting, "in_flight": len(self._flying_in)}

    def _is_load(self, ticket: int) -> bool:
        return self._waiting_in[ticket].waiters[ticket].is_load

    def turn_away(self, event: RequestArrived, refusal: LlmstudioError) -> None:
        """Refuse who has just come."""
        if not event.is_load:
            self.counts.arrived += 1
            self.counts.refused += 1
        self.actions.append(Refuse(event.ticket, refusal))

    def arrive(self, instance: Instance, event: RequestArrived) -> None:
        """Grant at once, or let it wait."""
        if not event.is_load:
            self.counts.arrived += 1
        may_pass = instance.state is State.READY and not instance.waiters and not event.is_load
        if may_pass and instance.has_room_for(event.cost_tokens):
            self._grant(instance, event.ticket, event.cost_tokens, event.at)
            return
        waiter = Waiter(event.ticket, event.at, event.cost_tokens, event.is_load, event.is_along)
        instance.waiters[event.ticket] = waiter
        self._waiting_in[event.ticket] = instance
        self.admit(instance, event.at)

    def admit(self, instance: Instance, at: float) -> None:
        """Grant waiters in their order for as long as there is room for the first; a load has what it wants at once."""
        if instance.state is not State.READY:
            return
        for waiter in list(instance.waiters.values()):
            if waiter.is_load:
                self._leave_queue(instance, waiter)
                self.actions.append(Done(waiter.ticket))
        while instance.waiters:
            waiter = next(iter(instance.waiters.values()))
            if not instance.has_room_for(waiter.cost_tokens):
                return
            self._leave_queue(instance, waiter)
            self._grant(instance, waiter.ticket, waiter.cost_tokens, at)

    def leave(self, ticket: int) -> Instance | None:
        """Take a waiter away whose client has gone; return where it waited, or None if it did not wait."""
        instance = self._waiting_in.pop(ticket, None)
        if instance is None:
            return None
        if not instance.waiters.pop(ticket).is_load:
            self.counts.left += 1
        return instance

    def end(self, ticket: int) -> Instance | None:
        """Take a ticket back that was in flight; return whose, or None if that run is over, or it was not in flight."""
        found = self._flying_in.pop(ticket, None)
        if found is None:
            return None
        self.counts.ended += 1
        instance, run = found
        if instance.run != run:
            return None
        instance.in_flight.pop(ticket, None)
        return instance

    def refuse_all(self, instance: Instance, error: LlmstudioError) -> None:
        """Answer everybody who waits for an instance."""
        for ticket, waiter in instance.waiters.items():
            del self._waiting_in[ticket]
            if not waiter.is_load:
                self.counts.refused += 1
            self.actions.append(Refuse(ticket, error))
        instance.waiters.clear()

    def _grant(self, instance: Instance, ticket: int, cost_tokens: int | None, at: float) -> None:
        self.counts.granted += 1
        instance.in_flight[ticket] = cost_tokens
        instance.n_requests += 1
        instance.last_used = at
        self._flying_in[ticket] = (instance, instance.run)
        self.actions.append(Grant(ticket, instance.spec.id, instance.run))

    def _leave_queue(self, instance: Instance, waiter: Waiter) -> None:
        del instance.waiters[waiter.ticket]
        del self._waiting_in[waiter.ticket]
