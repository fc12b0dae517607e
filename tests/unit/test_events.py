"""The event stream: a snapshot first, what was missed after a break, and nobody waits for a slow reader."""

import asyncio
import json
from typing import Any

import pytest

from llmstudiod.core.lifecycle import Failure, Instance, State, StopCause, Transition, view
from llmstudiod.ctl.show import event_line
from llmstudiod.http.events import KEPT, QUEUE, Events, _part
from llmstudiod.http.live import Live
from llmstudiod.http.streams import Streams
from tests.unit.scheduler_world import spec


def parsed(raw: bytes) -> tuple[str, str, dict[str, Any]]:
    """Return id, name and data of an event."""
    fields = dict(line.split(": ", 1) for line in raw.decode().strip().splitlines())
    return fields["id"], fields["event"], json.loads(fields["data"])["data"]


def test_snapshot_comes_first() -> None:
    """Whoever is new, or comes from another daemon, or was away for too long, gets everything."""
    events = Events(lambda: {"instances": ["x"]}, Streams())
    events.publish("transition", {"id": "a"})
    for last in ("", "nonsense", "other-1", "other-", "-1"):
        (first,) = events._first(last)
        assert parsed(first)[1:] == ("snapshot", {"instances": ["x"]})


def test_brief_snapshot_leaves_out_what_says_nothing() -> None:
    """A page with hundreds of models has less to wait for."""
    item = {"id": "a", "reason": None, "in_flight": 0, "memory": {"estimated": None, "measured": None}}
    (first,) = Events(lambda: {"instances": [item]}, Streams())._first("", is_brief=True)
    assert parsed(first)[2] == {"instances": [{"id": "a", "in_flight": 0}]}


def test_resumes_where_it_was_left() -> None:
    """Last-Event-ID brings what came since, then how everything is now, numbered as the last of them."""
    events = Events(dict, Streams())
    for number in range(5):
        events.publish("transition", {"n": number})
    seen = parsed(events._kept[2][1])[0]
    *missed, snapshot = map(parsed, events._first(seen))
    last = parsed(events._kept[4][1])[0]
    assert [data["n"] for _, _, data in missed] == [3, 4]
    assert snapshot == (last, "snapshot", {})
    assert [parsed(event)[1] for event in events._first(last)] == ["snapshot"]


def test_too_long_away() -> None:
    """What is not kept any more cannot be sent: a snapshot instead."""
    events = Events(dict, Streams())
    events.publish("transition", {"n": 0})
    first = parsed(events._kept[0][1])[0]
    for number in range(KEPT + 1):
        events.publish("transition", {"n": number})
    (only,) = events._first(first)
    assert parsed(only)[1] == "snapshot"


def test_slow_reader_is_cut_off() -> None:
    """Its queue is bounded; it gets the end, and the others go on."""
    events = Events(dict, Streams())
    slow: asyncio.Queue[bytes | None] = asyncio.Queue(QUEUE)
    events._queues.add(slow)
    for number in range(QUEUE + 10):
        events.publish("transition", {"n": number})
    assert slow not in events._queues
    assert slow.qsize() == QUEUE
    held = [slow.get_nowait() for _ in range(QUEUE)]
    assert held[-1] is None


@pytest.mark.parametrize(
    ("state", "stage"),
    [(State.STARTING, "launching"), (State.LOADING, "waiting"), (State.READY, "ready"), (State.FAILED, "error")],
)
def test_transitions_are_told_in_both_languages(state: State, stage: str) -> None:
    """Ours, and the launch stages that vllm-studio's clients know; a failure says why."""
    events = Events(dict, Streams())
    instance = Instance(spec("a"), since=0.0, state=state, failure=Failure("crash", "it crashed", "look", ("last",)))
    events.observe("a", Transition(1.0, State.STOPPED, state, "why"), view(instance))
    (_, ours, told), (_, theirs, progress) = (parsed(event) for _, event in events._kept)
    assert (ours, told["to"], told["cause"]) == ("transition", str(state), "why")
    assert ("failure" in told) == (state is State.FAILED)
    assert (theirs, progress["recipe_id"], progress["stage"]) == ("launch_progress", "a", stage)


def test_progress_and_warnings() -> None:
    """A load shows how far it is; a warning is told."""
    events = Events(dict, Streams())
    instance = Instance(spec("a"), since=0.0, state=State.LOADING, progress=0.4, stage="reading the model")
    events.observe("a", None, view(instance))
    instance.state, instance.warnings = State.READY, ("no GPU is used",)
    events.observe("a", None, view(instance))
    told = [parsed(event)[1:] for _, event in events._kept]
    assert told[0] == (
        "launch_progress",
        {"recipe_id": "a", "stage": "waiting", "progress": 0.4, "message": "reading the model"},
    )
    assert told[2] == ("warning", {"id": "a", "warnings": ["no GPU is used"]})


