"""Sums of ten minutes tell the same as all requests would, and cost the same after a month as after an hour."""

import asyncio
import contextlib
import random
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmstudiod.adapters import usage_log
from llmstudiod.adapters.state_db import StateDb
from llmstudiod.adapters.usage_log import BUCKET_S, KEPT_ROWS, MAX_SAMPLED, TRIM_EVERY, Row, Served, UsageLog
from llmstudiod.adapters.usage_report import _quantile, last_uses, peaks, usage_report
from llmstudiod.http.admin_usage import _tell_gpus
from llmstudiod.http.exposition import Exposition
from llmstudiod.http.figures import NOTHING, Figures, speed

NOW = 1_800_000_000.0 // BUCKET_S * BUCKET_S  # spans of time are exact to a bucket
DAY_S = 86400.0
TAIL = b'{"timings": {"cache_n": %d, "prompt_n": %d, "prompt_ms": 10.0, "predicted_n": %d, "predicted_ms": 20.0}}'


def served(at: float = NOW, **changes: Any) -> Served:
    """Return a request that read 40 tokens, 8 of them from the cache, and wrote 10."""
    values: dict[str, Any] = {
        "model": "a", "key": "", "status": 200, "is_stream": True, "ttft_s": 0.1, "duration_s": 0.5,
        "tail": TAIL % (8, 32, 10),
    }  # fmt: skip
    return Served(at=at, **(values | changes))


@pytest.fixture
def told() -> list[Row]:
    """What the log has told."""
    return []


@pytest.fixture
def log(tmp_path: Path, told: list[Row]) -> Iterator[UsageLog]:
    """A log in a file."""
    state = StateDb(tmp_path / "state.db", tables=usage_log.TABLES)
    yield UsageLog(state, told.extend)
    state.close()


@pytest.fixture
def requests(log: UsageLog) -> list[Served]:
    """Two thousand requests of three models, two keys and 20 days, some refused, some without timings."""
    chance = random.Random(5)
    made = [
        served(
            NOW - chance.random() * 20 * DAY_S,
            model=chance.choice("abc"),
            key=chance.choice(["", "laptop"]),
            status=chance.choice([200, 200, 200, 500, 0]),
            duration_s=chance.random() * 9,
            ttft_s=chance.random(),
            tail=chance.choice([b"", TAIL % (chance.randrange(9), chance.randrange(1, 99), chance.randrange(50))]),
        )
        for _ in range(2000)
    ]
    for number, each in enumerate(made):
        log.note(each)
        if number % MAX_SAMPLED == 0:
            log.flush()
    return made


def test_report_is_that_of_all_requests(log: UsageLog, requests: list[Served]) -> None:
    """Counted here one by one."""
    report = usage_report(log, NOW)
    good = [each for each in requests if each.status == 200]
    assert report["totals"]["total_requests"] == 2000
    assert report["totals"]["successful_requests"] == len(good)
    assert report["totals"]["failed_requests"] == 2000 - len(good)
    assert report["totals"]["unique_users"] == 1
    assert report["latency"]["avg_ms"] == pytest.approx(statistics.mean(e.duration_s for e in good) * 1000, abs=0.06)
    assert report["latency"]["max_ms"] == pytest.approx(max(e.duration_s for e in good) * 1000, abs=0.06)
    assert report["latency"]["p50_ms"] == pytest.approx(statistics.median(e.duration_s for e in good) * 1000, rel=0.01)
    assert report["ttft"]["avg_ms"] == pytest.approx(statistics.mean(e.ttft_s for e in good) * 1000, abs=0.06)
    by_model = {each["model"]: each for each in report["by_model"]}
    for model in "abc":
        mine = [each for each in requests if each.model == model]
        assert by_model[model]["requests"] == len(mine)
        assert by_model[model]["successful"] == sum(each.status == 200 for each in mine)
    assert sum(each["total_tokens"] for each in report["by_model"]) == report["totals"]["total_tokens"]
    assert {each["key"]: each["requests"] for each in report["by_key"]} == {
        key: sum(each.key == key for each in requests) for key in ("", "laptop")
    }
    assert len(report["daily"]) == 14
    today = time.strftime("%Y-%m-%d", time.localtime(NOW))
    assert report["daily"][-1]["date"] == today
    of_today = sum(time.strftime("%Y-%m-%d", time.localtime(each.at)) == today for each in requests)
    assert report["daily"][-1]["requests"] == of_today
    assert sum(each["requests"] for each in report["hourly_pattern"]) == 2000
    for hour in range(24):
        expected = sum(time.localtime(each.at).tm_hour == hour for each in requests)
        assert report["hourly_pattern"][hour]["requests"] == expected
    recent = report["recent_activity"]
    assert recent["last_24h_requests"] == pytest.approx(sum(e.at > NOW - DAY_S for e in requests), abs=2)
    weeks = report["week_over_week"]
    assert weeks["this_week"]["requests"] == pytest.approx(sum(e.at > NOW - 7 * DAY_S for e in requests), abs=2)
    assert weeks["last_week"]["requests"] == pytest.approx(
        sum(NOW - 14 * DAY_S < e.at <= NOW - 7 * DAY_S for e in requests), abs=2
    )


