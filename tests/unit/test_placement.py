"""Where models go: fewest GPUs, tightest fit, as many layers as fit, and a refusal that shows the sum."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmstudiod.core.learned import Correction
from llmstudiod.core.ledger import Memory, holding
from llmstudiod.core.memory import MIB, Run
from llmstudiod.core.model_shape import Layer, ModelShape
from llmstudiod.core.placement import Grade, Placement, Room, Wish, length_of, needs, place
from llmstudiod.core.refusal import refusal

GIB = 1 << 30
# Like an 8B model in q4: 32 layers of 130 MiB, 1 KiB of keys and values each for a token and layer.
SHAPE = ModelShape(
    architecture="llama", layers=(Layer(k_row=1024, v_row=1024, weights=130 * MIB),) * 32, input_weights=250 * MIB,
    output_weights=400 * MIB, n_embd=4096, n_ff=14336, n_head=32, q_width=4096, kv_width=1024, n_vocab=128_000,
    n_ctx_train=131_072,
)  # fmt: skip
WISH = Wish("llama3-8b", SHAPE, Run(32768, n_seq=4))
ON_ONE_GPU = needs(WISH, replace(WISH.run, n_gpu_layers=33, proportions=(1.0,))).devices[0].total
HOST = 64 * GIB


def placed(wish: Wish, *devices: float, host: float = 64) -> Placement:
    """Place the model on devices of so many GiB."""
    found = place(wish, room(*devices, host=host))
    assert found is not None
    return found


def room(*devices: float, host: float = 64) -> Room:
    """Room in GiB."""
    return Room(int(host * GIB), tuple(int(size * GIB) for size in devices))


def test_the_need_is_what_the_tests_below_assume() -> None:
    """Some 9.1 GiB on one GPU."""
    assert 9 * GIB < ON_ONE_GPU < 10 * GIB


@pytest.mark.parametrize(
    ("devices", "gpus"),
    [
        ((24, 12, 16), (1,)),  # the tightest that fits
        ((4, 24), (1,)),
        ((24, 24), (0,)),
        ((6, 6), (0, 1)),
        ((3, 7, 7), (1, 2)),  # the fewest
        ((4, 4, 4), (0, 1, 2)),
    ],
)
def test_one_gpu_then_the_fewest(devices: tuple[float, ...], gpus: tuple[int, ...]) -> None:
    """All layers, and nothing in RAM that could be on a GPU."""
    found = placed(WISH, *devices)
    assert (found.gpus, found.run.n_gpu_layers, found.notes) == (gpus, 33, ())
    assert found.run.split_mode == ("none" if len(gpus) == 1 else "layer")
    assert found.estimate.host.layers == 0


def test_parts_follow_the_room() -> None:
    """A larger GPU gets more layers, and neither more than it has."""
    found = placed(WISH, 4, 8)
    small, large = found.estimate.devices
    assert small.layers < large.layers
    assert small.total <= 4 * GIB
    assert large.total <= 8 * GIB
    assert sum(found.run.proportions) == 33


def test_rest_goes_to_the_cpu() -> None:
    """As many layers as fit, and that is told."""
    found = placed(WISH, 5)
    assert 5 < found.run.n_gpu_layers < 33
    assert found.notes == (f"{found.run.n_gpu_layers} of 33 layers on the GPU: more does not fit",)
    assert found.estimate.devices[0].total <= 5 * GIB
    assert placed(WISH, 0.1).gpus == ()


def test_machine_without_a_gpu() -> None:
    """RAM is counted the same way."""
    assert placed(WISH, host=16).run.n_gpu_layers == 0
    assert place(WISH, room(host=4)) is None
    assert place(replace(WISH, run=replace(WISH.run, cache_ram=8 * GIB)), room(host=16)) is None


@pytest.mark.parametrize(
    ("fields", "devices", "expected"),
    [
        ({"gpus": (1,)}, (24, 24), (1,)),
        ({"gpus": ()}, (24, 24), ()),
        ({"n_gpu_layers": 0}, (24,), ()),
        ({"max_gpus": 1}, (6, 6), None),
        ({"max_gpus": 2}, (4, 4, 4), None),
        ({"split_mode": "none"}, (6, 6), None),
        ({"n_gpu_layers": 99}, (8,), None),
        ({"n_gpu_layers": 10}, (8,), (0,)),
        ({"tensor_split": (3.0, 1.0)}, (8, 4), (0, 1)),
        ({"tensor_split": (3.0, 1.0)}, (4, 8), None),
        ({"gpus": (0,)}, (4, 24), None),
    ],
)
def test_what_a_recipe_sets_is_kept(
    fields: dict[str, object], devices: tuple[float, ...], expected: tuple[int, ...] | None
) -> None:
    """Its GPUs, their number, the layers, the parts; None: it is refused rather than changed."""
    wish = replace(WISH, **{"n_gpu_layers": 33, **fields})  # type: ignore[arg-type]
    found = place(wish, room(*devices))
    assert (found.gpus if found else None) == expected
    if found and "tensor_split" in fields:
        assert found.run.proportions == (3.0, 1.0)


def test_open_context_is_reduced_and_told() -> None:
    """Halved until it fits, not below 2048 tokens for a request; a context that the recipe sets stays."""
    wish = replace(WISH, n_gpu_layers=33, is_context_open=True)
    found = placed(wish, 7)
    assert found.run.n_ctx == 8192
    assert found.notes == ("context reduced from 8192 to 2048 tokens for one request: more does not fit",)
    assert place(wish, room(5.5)) is None
    assert place(replace(wish, is_context_open=False), room(7)) is None


def test_what_goes_with_a_model_counts() -> None:
    """A draft model and an encoder lie on the GPU too."""
    alone = needs(WISH, replace(WISH.run, n_gpu_layers=33, proportions=(1.0,)))
    small = replace(SHAPE, layers=SHAPE.layers[:2])
    both = needs(
        replace(WISH, draft=small, mmproj_bytes=GIB), replace(WISH.run, n_gpu_layers=33, proportions=(1.0,))
    )  # fmt: skip
    assert both.devices[0].weights == alone.devices[0].weights + 2 * 130 * MIB + 400 * MIB + GIB
    assert both.devices[0].kv == alone.devices[0].kv * 34 // 32


def test_weights_that_the_cpu_copies_count_once() -> None:
    """The file's pages may go then, so the model fits where both together would not."""
    shape = replace(SHAPE, repackable=4 * GIB)
    need = needs(replace(WISH, shape=shape), WISH.run)
    assert need.host_total == need.host.total + 4 * GIB
    found = place(replace(WISH, shape=shape), Room(need.host.total))
    assert found is not None
    memory = Memory(0.0, room(), room())
    assert holding("m", found, memory, is_taken=True).untaken.host == need.host.weights - 4 * GIB
    assert holding("m", found, memory, is_taken=False).untaken.host == need.host.total