class _Items:
    """Instances that are as the test says."""

    def __init__(self) -> None:
        self.busy: set[str] = set()

    def all(self) -> list[dict[str, Any]]:
        """Return two of them."""
        moments = dict.fromkeys(("since", "idle_since", "retry_at"))
        return [{"id": model, "in_flight": int(model in self.busy)} | moments for model in ("a", "b")]


async def test_first_reader_is_told_only_what_differs_from_its_snapshot() -> None:
    """Nothing is sent twice; a second reader's snapshot takes nothing from the first one."""
    items = _Items()
    events = Events(lambda: live.snapshot(), Streams())
    live: Any = Live.__new__(Live)
    live._events, live._instances, live._told = events, items, {}
    reader: asyncio.Queue[bytes | None] = asyncio.Queue()
    events._first("")
    events._queues.add(reader)
    await live._tell_instances()
    assert reader.empty()
    items.busy = {"b"}
    events._first("")
    await live._tell_instances()
    (told,) = [json.loads((reader.get_nowait() or b"").decode().split("data: ")[1])["data"]]
    assert [item["id"] for item in told["instances"]] == ["b"]


def test_lines_of_watch() -> None:
    """A line each for what people want to know; what another event tells too has none."""

    def line(**data: Any) -> str | None:
        return event_line({"data": data, "timestamp": "2026-11-23T10:20:30.000Z"})

    assert line(instances=[{"id": "a", "state": "ready"}, {"id": "b", "state": "stopped"}]) == "10:20:30  a (ready)"
    assert line(instances=[]) == "10:20:30  no model is loaded"
    failed = {"kind": "crash", "message": "it crashed", "hint": "look", "lines": []}
    told = line(id="a", to="failed", cause="it crashed", failure=failed, **{"from": "ready"})
    assert told == "10:20:30  a: failed: it crashed (look)"
    assert line(id="a", warnings=["no GPU is used", "cut"]) == "10:20:30  a: no GPU is used; cut"
    loading = {"recipe_id": "a", "stage": "waiting", "message": "reading the model"}
    assert line(progress=0.42, **loading) == "10:20:30  a: 42% reading the model"
    assert line(progress=None, **loading) is None
    assert line(models=1) == "10:20:30  settings, recipes or keys have changed (1 model)"
    assert line(running=False) is None


@pytest.mark.parametrize(
    ("state", "progress", "told"),
    [
        (State.STARTING, None, 0.0),
        (State.LOADING, None, 0.0),
        (State.LOADING, 0.4, 0.4),
        (State.READY, None, 1.0),
        (State.DRAINING, None, 0.0),
        (State.STOPPING, 0.4, 0.0),
        (State.STOPPED, None, 0.0),
        (State.FAILED, None, 0.0),
    ],
)
def test_progress_is_always_a_number(state: State, progress: float | None, told: float) -> None:
    """Clients of vllm-studio calculate with it."""
    events = Events(dict, Streams())
    instance = Instance(spec("a"), since=0.0, state=state, progress=progress)
    events.observe("a", None, view(instance))
    assert parsed(events._kept[0][1])[2]["progress"] == told


def test_refused_start_is_told() -> None:
    """No transition tells of it: it has its own event, with what to do, and a line of ``watch``."""
    events = Events(dict, Streams())
    refused = Failure("does_not_fit", "it needs 32 GiB", "a smaller one")
    events.observe("a", None, view(Instance(spec("a"), since=0.0, refused=refused)))
    told = parsed(events._kept[0][1])[2]
    assert told == {
        "recipe_id": "a", "stage": "error", "progress": 0.0, "message": "it needs 32 GiB",
        "kind": "does_not_fit", "hint": "a smaller one",
    }  # fmt: skip
    line = event_line({"data": told, "timestamp": "2026-11-23T10:20:30.000Z"})
    assert line == "10:20:30  a: it needs 32 GiB (a smaller one)"


def test_load_cancelled_before_its_start_is_told() -> None:
    """As one that is cancelled later."""
    events = Events(dict, Streams())
    events.observe("a", None, view(Instance(spec("a"), since=0.0, stop_cause=StopCause.CANCELLED)))
    told = parsed(events._kept[0][1])[2]
    assert (told["stage"], told["message"]) == ("cancelled", "its load was cancelled")


async def test_bug_in_one_part_ends_that_part_alone(caplog: pytest.LogCaptureFixture) -> None:
    """It is told in the stream and logged; the events go on."""
    written: list[bytes] = []

    async def write(data: bytes) -> None:
        written.append(data)

    async def broken(_: object) -> None:
        raise KeyError("a bug")

    await _part(broken, write)
    assert written[0].startswith(b"event: failure\n")
    assert "a bug" in caplog.text
