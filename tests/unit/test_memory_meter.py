"""The RAM that models may use: what the kernel tells, less what is left to others, within limits from above."""

from pathlib import Path

import pytest

from llmstudiod.adapters.memory_meter import measure_memory, total_ram_bytes
from llmstudiod.core.ledger import Memory
from llmstudiod.core.placement import Room

GIB = 1 << 30


def machine(root: Path, *, total: int = 24, available: int = 20, limit: str | None = None) -> Path:
    """A root directory that tells of so many GiB; ``limit`` is what the models' slice says."""
    (root / "proc/self").mkdir(parents=True)
    meminfo = f"MemTotal: {total << 20} kB\nMemFree: 1 kB\nMemAvailable: {available << 20} kB\nHugePages_Total: 0\n"
    (root / "proc/meminfo").write_text(meminfo)
    (root / "proc/self/cgroup").write_text("0::/llmstudio.slice/llmstudiod.service\n")
    slice_ = root / "sys/fs/cgroup/llmstudio.slice/llmstudio-models.slice"
    slice_.mkdir(parents=True)
    if limit is not None:
        (slice_ / "memory.max").write_text(f"{limit}\n")
    return root


@pytest.mark.parametrize(
    ("values", "capacity", "free"),
    [
        ({}, 23 * GIB, 19 * GIB),
        ({"limit": "max"}, 23 * GIB, 19 * GIB),
        ({"limit": str(8 * GIB)}, 7 * GIB, 7 * GIB),
        ({"limit": str(8 * GIB), "available": 4}, 7 * GIB, 3 * GIB),
        ({"total": 4, "available": 2}, 4 * GIB - GIB // 2, 2 * GIB - GIB // 2),  # little is left to others of little
    ],
)
def test_room_is_what_is_left_to_models(tmp_path: Path, values: dict[str, object], capacity: int, free: int) -> None:
    """In all, and at this moment."""
    found = measure_memory(5.0, models_are_units=True, root=machine(tmp_path, **values))  # type: ignore[arg-type]
    assert found == Memory(5.0, Room(capacity), Room(free))


@pytest.mark.parametrize("text", [None, "", "MemTotal: 5 kB\n", "MemTotal: x kB\nMemAvailable: 5 kB\n", "\xff"])
def test_kernel_that_does_not_tell_is_not_guessed(tmp_path: Path, text: str | None) -> None:
    """Then memory is not planned."""
    root = machine(tmp_path)
    (root / "proc/meminfo").unlink()
    if text is not None:
        (root / "proc/meminfo").write_text(text, "latin-1")
    assert measure_memory(0.0, models_are_units=True, root=root) is None


def test_this_machine_tells() -> None:
    """Whatever it has."""
    found = measure_memory(1.0, models_are_units=False)
    assert found is not None
    assert 0 < found.capacity.host < total_ram_bytes()
