"""What is asked of a launcher."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Self

from llmstudiod.core.command import BoundFile


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """All that a launcher is told: plain values, small, serialisable, so that a privileged helper can take it.

    ``limits`` holds systemd's property names; the subprocess launcher has no use for them.
    """

    model_id: str
    recipe_hash: str
    recipe_file: str | None
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    socket_path: str
    files: tuple[BoundFile, ...] = ()
    limits: Mapping[str, str] = field(default_factory=dict)
    needs_gpu: bool = False

    def to_json(self) -> str:
        """Return the request as one line of JSON."""
        return json.dumps(asdict(self), separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the request that `to_json` wrote."""
        raw = json.loads(text)
        raw["argv"] = tuple(raw["argv"])
        raw["files"] = tuple(BoundFile(**file) for file in raw["files"])
        return cls(**raw)