def test_held_is_told_for_each_device() -> None:
    """By the index of the device, whatever the order of the placement."""
    found = placed(WISH, 3, 7, 7)
    held = found.held(3)
    assert held.devices[0] == 0
    assert held.devices[1:] == tuple(share.total for share in found.estimate.devices)
    assert held.host == found.estimate.host.total


def test_refusal_shows_the_sum_and_what_would_fit() -> None:
    """What is needed, what is there, what could be freed; then the nearest settings that fit."""
    wish = replace(WISH, n_gpu_layers=33)
    told, hint = refusal(wish, room(4, 2), room(3, 0), room(0, 1), names=["GPU 0", "GPU 1"])
    assert told == (
        "it needs 9.1 GiB (weights 4.5 GiB, KV cache 4.0 GiB for 32,768 tokens, buffers 644.0 MiB) on a GPU; "
        "GPU 0 has 4.0 GiB free, 3.0 GiB could be freed; GPU 1 has 2.0 GiB free, 0 B could be freed, "
        "other programs use 1.0 GiB"
    )
    assert hint.startswith("it would fit with max_model_len ")
    length = int(hint.split()[5])
    assert place(replace(wish, run=replace(wish.run, n_ctx=4 * length)), room(7, 2)) is not None
    assert place(replace(wish, run=replace(wish.run, n_ctx=4 * (length + 256))), room(7, 2)) is None
    assert "n_gpu_layers" in hint


