"""What was used, and how fast it went: /usage, the best and the sums of all times, /benchmark, Prometheus' /metrics."""

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from llmstudiod import __version__
from llmstudiod.adapters.usage_log import UsageLog
from llmstudiod.adapters.usage_report import peaks, usage_report
from llmstudiod.core.errors import BadRequestError, LlmstudioError, UnavailableError
from llmstudiod.core.lifecycle import State
from llmstudiod.core.usage import spent
from llmstudiod.http import tokens
from llmstudiod.http.answers import json_response
from llmstudiod.http.events import Events
from llmstudiod.http.exposition import Exposition
from llmstudiod.http.figures import Figures
from llmstudiod.http.instances import Instances
from llmstudiod.http.meter import Meter
from llmstudiod.http.query import whole_number
from llmstudiod.http.relay import Exchange, Outcome, Pools, request_head
from llmstudiod.supervisor import Supervisor

BENCHMARK_S = 600.0
MAX_TOKENS = 100_000
Gpus = Callable[[], Awaitable[dict[str, Any]]]


class AdminUsage:
    """The routes about use and speed. ``gpus`` measures; ``lifetime`` holds what was counted by earlier daemons."""

    def __init__(
        self,
        *,
        supervisor: Supervisor,
        pools: Pools,
        log: UsageLog,
        figures: Figures,
        instances: Instances,
        events: Events,
        gpus: Gpus,
        began_at: float,
    ) -> None:
        self._supervisor = supervisor
        self._pools = pools
        self._log = log
        self._figures = figures
        self._instances = instances
        self._events = events
        self._gpus = gpus
        self._began_at = began_at

    def routes(self) -> list[web.RouteDef]:
        """Return the routes."""
        return [
            web.get("/usage", self._usage),
            web.get("/peak-metrics", self._peaks),
            web.get("/lifetime-metrics", self._lifetime),
            web.post("/benchmark", self._benchmark),
            web.get("/metrics", self._metrics),
        ]

    async def _usage(self, _: web.Request) -> web.Response:
        return json_response(await asyncio.to_thread(usage_report, self._log, time.time()))

    async def _peaks(self, request: web.Request) -> web.Response:
        name, catalogue = request.query.get("model_id"), self._supervisor.catalogue
        if not name:
            return json_response({"metrics": await asyncio.to_thread(peaks, self._log, None)})
        found = await asyncio.to_thread(peaks, self._log, catalogue.ids_by_name.get(name, name))
        if not found:  # what is shown in the list of all is shown alone too, with a recipe or without
            catalogue.resolve(name)
        return json_response(found[0] if found else {"error": "No metrics for this model"})

    async def _lifetime(self, _: web.Request) -> web.Response:
        return json_response(await self._totals())

    async def _totals(self) -> dict[str, Any]:
        kept = await asyncio.to_thread(self._log.lifetime)
        return {
            "tokens_total": kept["prompt"] + kept["completion"],
            "prompt_tokens_total": kept["prompt"],
            "completion_tokens_total": kept["completion"],
            "requests_total": kept["requests"],
            "energy_wh": round(kept["energy_wh"], 3),
            "energy_kwh": round(kept["energy_wh"] / 1000, 6),
            "uptime_seconds": round(kept["uptime_s"], 1),
            "first_started_at": kept["first_started_at"],
        }

    async def event(self) -> dict[str, Any]:
        """Return vllm-studio's ``metrics`` event."""
        views = self._supervisor.views()
        ready = next((shown for shown in views if shown.state is State.READY), None)
        totals = await self._totals()
        recent = self._figures.recent(ready.id) if ready else None
        best = await asyncio.to_thread(peaks, self._log, ready.id) if ready else []
        gpus = await self._gpus()
        watts = sum(gpu["power_draw"] or 0 for gpu in gpus["gpus"])
        kwh, read, written = (totals[name] for name in ("energy_kwh", "prompt_tokens_total", "completion_tokens_total"))
        per_model = {shown.id: self._figures.memory(shown.id) for shown in views if shown.is_resident}
        return {
            **{f"lifetime_{name}": value for name, value in totals.items() if name != "first_started_at"},
            "lifetime_prompt_tokens": read,
            "lifetime_completion_tokens": written,
            "lifetime_requests": totals["requests_total"],
            "lifetime_uptime_hours": round(totals["uptime_seconds"] / 3600, 4),
            "kwh_per_million_input": round(kwh / read * 1e6, 6) if read else None,
            "kwh_per_million_output": round(kwh / written * 1e6, 6) if written else None,
            "kv_cache_usage": await self._instances.kv_cache_usage(ready.id) if ready else 0.0,
            "model_id": ready.id if ready else None,
            "current_power_watts": round(watts, 1),
            "running_requests": sum(shown.in_flight for shown in views),
            "pending_requests": sum(shown.queued for shown in views),
            "prompt_tokens_total": totals["prompt_tokens_total"],
            "generation_tokens_total": totals["completion_tokens_total"],
            "prompt_throughput": recent.prompt_tps or 0.0 if recent else 0.0,
            "generation_throughput": recent.generation_tps or 0.0 if recent else 0.0,
            "avg_ttft_ms": recent.ttft_ms if recent else None,
            "peak_prefill_tps": best[0]["prefill_tps"] if best else None,
            "peak_generation_tps": best[0]["generation_tps"] if best else None,
            "peak_ttft_ms": best[0]["ttft_ms"] if best else None,
            "memory": {model: size for model, size in per_model.items() if size is not None},
        }

    # A benchmark of one request

    async def _benchmark(self, request: web.Request) -> web.Response:
        """Let a model that is ready read and write, and tell how fast it was; nothing is loaded for it."""
        name = request.query.get("model")
        views = self._supervisor.views()
        if name:
            model = self._supervisor.catalogue.resolve(name)
        else:
            model = next((shown.id for shown in views if shown.state is State.READY), "")
        if not model or self._supervisor.ready_run(model) is None:
            hint = "`llmstudioctl load MODEL` loads one"
            raise UnavailableError(f"'{model}' is not ready" if model else "no model is ready", hint=hint)
        n_prompt, n_written = self._lengths(request, model)
        began = time.monotonic()
        cost = spent(await self._asked(model, n_prompt, n_written))
        elapsed_s = time.monotonic() - began
        best = await asyncio.to_thread(peaks, self._log, model)
        measured = {
            "prompt_tokens": cost.prompt,
            "completion_tokens": cost.completion,
            "total_time_s": round(elapsed_s, 3),
            "prefill_tps": round((cost.prompt - cost.cached) / cost.prompt_ms * 1000, 2) if cost.prompt_ms else None,
            "generation_tps": round(cost.completion / cost.completion_ms * 1000, 2) if cost.completion_ms else None,
        }
        return json_response(
            {"success": True, "model_id": model, "benchmark": measured, "peak_metrics": best[0] if best else None}
        )

    def _lengths(self, request: web.Request, model: str) -> tuple[int, int]:
        """Return how many tokens are to be read and to be written; they must fit into a slot's context together."""
        shown = self._supervisor.view(model)
        n_ctx = (shown.facts.n_ctx if shown and shown.facts else 0) or 2 * MAX_TOKENS
        n_written = whole_number(request, "max_tokens", default=min(100, n_ctx // 2), least=1, most=MAX_TOKENS)
        left = max(1, n_ctx - n_written)
        n_prompt = whole_number(request, "prompt_tokens", default=min(1000, left), least=1, most=MAX_TOKENS)
        if n_prompt + n_written > n_ctx:
            found = f"prompt_tokens={n_prompt} and max_tokens={n_written}"
            raise BadRequestError(f"expected at most {n_ctx} tokens in all, the context of '{model}', found {found}")
        return n_prompt, n_written

    async def _asked(self, model: str, n_prompt: int, n_written: int) -> bytes:
        """Return the end of a model's answer to one request of ours, which counts as any other."""
        ticket = self._supervisor.ask(model)
        pieces: list[bytes] = []
        try:
            async with asyncio.timeout(BENCHMARK_S):
                await self._supervisor.settled(ticket)
                if ticket.error is not None:
                    raise ticket.error
                pool = self._pools.get(ticket.model, ticket.run)
                if pool is None:
                    raise UnavailableError(f"'{model}' has just ended")
                raw = await self._question(model, n_prompt, n_written)
                head = request_head("POST", "/completion", [(b"content-type", b"application/json")], len(raw))
                exchange = Exchange(
                    pool, pieces.append, client_is_http11=True, is_begun=False, is_head_request=False, is_last=True
                )
                outcome = await exchange.run(head, raw)
                Meter(self._log.note).exchanged(exchange, outcome, model=model, key="", path="/completion")
        except TimeoutError:
            raise UnavailableError(f"'{model}' did not answer within {BENCHMARK_S:.0f} s") from None
        finally:
            self._supervisor.end(ticket)
        status = exchange.head.status if exchange.head else 0
        answer = b"".join(pieces)
        if outcome is not Outcome.COMPLETE or status != 200:
            told = answer.partition(b"\r\n\r\n")[2][:300].decode("utf-8", "replace")
            raise UnavailableError(f"'{model}' answered {status or 'nothing'}: {told}")
        return answer[-4096:]

    async def _question(self, model: str, n_prompt: int, n_written: int) -> bytes:
        """Return the body of a request with as many tokens as are wanted: what a word is differs between models."""
        text = " ".join(map(str, range(n_prompt)))  # at least a token for each number
        ids = await tokens.split(text, socket_path=self._supervisor.socket_of(model))
        body = {"prompt": ids[:n_prompt], "n_predict": n_written, "ignore_eos": True, "cache_prompt": False}
        return json.dumps(body).encode()

    # Prometheus

    async def _metrics(self, _: web.Request) -> web.Response:
        """Answer in Prometheus' text format. Source: prometheus.io/docs/instrumenting/exposition_formats."""
        kept = await asyncio.to_thread(self._log.lifetime)
        by_model = await asyncio.to_thread(self._log.by_model)
        out = Exposition("llmstudio")
        out.gauge("build_info", "Version of the daemon.", [({"version": __version__}, 1)])
        out.gauge("start_time_seconds", "When the daemon started, since 1970.", [({}, self._began_at)])
        views = self._supervisor.views()
        states = [
            ({"model": view.id, "state": str(state)}, int(view.state is state)) for view in views for state in State
        ]
        out.gauge("model_state", "1 for the state that a model is in.", states)
        out.gauge("requests_in_flight", "Requests being served.", [({"model": v.id}, v.in_flight) for v in views])
        out.gauge("requests_queued", "Requests that wait.", [({"model": v.id}, v.queued) for v in views])
        for name, text in (
            ("requests", "Requests that a model computed for."),
            ("prompt_tokens", "Tokens read, those from the cache included."),
            ("cached_tokens", "Tokens of prompts that were in the cache."),
            ("completion_tokens", "Tokens written."),
        ):
            out.counter(f"{name}_total", text, [({"model": row["model"]}, row[name]) for row in by_model])
        for name in ("loads", "failures", "evictions"):
            values = [({"model": view.id}, self._instances.totals(view)[name]) for view in views]
            out.counter(f"model_{name}_total", f"How many {name} each model has had.", values)
        counts = [({"outcome": name}, value) for name, value in self._supervisor.counts().items()]
        out.counter("admissions_total", "What became of the requests for a place, since the daemon's start.", counts)
        held = [({"model": v.id}, size) for v in views if (size := self._figures.memory(v.id)) is not None]
        out.gauge("model_memory_bytes", "RAM that a running model has, its mapped file included.", held)
        with contextlib.suppress(LlmstudioError):
            _tell_gpus(out, await self._gpus())
        out.counter("energy_watt_hours_total", "What the GPUs have used while models ran.", [({}, kept["energy_wh"])])
        out.gauge("event_subscribers", "Readers of the event stream.", [({}, self._events.n_subscribers)])
        out.counter("events_published_total", "Events told.", [({}, self._events.n_published)])
        return web.Response(body=out.text().encode(), headers={"Content-Type": Exposition.KIND, "Server": "llmstudiod"})


def _gpu_id(gpu: dict[str, Any], number: int) -> str:
    """Return a label that no other GPU has: not every driver tells an index, nor a UUID."""
    return str(gpu["uuid"] or f"unknown-{number}") if gpu["index"] is None else str(gpu["index"])


def _tell_gpus(out: Exposition, machine: dict[str, Any]) -> None:
    for name, key, text in (
        ("gpu_memory_used_bytes", "memory_used", "GPU memory in use."),
        ("gpu_memory_total_bytes", "memory_total", "GPU memory."),
        ("gpu_utilization_percent", "utilization", "How busy a GPU is."),
        ("gpu_temperature_celsius", "temperature", "Its temperature."),
        ("gpu_power_watts", "power_draw", "Its power."),
    ):
        values = [
            ({"gpu_id": _gpu_id(gpu, number), "gpu_name": str(gpu["name"])}, gpu[key])
            for number, gpu in enumerate(machine["gpus"])
            if gpu[key] is not None
        ]
        out.gauge(name, text, values)
    host = machine["host"]
    out.gauge("host_memory_available_bytes", "RAM that is free for use.", [({}, host["memory_available"])])
    out.gauge("host_memory_total_bytes", "RAM.", [({}, host["memory_total"])])
