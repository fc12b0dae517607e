"""`llmstudioctl explain`: where a model would go and why, as data and as people read it."""

from dataclasses import replace
from typing import Any

import pytest

from llmstudiod.core.ledger import Memory
from llmstudiod.core.placement import Room, Wish
from llmstudiod.ctl.explain import explain_text
from llmstudiod.http.admin_gpus import preview_answer
from tests.unit.test_scheduler_memory import GIB, MemoryWorld, ready, serve, wish, world_of

PLAN: dict[str, Any] = {
    "recipe": {"id": "b", "model_path": "/m/b.gguf", "file": "/etc/b.yaml"},
    "n_parallel": 4, "n_ctx": 2048, "n_ctx_total": 8192, "notes": ["a note"], "estimate": None,
    "llama_server": {"version": "0.7.0", "source": "PATH"}, "environment": {"A": "b c"}, "argv": ["llama-server", "-m"],
    "systemd_run": None,
}  # fmt: skip


def told(world: MemoryWorld, model: str, wanted: Wish | None = None) -> dict[str, Any]:
    """Return what the admin interface says."""
    names = tuple(f"GPU {n}" for n in range(len(world.capacity.devices)))
    memory = Memory(world.now, world.capacity, world.free(), names, tuple(f"GPU-{name}" for name in names))
    found = world.scheduler.preview(model, wanted or world.wishes.get(model), memory, world.now)
    return preview_answer(found, wanted or world.wishes.get(model))


def text(found: dict[str, Any], **changes: Any) -> list[str]:
    """Return the lines that people read."""
    return explain_text({**PLAN, "placement": found, **changes}).splitlines()


def test_place_that_is_free() -> None:
    """With who holds what, and the terms by whom they are told."""
    world = world_of(wish("a", 8), wish("b", 4), devices=(12, 24))
    serve(world, "a")
    world.others = Room(2 * GIB, (GIB, 0))
    found = told(world, "b")
    assert (found["evicts"], found["waits_for"], found["error"]) == ([], [], None)
    (gpu,) = found["place"]["gpus"]
    assert (gpu["name"], gpu["uuid"], gpu["layers"]) == ("GPU 1", "GPU-GPU 1", 9)
    first, second, ram = found["memory"]
    assert [model["id"] for model in first["models"]] == ["a"]
    assert first["total"] == first["free"] + first["others"] + first["models"][0]["memory"]
    assert (first["others"], second["free"]) == (GIB, 24 * GIB)
    assert ram["others"] == pytest.approx(2 * GIB, rel=0.01)
    lines = text(found)
    assert "placement: it would go to GPU 1 (9 layers, 3.9 GiB)" in lines
    assert "memory that it needs (by the estimate):" in lines
    assert any(line.split()[:6] == ["GPU", "0", "12.0", "GiB", "3.1", "GiB"] for line in lines)
    assert "  A='b c' llama-server -m" in lines
    assert [start.model for start in world.starts] == ["a"]


def test_who_would_go_is_told_and_stays() -> None:
    """Nothing is changed by asking."""
    world = world_of(wish("a", 14), wish("b", 14))
    serve(world, "a")
    found = told(world, "b")
    assert (found["evicts"], [gpu["name"] for gpu in found["place"]["gpus"]]) == (["a"], ["GPU 0"])
    assert "evicts: a" in text(found)
    assert ready(world) == ["a"]
    assert world.stops == []


def test_who_would_be_waited_for_is_told() -> None:
    """A busy one."""
    world = world_of(wish("a", 14), wish("b", 14))
    world.ask("a")
    world.advance(5)
    found = told(world, "b")
    assert (found["waits_for"], found["place"]) == (["a"], None)
    assert "placement: none yet, it would wait for a" in text(found)


def test_why_it_does_not_fit_is_told() -> None:
    """With the hint."""
    found = told(world_of(wish("b", 30)), "b")
    assert "GPU 0 has 24.0 GiB free" in found["error"]
    lines = text(found)
    assert lines[5].startswith("placement: cannot load 'b': it needs 29.9 GiB")
    assert lines[6].startswith("hint: ")


def test_place_of_one_that_runs() -> None:
    """Where it lies, not where it would go; a found one of before may not know."""
    world = world_of(wish("b", 4))
    serve(world, "b")
    found = told(world, "b")
    assert found["is_running"]
    assert "placement: it runs on GPU 0 (9 layers, 3.9 GiB)" in text(found)
    unknown = {**found, "place": None}
    assert "placement: it runs, and where it lies is not known" in text(unknown)


def test_model_that_is_not_planned() -> None:
    """llama-server finds its place itself, and the estimate is for the CPU."""
    world = world_of(wish("b", 4))
    world.wishes.clear()
    estimate = told(world_of(wish("b", 4)), "b")["place"]["estimate"]
    lines = text(told(world, "b"), estimate=estimate)
    assert "placement: not planned, llama-server finds its place itself" in lines
    assert "memory that it needs, with everything on the CPU (by the estimate):" in lines
    assert not any(line.startswith("placement") for line in text(None, estimate=estimate))  # type: ignore[arg-type]


def test_reduction_is_told() -> None:
    """What is less than was wished for, in the notes."""
    found = told(world_of(wish("b", 14, n_gpu_layers=None), devices=(8,)), "b")
    assert any("of 9 layers on the GPU: more does not fit" in line for line in text(found))


def test_prompt_cache_is_told() -> None:
    """It is no part of the table, since it grows for days."""
    model = wish("b", 4)
    world = world_of(replace(model, run=replace(model.run, cache_ram=GIB)))
    assert "and up to 1.0 GiB of RAM for prompts of the past (cache_ram)" in text(told(world, "b"))
