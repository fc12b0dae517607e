"""What llama-server itself tells of its memory, in a dry run or in its log, and how that corrects the estimate.

Source of the formats: llama.cpp 0.7.0, ``common_memory_breakdown`` with ``--log-jsonl``, and the lines of ``-lv 4``.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from llmstudiod.core.memory import MIB, Estimate, Share

_LOG_STEP = MIB // 100
_SIZE = re.compile(r"(?P<device>\S+) +(?P<kind>model|KV|RS|compute|output) buffer size = +(?P<mib>\d+\.\d+) MiB")
_LEAST, _MOST = 0.1, 1000.0  # small terms may be off by much


@dataclass(frozen=True, slots=True)
class Correction:
    """Factors on terms of the estimate. ``runtime``: what its process had on each GPU beside its buffers, in bytes.

    ``host``: bytes of RAM that it had beyond the estimate. ``source``: who told.
    """

    kv: float = 1.0
    compute: float = 1.0
    runtime: int | None = None
    host: int = 0
    source: str = ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the correction of which ``values`` is the `as_dict`; a TypeError or ValueError for anything else."""
        made = cls(**values)
        factors = float(made.kv), float(made.compute)
        if not all(_LEAST <= factor <= _MOST for factor in factors) or min(made.host, made.runtime or 0) < 0:
            raise ValueError(f"no correction of an estimate: {values}")
        return made

    @property
    def is_of_a_run(self) -> bool:
        """Whether there is nothing better to be learned."""
        return self.source == LAST_RUN

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return asdict(self)


DRY_RUN, LAST_RUN = "a dry run", "its last run"
AS_ESTIMATED = Correction()


@dataclass(frozen=True, slots=True)
class Told:
    """Bytes over all devices, KV cache with recurrent states. ``step``: to what each of ``n`` numbers is rounded.

    ``devices``: all buffers on each device, by its name, where that is told.
    """

    kv: int
    compute: int
    step: int
    n: int = 1
    devices: Mapping[str, int] = field(default_factory=dict)


def told_by_breakdown(line: str, *, output: int) -> Told | None:
    """Return what a line of ``--log-jsonl`` says a run would need, or None for any other line.

    ``output``: bytes of the buffer for logits, which it does not count.
    """
    if '"fit_memory_breakdown"' not in line:
        return None
    try:
        rows = json.loads(line)["data"]["rows"]
        kv, compute = (sum(int(row[name]) for row in rows) for name in ("context", "compute"))
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    return Told(kv * MIB, compute * MIB + output, MIB, len(rows))


def told_by_log(lines: Iterable[str]) -> Told | None:
    """Return what a run's log says it has taken, or None where it does not tell."""
    kinds: dict[str, int] = {}
    devices: dict[str, int] = {}
    n = 0
    for line in lines:
        if found := _SIZE.search(line):
            size = int(float(found["mib"]) * MIB)
            kinds[found["kind"]] = kinds.get(found["kind"], 0) + size
            devices[found["device"]] = devices.get(found["device"], 0) + size
            n += 1
    if "compute" not in kinds:
        return None
    compute = kinds["compute"] + kinds.get("output", 0)
    return Told(kinds.get("KV", 0) + kinds.get("RS", 0), compute, _LOG_STEP, n, devices)


def correction(need: Estimate, told: Told, *, source: str) -> Correction:
    """Return how an estimate of the same run is to be corrected; what lies within the rounding is confirmed."""
    shares = (need.host, *need.devices)
    return Correction(
        kv=_factor(sum(share.kv for share in shares), told.kv, told),
        compute=_factor(sum(share.compute for share in shares), told.compute, told),
        source=source,
    )


def _factor(estimated: int, told: int, rounding: Told) -> float:
    room = rounding.step * rounding.n
    if estimated <= 0 or told - room <= estimated <= told + room:
        return 1.0
    return min(_MOST, max(_LEAST, (told + room) / estimated))


def corrected(need: Estimate, correction: Correction) -> Estimate:
    """Return the estimate with what is known better."""
    if correction == AS_ESTIMATED:
        return need
    devices = tuple(
        replace(_scaled(share, correction), runtime=_runtime(share, correction)) for share in need.devices
    )  # fmt: skip
    host = _scaled(need.host, correction)
    host = replace(host, runtime=host.runtime + correction.host)
    return replace(need, host=host, devices=devices, is_validated=need.is_validated or bool(correction.source))


def _scaled(share: Share, correction: Correction) -> Share:
    return replace(share, kv=int(share.kv * correction.kv), compute=int(share.compute * correction.compute))


def _runtime(share: Share, correction: Correction) -> int:
    return correction.runtime if correction.runtime is not None and share.runtime else share.runtime
