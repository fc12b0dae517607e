"""Ways to run a model, as flags of llama-server and as the estimator takes them, and what its log says of memory."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

CASES: Mapping[str, Mapping[str, Any]] = {
    "-c 8192 -np 2": {"n_ctx": 8192, "n_seq": 2},
    "-c 16384 -np 4 -ub 1024": {"n_ctx": 16384, "n_seq": 4, "n_ubatch": 1024},
    "-c 5000 -np 3 -ctk q8_0 -ctv q8_0": {"n_ctx": 5000, "n_seq": 3, "type_k": "q8_0", "type_v": "q8_0"},
    "-c 8192 -np 2 -ctk q5_1 -ctv iq4_nl": {"n_ctx": 8192, "n_seq": 2, "type_k": "q5_1", "type_v": "iq4_nl"},
    "-c 8192 -np 4 -kvu": {"n_ctx": 8192, "n_seq": 4, "is_unified": True},
    "-c 4097 -np 1 -fa off": {"n_ctx": 4097, "flash_attn": False},
    "-c 8192 -np 1 -ub 128 --swa-full": {"n_ctx": 8192, "n_ubatch": 128, "swa_full": True},
}

_SIZES = re.compile(r"(?P<kind>model|KV|RS|compute|output) buffer size = +(?P<mib>[0-9.]+) MiB")


@dataclass(frozen=True)
class Told:
    """What llama-server's log says, in MiB; ``lines`` of caches, each rounded to 0.01."""

    model: float
    cache: float
    compute: float
    lines: int


def told(log: Iterable[str]) -> Told:
    """Add up the lines of a log (``-lv 4``): one a file for the model, one a kind for caches."""
    sums = dict.fromkeys(("model", "KV", "RS", "compute", "output"), 0.0)
    lines = 0
    for line in log:
        if found := _SIZES.search(line):
            sums[found["kind"]] += float(found["mib"])
            lines += found["kind"] in {"KV", "RS"}
    return Told(sums["model"], sums["KV"] + sums["RS"], sums["compute"], lines)