def test_refusal_on_the_cpu_speaks_of_ram() -> None:
    """And says so when nothing would help."""
    told, hint = refusal(replace(WISH, gpus=()), room(8, host=2), room(0, host=1), room(0, host=0.01), names=["GPU 0"])
    assert told.startswith("it needs 8.9 GiB (weights 4.7 GiB,")
    assert told.endswith("of RAM; 2.0 GiB of RAM are free, 1.0 GiB could be freed")
    assert "GPU" not in told
    assert hint == "a smaller quantisation, or a smaller model, may fit"


SIZES = st.lists(st.integers(0, 24 * GIB), max_size=4)


@settings(deadline=None)
@given(devices=SIZES, host=st.integers(0, HOST), is_open=st.booleans(), layers=st.none() | st.integers(0, 40))
def test_no_device_is_over_its_room(devices: list[int], host: int, layers: int | None, *, is_open: bool) -> None:
    """Whatever there is, and whatever is wished for."""
    wish = replace(WISH, is_context_open=is_open, n_gpu_layers=layers)
    there = Room(host, tuple(devices))
    found = place(wish, there)
    if found is None:
        nothing = Room(0, (0,) * len(devices))
        refusal(wish, there, nothing, nothing, names=[f"GPU {n}" for n in range(len(devices))])
        return
    held = found.held(len(devices))
    assert held.host <= host
    assert all(used <= free for used, free in zip(held.devices, devices, strict=True))
    assert all(share.layers or share.total == 0 for share in found.estimate.devices)
    if layers is not None and found.gpus:
        assert found.run.n_gpu_layers == min(layers, 33)


@settings(deadline=None)
@given(size=st.integers(0, 12 * GIB), more=st.integers(0, 4 * GIB))
def test_more_memory_never_places_fewer_layers(size: int, more: int) -> None:
    """On one GPU."""
    layers = [place(WISH, Room(HOST, (bytes_,))) for bytes_ in (size, size + more)]
    less_found, more_found = (found.run.n_gpu_layers if found else 0 for found in layers)
    assert more_found >= less_found


OPEN = replace(WISH, is_context_open=True, are_slots_open=True)


@pytest.mark.parametrize(
    ("devices", "grade", "n_seq", "length"),
    [
        ((9.5,), Grade.FULL, 4, 8192),
        ((8,), Grade.FULL, 2, 8192),  # slots give way first
        ((6.4,), Grade.FULL, 1, 8192),
        ((5.8,), Grade.SHORTER, 1, 4096),  # then the context
        ((5.3,), Grade.PARTLY, 1, 8192),  # then layers
        ((0.2,), Grade.CPU, 4, 8192),
        ((), Grade.FULL, 4, 8192),
    ],
)
def test_what_is_open_gives_way_in_its_order(
    devices: tuple[float, ...], grade: Grade, n_seq: int, length: int
) -> None:  # fmt: skip
    """Slots, the context, layers, the GPU; the place is of that grade and of none that is better."""
    found = placed(OPEN, *devices)
    assert (found.run.n_seq, length_of(found.run)) == (n_seq, length)
    grades = OPEN.grades(has_gpus=bool(devices))
    assert next(each for each in grades if place(OPEN, room(*devices), each)) is grade
    assert place(OPEN, room(*devices), grade) == found


def test_less_than_was_wished_for_is_told() -> None:
    """Slots, and the context of one request."""
    assert placed(OPEN, 8).notes == ("2 slots instead of 4: more does not fit",)
    assert placed(OPEN, 5.8).notes == (
        "context reduced from 8192 to 4096 tokens for one request: more does not fit",
        "1 slot instead of 4: more does not fit",
    )
    assert placed(OPEN, 9.5).notes == ()