def test_cost_of_one_request(log: UsageLog, told: list[Row]) -> None:
    """Every figure that a single request makes."""
    log.note(served())
    report = usage_report(log, NOW + 1)
    (model,) = report["by_model"]
    assert (model["prompt_tokens"], model["completion_tokens"]) == (40, 10)
    assert model["prefill_tps"] == 3200.0
    assert model["generation_tps"] == 500.0
    assert model["tokens_per_sec"] == 20.0
    assert report["cache"] == {"hits": 1, "misses": 0, "hit_tokens": 8, "miss_tokens": 32, "hit_rate": 20.0}
    assert report["recent_activity"]["last_hour_requests"] == 1
    assert (report["peak_days"][0]["requests"], report["peak_days"][0]["tokens"]) == (1, 50)
    assert log.lifetime()["prompt"] == 40
    (row,) = log.ask("SELECT * FROM requests")
    assert Row(**row).cached == 8
    assert told == []  # it is told on the loop, by `keep`


def test_burst_is_counted_whole_and_sampled(log: UsageLog) -> None:
    """Quantiles need no more than some hundred requests of two seconds."""
    for number in range(4 * MAX_SAMPLED):
        log.note(served(duration_s=number / 1000))
    report = usage_report(log, NOW)
    assert report["totals"]["total_requests"] == 4 * MAX_SAMPLED
    assert log.ask("SELECT count(*) AS n FROM requests")[0]["n"] == MAX_SAMPLED
    assert report["latency"]["p50_ms"] == pytest.approx(2 * MAX_SAMPLED, rel=0.01)


def test_last_use_of_a_key_is_the_latest(log: UsageLog) -> None:
    """Whatever the order in which requests end."""
    for at in (NOW + 5, NOW + 1):
        log.note(served(at, key="laptop"))
        log.flush()
    assert last_uses(log) == {"laptop": NOW + 5}


def test_empty_log_is_a_report_of_nothing(log: UsageLog) -> None:
    """Nothing is divided by it."""
    report = usage_report(log, NOW)
    assert report["totals"]["total_requests"] == 0
    assert report["totals"]["success_rate"] == 0.0
    assert report["latency"] == {
        "avg_ms": 0.0,
        "p50_ms": 0.0,
        "p95_ms": 0.0,
        "p99_ms": 0.0,
        "min_ms": 0.0,
        "max_ms": 0.0,
    }
    assert report["week_over_week"]["change_pct"] == {"requests": None, "tokens": None}
    assert (report["by_model"], report["by_key"], peaks(log, None), last_uses(log)) == ([], [], [], {})


def test_peaks_are_the_best_of_requests_long_enough(log: UsageLog) -> None:
    """A few tokens tell no speed; what was refused tells nothing; the best is kept when its request is gone."""
    log.note(served(tail=TAIL % (0, 31, 7), ttft_s=0.3))  # too short for either
    assert [list(each.values()) for each in peaks(log, None)] == [["a", None, None, 300.0, 38, 1]]
    log.note(served(tail=TAIL % (0, 50, 10), ttft_s=0.2))
    log.note(served(tail=TAIL % (0, 40, 20), ttft_s=0.4))
    log.note(served(tail=TAIL % (0, 900, 900), ttft_s=0.01, status=500, model="b"))
    (best,) = peaks(log, "a")
    assert (best["prefill_tps"], best["generation_tps"], best["ttft_ms"]) == (5000.0, 1000.0, 200.0)
    assert (best["total_requests"], best["total_tokens"]) == (3, 158)
    assert [each["model_id"] for each in peaks(log, None)] == ["a", "b"]
    assert peaks(log, "b")[0]["ttft_ms"] is None


