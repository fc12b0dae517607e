"""What was used, from the tables of `llmstudiod.adapters.usage_log`, in the shape that vllm-studio's clients read.

Days and hours are the machine's own; spans of time are exact to ten minutes. Quantiles, the least and the most are of
the last ten thousand requests, everything else of the time for which sums are kept. Blocks: asked in threads.
"""

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from llmstudiod.adapters.usage_log import SUMS, UsageLog, is_answered

HOUR_S, DAY_S, WEEK_S = 3600.0, 86400.0, 7 * 86400.0
N_DAYS, N_MODELS, N_PEAKS = 14, 25, 5
_DAY = "strftime('%Y-%m-%d', at, 'unixepoch', 'localtime')"
_HOUR = "CAST(strftime('%H', at, 'unixepoch', 'localtime') AS INTEGER)"

Sums = dict[str, Any]


def usage_report(log: UsageLog, now: float) -> dict[str, Any]:
    """Return totals, latencies and courses of all requests that are kept."""
    since = now - log.keep_s
    total, days, hours = _sums(log, since), _grouped(log, _DAY, since), _grouped(log, _HOUR, since)
    select = "SELECT model, status, prompt + completion AS tokens, duration_ms, ttft_ms FROM requests WHERE at > ?"
    last = log.ask(select, (since,))
    good = [row for row in last if is_answered(row["status"])]
    tokens = [row["tokens"] for row in last]
    return {
        "totals": {
            **_tokens(total),
            "total_requests": total["requests"],
            "successful_requests": total["good"],
            "failed_requests": total["requests"] - total["good"] - total["cancelled"],
            "cancelled_requests": total["cancelled"],
            "success_rate": _success(total),
            "unique_sessions": 0,
            "unique_users": len([key for key in _grouped(log, "key", since) if key]),
        },
        "latency": {
            "avg_ms": _mean(total["good_ms"], total["good"]),
            **_quantiles("ms", latencies := [row["duration_ms"] for row in good]),
            "min_ms": round(min(latencies, default=0.0), 1),
            "max_ms": round(max(latencies, default=0.0), 1),
        },
        "ttft": {
            "avg_ms": _mean(total["ttft_ms"], total["waited"]),
            **_quantiles("ms", [row["ttft_ms"] for row in good if row["ttft_ms"]]),
        },
        "tokens_per_request": {
            "avg": _mean(total["prompt"] + total["completion"], total["requests"]),
            "avg_prompt": _mean(total["prompt"], total["requests"]),
            "avg_completion": _mean(total["completion"], total["requests"]),
            "max": max(tokens, default=0),
            "p50": _quantile(tokens, 0.5),
            "p95": _quantile(tokens, 0.95),
        },
        "cache": {
            "hits": total["hits"],
            "misses": total["told"] - total["hits"],
            "hit_tokens": total["told_cached"],
            "miss_tokens": total["told_prompt"] - total["told_cached"],
            "hit_rate": _percent(total["told_cached"], total["told_prompt"]),
        },
        "week_over_week": _weeks(log, now),
        "recent_activity": _recent(log, now),
        "peak_days": _peaks([{"date": day, **_load(each)} for day, each in days.items()]),
        "peak_hours": _peaks([{"hour": hour, "requests": each["requests"]} for hour, each in hours.items()]),
        "by_model": _models(log, good, since),
        "by_key": _keys(log, since),
        "daily": [_day(day, days.get(day, _NOTHING)) for day in _last_days(now)],
        "hourly_pattern": [_hour(hour, hours.get(hour, _NOTHING)) for hour in range(24)],
    }


def last_uses(log: UsageLog) -> dict[str, float]:
    """Return when each API key was used last, in seconds since 1970, by its name."""
    return {row["key"]: row["at"] for row in log.ask("SELECT key, max(last_at) AS at FROM usage GROUP BY key")}


def peaks(log: UsageLog, model: str | None) -> list[dict[str, Any]]:
    """Return the best that each model has ever shown, of requests long enough to tell."""
    select = """SELECT model AS model_id, prefill_tps, generation_tps, ttft_ms,
        prompt + completion AS total_tokens, requests AS total_requests
        FROM peaks JOIN spent USING (model) WHERE ?1 IS NULL OR model = ?1 ORDER BY model"""
    return log.ask(select, (model,))


_COLUMNS = ", ".join(f"ifnull(sum({name}), 0) AS {name}" for name in SUMS)
_NOTHING: Sums = dict.fromkeys(SUMS, 0)


def _sums(log: UsageLog, since: float, until: float = 1e12) -> Sums:
    """Return the sums of a span of time."""
    select = f"SELECT {_COLUMNS} FROM usage WHERE at > ? AND at <= ?"  # noqa: S608 - our own names
    return next(iter(log.ask(select, (since, until))), _NOTHING)


def _grouped(log: UsageLog, by: str, since: float) -> dict[Any, Sums]:
    """Return the sums by an expression, and when the last request of each was."""
    select = f"SELECT {by} AS name, max(last_at) AS last_at, {_COLUMNS} FROM usage WHERE at > ? GROUP BY name"  # noqa: S608
    return {row["name"]: row for row in log.ask(select, (since,))}


