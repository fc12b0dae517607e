"""Notes each exchange with a model, for whoever asks later what was used."""

import time
from collections.abc import Callable

from llmstudiod.adapters.usage_log import Served
from llmstudiod.http.relay import Exchange, Outcome

FRONT_BYTES, TAIL_BYTES = 1024, 2048
COMPUTING = frozenset(
    {
        "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings",
        "/chat/completions", "/completions", "/completion", "/responses", "/embeddings", "/embedding",
        "/v1/messages", "/v1/rerank", "/rerank", "/v1/reranking", "/reranking", "/infill",
        "/v1/audio/transcriptions", "/v1/audio/speech", "/v1/images/generations",
    }
)  # fmt: skip
"""The routes whose requests count: a look at the slots, or at how a text is split, is no use of the model."""


class Meter:
    """``note`` takes what an exchange was."""

    def __init__(self, note: Callable[[Served], None]) -> None:
        self._note = note

    def exchanged(self, exchange: Exchange, outcome: Outcome | None, *, model: str, key: str, path: str) -> None:
        """Take an exchange that is over; ``outcome`` None: its client has left. ``path``: what the model was asked."""
        if path not in COMPUTING:
            return
        head = exchange.head
        status = 499 if outcome is None else 0
        if head is not None and outcome is Outcome.COMPLETE:
            status = head.status
        is_stream = head is not None and head.get(b"content-type").startswith(b"text/event-stream")
        ended = exchange.pool.time()
        first, *rest = exchange.pieces
        tail = first[:FRONT_BYTES] + b"\n" + b"".join(rest)[-TAIL_BYTES:]
        ttft_s = (exchange.first_at or ended) - exchange.began_at
        duration_s = ended - exchange.began_at
        self._note(Served(time.time(), model, key, status, is_stream, ttft_s, duration_s, tail, exchange.n_events))