def test_old_requests_go_and_their_sums_stay(log: UsageLog) -> None:
    """The last ten thousand are kept, the sums for a month, the totals for ever."""
    now = time.time()
    log.note(served(now - 40 * DAY_S, model="old", key="gone"))
    log.flush()
    for number in range(3 * KEPT_ROWS // 2):
        log.note(served(now - number / 100, key="laptop"))
        if number % MAX_SAMPLED == 0:
            log.flush()
    log.flush()
    assert KEPT_ROWS <= log.ask("SELECT count(*) AS n FROM requests")[0]["n"] < KEPT_ROWS + TRIM_EVERY
    report = usage_report(log, now)
    assert report["totals"]["total_requests"] == 3 * KEPT_ROWS // 2
    assert last_uses(log) == {"laptop": now}
    assert log.lifetime()["requests"] == 3 * KEPT_ROWS // 2 + 1
    assert {each["model"] for each in log.by_model()} == {"a", "old"}


def test_only_what_is_in_force_is_told(log: UsageLog) -> None:
    """What is older than `usage_keep` is in no figure, trimmed already or not; trimming takes it away."""
    now = time.time()
    log.keep_s = 2 * DAY_S
    log.note(served(now - 3 * DAY_S, model="old", key="gone"))
    log.note(served(now - DAY_S, duration_s=0.1))
    report = usage_report(log, now)
    assert report["totals"]["total_requests"] == 1
    assert [each["model"] for each in report["by_model"]] == ["a"]
    assert [each["key"] for each in report["by_key"]] == [""]
    assert [each["requests"] for each in report["peak_days"]] == [1]
    assert sum(each["requests"] for each in report["hourly_pattern"]) == 1
    assert report["latency"]["max_ms"] == 100.0
    assert [log.ask(f"SELECT count(*) AS n FROM {table}")[0]["n"] for table in ("usage", "requests")] == [2, 2]
    log.trim()
    assert [log.ask(f"SELECT count(*) AS n FROM {table}")[0]["n"] for table in ("usage", "requests")] == [1, 1]
    assert log.lifetime()["requests"] == 2


async def test_trims_soon_after_its_start(log: UsageLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that serves little, or never for long, keeps nothing for longer either."""
    monkeypatch.setattr(usage_log, "PERIOD_S", 0.01)
    log.note(served(time.time() - 40 * DAY_S))
    log.flush()
    trim, is_trimmed = log.trim, asyncio.Event()
    loop = asyncio.get_running_loop()

    def trim_and_tell() -> None:
        trim()
        loop.call_soon_threadsafe(is_trimmed.set)

    monkeypatch.setattr(log, "trim", trim_and_tell)
    with contextlib.suppress(asyncio.CancelledError):
        async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
            keeping = tasks.create_task(log.keep())
            await is_trimmed.wait()
            keeping.cancel()
    assert log.ask("SELECT * FROM usage") == []


def test_uptime_is_that_of_all_daemons(tmp_path: Path) -> None:
    """Also the part that is not written yet."""
    clock = Clock()
    for _ in range(2):
        state = StateDb(tmp_path / "state.db", tables=usage_log.TABLES)
        log = UsageLog(state, lambda _: None, clock=clock)
        clock.at += 50
        log.count_uptime()
        clock.at += 10
        log.close()
        state.close()
    state = StateDb(tmp_path / "state.db", tables=usage_log.TABLES)
    log = UsageLog(state, lambda _: None, clock=clock)
    clock.at += 3
    assert log.lifetime()["uptime_s"] == 123.0
    state.close()


def test_time_to_the_first_token_is_that_of_those_that_tell(log: UsageLog) -> None:
    """A stream shows it, a whole answer may tell how long it read; an embedding's end is no first token."""
    usage = b'{"usage": {"prompt_tokens": 40, "total_tokens": 40}}'
    log.note(served(ttft_s=0.2))
    log.note(served(is_stream=False, ttft_s=0.5))
    log.note(served(is_stream=False, ttft_s=0.0001, duration_s=0.0001, tail=usage, model="vectors"))
    report = usage_report(log, NOW + 1)
    assert report["ttft"] == {"avg_ms": 105.0, "p50_ms": 10.0, "p95_ms": 200.0, "p99_ms": 200.0}
    assert {each["model"]: each["avg_ttft_ms"] for each in report["by_model"]} == {"a": 105.0, "vectors": 0.0}
    assert {each["model_id"]: each["ttft_ms"] for each in peaks(log, None)} == {"a": 10.0, "vectors": None}
    rows = [Row(**each) for each in log.ask("SELECT * FROM requests")]
    assert speed(rows[2:]).ttft_ms is None
    assert speed(rows).ttft_ms == 10.0


def test_cancelled_stream_counts_with_what_it_wrote(log: UsageLog) -> None:
    """Its events are its tokens, but for the first; nobody has failed, and nothing is said of one that ended sooner."""
    log.note(served())
    log.note(served(status=499, tail=b"", n_events=8))
    log.note(served(status=499, tail=b"", n_events=0))
    log.note(served(status=500, tail=b""))
    report = usage_report(log, NOW + 1)
    totals = report["totals"]
    assert (totals["total_requests"], totals["successful_requests"]) == (4, 1)
    assert (totals["failed_requests"], totals["cancelled_requests"], totals["success_rate"]) == (1, 2, 50.0)
    assert totals["completion_tokens"] == 17
    assert report["by_model"][0]["success_rate"] == 50.0


@pytest.mark.parametrize(("share", "rank"), [(0.5, 50), (0.95, 95), (0.99, 99), (1.0, 100), (0.001, 1)])
def test_quantile_is_the_nearest_rank(share: float, rank: int) -> None:
    """Of a hundred values the 95th in order, not the 96th."""
    assert _quantile(range(1, 101), share) == rank


def test_gpus_have_labels_of_their_own() -> None:
    """Prometheus refuses a page on which two lines have the same; not every driver tells an index, nor a UUID."""
    unknown: dict[str, Any] = {"index": None, "uuid": None, "name": "GPU", "memory_used": 1}
    unknown |= dict.fromkeys(("memory_total", "utilization", "temperature", "power_draw"))
    gpus = [unknown | {"index": 0}, unknown | {"uuid": "GPU-1"}, unknown, unknown]
    out = Exposition("x")
    _tell_gpus(out, {"gpus": gpus, "host": {"memory_available": 1, "memory_total": 2}})
    assert re.findall(r'gpu_id="([^"]*)"', out.text()) == ["0", "GPU-1", "unknown-2", "unknown-3"]


# Figures of the last hour


class Clock:
    """A time that a test sets."""

    at = NOW + 30

    def __call__(self) -> float:
        """The time now."""
        return self.at


def row(at: float, **changes: Any) -> Row:
    """Return a request of `a` as it is kept."""
    values: dict[str, Any] = {
        "model": "a", "key": "", "status": 200, "stream": 0, "prompt": 40, "completion": 10, "cached": 8,
        "ttft_ms": 100.0, "duration_ms": 500.0, "prompt_ms": 10.0, "completion_ms": 20.0,
    }  # fmt: skip
    return Row(at=at, **(values | changes))


def test_speed_of_late_is_that_of_the_last_minute() -> None:
    """And there is none when nothing was asked."""
    clock = Clock()
    figures = Figures(clock)
    assert figures.recent("a") == NOTHING
    figures.add([row(clock.at - 90, completion_ms=1.0), row(clock.at - 5), row(clock.at - 1, completion=30)])
    assert figures.recent("a").generation_tps == 1000.0
    assert figures.recent("a").prompt_tps == 3200.0
    clock.at += 120
    assert figures.recent("a") == NOTHING
    assert speed([row(0, status=500, prompt_ms=0.0, completion_ms=0.0)]) == NOTHING


def test_last_hour_has_sixty_minutes() -> None:
    """The newest at the end, null where there was nothing, and what is older than an hour gone."""
    clock = Clock()
    figures = Figures(clock)
    figures.add([row(clock.at - 4000), row(clock.at - 61), row(clock.at), row(clock.at)])
    figures.add_memory({"a": 5}, {"a": 7, "b": 8})
    history = figures.history("a")
    assert {name: len(course) for name, course in history.items() if isinstance(course, list)} == dict.fromkeys(
        ("requests", "tokens_per_second", "prompt_tokens_per_second", "ttft_ms", "memory", "gpu_memory"), 60
    )
    assert history["requests"][-2:] == [1, 2] or history["requests"][-3:] == [1, 0, 2]
    assert sum(history["requests"]) == 3
    assert (history["memory"][-1], history["memory"][0]) == (5, None)
    assert (history["gpu_memory"][-1], history["gpu_memory"][0]) == (7, None)
    assert history["tokens_per_second"][-1] == 500.0
    assert history["tokens_per_second"][0] is None
    assert history["from"] + 60 * history["step_s"] > clock.at
    assert figures.memory("a") == 5
    clock.at += 120
    assert figures.memory("a") is None