def _tokens(sums: Sums) -> dict[str, int]:
    prompt, completion = sums["prompt"], sums["completion"]
    return {"total_tokens": prompt + completion, "prompt_tokens": prompt, "completion_tokens": completion}


def _load(sums: Sums) -> dict[str, int]:
    return {"requests": sums["requests"], "tokens": sums["prompt"] + sums["completion"]}


def _weeks(log: UsageLog, now: float) -> dict[str, Any]:
    spans = [(now - WEEK_S, now), (now - 2 * WEEK_S, now - WEEK_S)]
    this, last = ({**_load(each), "successful": each["good"]} for each in (_sums(log, *span) for span in spans))
    change = {name: _change(last[name], this[name]) for name in ("requests", "tokens")}
    return {"this_week": this, "last_week": last, "change_pct": change}


def _recent(log: UsageLog, now: float) -> dict[str, Any]:
    day, before = _sums(log, now - DAY_S, now), _sums(log, now - 2 * DAY_S, now - DAY_S)
    return {
        "last_hour_requests": _sums(log, now - HOUR_S, now)["requests"],
        "last_24h_requests": day["requests"],
        "prev_24h_requests": before["requests"],
        "last_24h_tokens": _load(day)["tokens"],
        "change_24h_pct": _change(before["requests"], day["requests"]),
    }


def _models(log: UsageLog, last_good: Sequence[dict[str, Any]], since: float) -> list[dict[str, Any]]:
    latencies: dict[str, list[float]] = defaultdict(list)
    for row in last_good:
        latencies[row["model"]].append(row["duration_ms"])
    sums = _grouped(log, "model", since)
    found = [{"model": model, **_summary(each, latencies[model])} for model, each in sums.items()]
    return sorted(found, key=lambda item: int(item["total_tokens"]), reverse=True)[:N_MODELS]


def _summary(sums: Sums, latencies: Sequence[float]) -> dict[str, Any]:
    total = _tokens(sums)
    return {
        "requests": sums["requests"],
        "successful": sums["good"],
        "success_rate": _success(sums),
        **total,
        "avg_tokens": _mean(total["total_tokens"], sums["requests"]),
        "avg_latency_ms": _mean(sums["good_ms"], sums["good"]),
        "p50_latency_ms": _quantile(latencies, 0.5),
        "avg_ttft_ms": _mean(sums["ttft_ms"], sums["waited"]),
        "tokens_per_sec": _per_second(sums["completion"], sums["good_ms"]) or 0.0,
        "prefill_tps": _per_second(sums["read"], sums["prompt_ms"]),
        "generation_tps": _per_second(sums["written"], sums["completion_ms"]),
    }


def _keys(log: UsageLog, since: float) -> list[dict[str, Any]]:
    sums = _grouped(log, "key", since)
    found = [{"key": key, **_load(each), "last_used": each["last_at"]} for key, each in sums.items()]
    return sorted(found, key=lambda item: int(item["requests"]), reverse=True)


def _last_days(now: float) -> list[str]:
    year, month, day, *_ = time.localtime(now)
    noons = (time.mktime((year, month, day - back, 12, 0, 0, 0, 0, -1)) for back in range(N_DAYS - 1, -1, -1))
    return [time.strftime("%Y-%m-%d", time.localtime(noon)) for noon in noons]


def _day(day: str, sums: Sums) -> dict[str, Any]:
    return {
        "date": day,
        "requests": sums["requests"],
        "successful": sums["good"],
        "success_rate": _success(sums),
        **_tokens(sums),
        "avg_latency_ms": _mean(sums["good_ms"], sums["good"]),
    }


def _hour(hour: int, sums: Sums) -> dict[str, Any]:
    return {"hour": hour, "successful": sums["good"], **_load(sums)}


def _peaks(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(items, key=lambda item: int(item["requests"]), reverse=True)[:N_PEAKS]


def _quantiles(unit: str, values: Sequence[float]) -> dict[str, float]:
    return {f"p{percent}_{unit}": _quantile(values, percent / 100) for percent in (50, 95, 99)}


def _mean(total: float, number: int) -> float:
    return round(total / number, 1) if number else 0.0


def _per_second(tokens: int, milliseconds: float) -> float | None:
    return round(tokens / milliseconds * 1000, 2) if milliseconds else None


def _quantile(values: Sequence[float], share: float) -> float:
    """Return the least value that this share of them does not exceed, by the nearest rank.

    >>> _quantile([5, 1, 3], 0.5), _quantile(range(1, 101), 0.95), _quantile([], 0.5)
    (3.0, 95.0, 0.0)
    """
    ordered = sorted(values)
    return round(float(ordered[max(0, math.ceil(share * len(ordered)) - 1)]), 1) if ordered else 0.0


def _success(sums: Sums) -> float:
    """Return the percentage of the requests that were answered, of those that anybody waited for."""
    return _percent(sums["good"], sums["requests"] - sums["cancelled"])


def _percent(part: float, whole: float) -> float:
    return round(100 * part / whole, 2) if whole else 0.0


def _change(before: float, after: float) -> float | None:
    return round(100 * (after - before) / before, 1) if before else None