def test_slots_of_a_shared_pool_cost_nothing() -> None:
    """All of them have the same tokens, so there is no reason to give one up."""
    unified = replace(OPEN, run=replace(WISH.run, is_unified=True, n_ctx=8192))
    found = placed(unified, 6.4)
    assert (found.run.n_seq, found.run.n_ctx) == (4, 8192)


@pytest.mark.parametrize(
    ("fields", "grades"),
    [
        ({}, "FULL PARTLY CPU"),
        ({"is_context_open": True}, "FULL SHORTER PARTLY PARTLY_SHORTER CPU CPU_SHORTER"),
        ({"n_gpu_layers": 20, "is_context_open": True}, "FULL SHORTER"),
        ({"gpus": ()}, "FULL"),
    ],
)
def test_only_what_is_open_gives_way(fields: dict[str, object], grades: str) -> None:
    """What the recipe sets is of every grade."""
    wish = replace(WISH, **fields)  # type: ignore[arg-type]
    assert " ".join(grade.name for grade in wish.grades(has_gpus=True)) == grades
    assert all(grade in {Grade.FULL, Grade.SHORTER} for grade in wish.grades(has_gpus=False))


def test_margin_must_be_free_on_top() -> None:
    """On a GPU and in RAM."""
    size = ON_ONE_GPU * 1.05 / GIB
    assert placed(replace(WISH, n_gpu_layers=33), size).gpus == (0,)
    assert place(replace(WISH, n_gpu_layers=33, margin=0.1), room(size)) is None
    whole = placed(WISH, host=64).estimate.host.total
    assert place(replace(WISH, margin=0.1), Room(int(whole * 1.05))) is None
    assert place(replace(WISH, margin=0.1), Room(int(whole * 1.11))) is not None


def test_correction_counts_everywhere() -> None:
    """In the need, in the place, and in the refusal."""
    wish = replace(WISH, n_gpu_layers=33, correction=Correction(kv=0.5, compute=2.0, runtime=100 * MIB, source="x"))
    run = replace(WISH.run, n_gpu_layers=33, proportions=(1.0,))
    before, after = needs(WISH, run).devices[0], needs(wish, run).devices[0]
    assert (after.weights, after.kv, after.compute) == (before.weights, before.kv // 2, 2 * before.compute)
    assert after.runtime == 100 * MIB
    assert place(wish, room(7)) is not None
    assert "KV cache 2.0 GiB" in refusal(wish, room(4), room(0), room(0), names=["GPU 0"])[0]


def test_placement_survives_being_kept() -> None:
    """As JSON, by a daemon that finds the model running."""
    found = replace(placed(OPEN, 4, 8), uuids=("GPU-a", "GPU-b"))
    assert Placement.from_dict(json.loads(json.dumps(found.as_dict()))) == found
    for damaged in ({}, {**found.as_dict(), "run": {"n_ctx": 1, "x": 2}}, {**found.as_dict(), "gpus": None}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            Placement.from_dict(damaged)


def test_gpu_that_is_lost_moves_the_others() -> None:
    """What is held goes by UUID: the first GPU fell off the bus, and a new one came."""
    found = replace(placed(OPEN, 4, 8), uuids=("GPU-a", "GPU-b"))
    first, second = found.held(2, ["GPU-a", "GPU-b"]).devices
    assert found.held(2).devices == (first, second)
    assert found.held(2, ["GPU-b", "GPU-c"]).devices == (second, 0)


@settings(deadline=None)
@given(size=st.integers(0, 12 * GIB), more=st.integers(0, 4 * GIB), grade=st.sampled_from(Grade))
def test_more_memory_never_makes_a_place_worse(size: int, more: int, grade: Grade) -> None:
    """Whatever fits at a grade fits there with more, and with no fewer slots, tokens or layers."""
    less_found, more_found = (place(OPEN, Room(HOST, (bytes_,)), grade) for bytes_ in (size, size + more))
    if less_found is not None:
        assert more_found is not None
        less_run, more_run = less_found.run, more_found.run
        assert (length_of(more_run), more_run.n_gpu_layers) >= (length_of(less_run), less_run.n_gpu_layers)
        if length_of(more_run) == length_of(less_run):
            assert more_run.n_seq >= less_run.n_seq
