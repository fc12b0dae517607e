"""Whether a server that became ready still answers: never on a missed probe alone, never on a line of its log alone."""

import dataclasses

import pytest

from llmstudiod.core.vigil import Alarms, Look, Movement, Verdict, Vigil, is_alarming

WELL = Look(at=0.0, answers=True, n_in_flight=0, cpu_s=1.0)


def verdicts(vigil: Vigil, *looks: Look) -> list[Verdict]:
    """Return what each look says, ten seconds after the one before."""
    return [vigil.look(dataclasses.replace(look, at=10.0 * number)) for number, look in enumerate(looks, 1)]


def busy(progress: int, *, cpu_s: float = 1.0, n_free: int = 0, answers: bool = True) -> Look:
    """Return a server with two requests, which are ``progress`` far."""
    return Look(0.0, answers, 2, slots=((1, 8, progress), (2, 8, progress)), n_free=n_free, cpu_s=cpu_s)


def test_idle_server_is_well() -> None:
    """It answers, and nobody asks for anything."""
    assert verdicts(Vigil(0.0, patience_s=30), *[WELL] * 10) == [Verdict.WELL] * 10


def test_working_server_is_well() -> None:
    """Its requests get on."""
    assert verdicts(Vigil(0.0, patience_s=15), *[busy(n) for n in range(10)]) == [Verdict.WELL] * 10


def test_missed_probes_of_a_server_that_computes_are_waited_for() -> None:
    """A burst of connections holds /health back; its process works on, and it comes back."""
    vigil = Vigil(0.0, patience_s=120)
    missed = [dataclasses.replace(busy(0, cpu_s=float(n)), answers=False, slots=None) for n in range(2, 8)]
    assert Verdict.HUNG not in verdicts(vigil, busy(1), *missed, busy(2, cpu_s=20.0))


def test_frozen_server_is_noticed() -> None:
    """Three probes without an answer, and a process that does nothing: stopped by a signal, or a deadlock."""
    vigil = Vigil(0.0, patience_s=120)
    frozen = Look(0.0, answers=False, n_in_flight=1, cpu_s=5.0, is_stopped=True)
    found = verdicts(vigil, dataclasses.replace(WELL, cpu_s=5.0), frozen, frozen, frozen)
    assert found == [Verdict.WELL, Verdict.WAIT, Verdict.WAIT, Verdict.HUNG]
    assert "was stopped by a signal" in vigil.reason


def test_one_answer_in_between_begins_anew() -> None:
    """Misses count in a row."""
    missed = Look(0.0, answers=False, n_in_flight=0, cpu_s=5.0)
    answered = dataclasses.replace(WELL, cpu_s=5.0)
    found = verdicts(Vigil(0.0, patience_s=60), answered, missed, missed, answered, missed, missed)
    assert Verdict.HUNG not in found


def test_server_that_spins_is_noticed_in_the_end() -> None:
    """It uses the CPU, and answers nothing for as long as its patience."""
    vigil = Vigil(0.0, patience_s=50)
    spins = [dataclasses.replace(WELL, answers=False, cpu_s=float(n)) for n in range(2, 12)]
    assert verdicts(vigil, WELL, *spins)[-1] is Verdict.HUNG
    assert "computes" in vigil.reason


def test_requests_that_stand_still_while_a_slot_is_free() -> None:
    """It says 200, and yet nothing moves: it is asked for one token."""
    vigil = Vigil(0.0, patience_s=25)
    found = verdicts(vigil, *[busy(3, n_free=1)] * 5)
    assert Verdict.ASK in found
    still = busy(3, n_free=1)
    assert vigil.asked(dataclasses.replace(still, at=60.0), has_answered=True, within_s=30) is Verdict.WELL
    assert vigil.look(dataclasses.replace(still, at=70.0)) is Verdict.WELL
    assert vigil.asked(dataclasses.replace(still, at=99.0), has_answered=False, within_s=30) is Verdict.HUNG
    assert "one token" in vigil.reason


def test_slots_that_stand_still_and_do_nothing() -> None:
    """All slots are taken, none moves, and the process does nothing: a deadlock in the GPU's driver."""
    vigil = Vigil(0.0, patience_s=25)
    assert verdicts(vigil, *[busy(3)] * 5)[-1] is Verdict.HUNG
    assert "stood still" in vigil.reason


def test_slow_prompt_has_more_time() -> None:
    """One step of a long prompt on a CPU can take minutes; its process computes meanwhile."""
    vigil = Vigil(0.0, patience_s=25)
    found = verdicts(vigil, *[busy(3, cpu_s=float(n)) for n in range(12)])
    assert found == [Verdict.WELL] * 12
    found = verdicts(vigil, *[busy(3, cpu_s=float(n)) for n in range(12, 40)])
    assert found[-1] is Verdict.HUNG


def test_alarm_asks_and_never_kills() -> None:
    """A client may have had that line written."""
    vigil = Vigil(0.0, patience_s=25)
    assert vigil.look(dataclasses.replace(WELL, is_alarmed=True)) is Verdict.ASK
    assert vigil.asked(dataclasses.replace(WELL, at=1.0), has_answered=True, within_s=30) is Verdict.WELL


def test_alarm_of_an_idle_server_that_computes_no_token() -> None:
    """Nobody else is in it and its process does nothing, so nothing can have held the token up."""
    vigil = Vigil(0.0, patience_s=25)
    assert vigil.look(dataclasses.replace(WELL, is_alarmed=True)) is Verdict.ASK
    assert vigil.asked(dataclasses.replace(WELL, at=31.0), has_answered=False, within_s=30) is Verdict.HUNG


def test_step_whose_client_has_left_may_hold_a_token_up() -> None:
    """It computes for as long as a slow step may take, is asked again at each look, and is well once it answers."""
    vigil = Vigil(0.0, patience_s=25)
    assert verdicts(vigil, WELL, dataclasses.replace(WELL, cpu_s=5.0, is_alarmed=True))[-1] is Verdict.ASK
    computing = dataclasses.replace(WELL, at=50.0, cpu_s=35.0)
    assert vigil.asked(computing, has_answered=False, within_s=30) is Verdict.WELL
    assert vigil.look(dataclasses.replace(computing, at=65.0, cpu_s=50.0)) is Verdict.ASK
    done = dataclasses.replace(computing, at=70.0, cpu_s=52.0)
    assert vigil.asked(done, has_answered=True, within_s=30) is Verdict.WELL
    assert vigil.look(dataclasses.replace(done, at=85.0)) is Verdict.WELL


def test_idle_server_that_spins_after_an_alarm_is_noticed_in_the_end() -> None:
    """Looks and questions in between are no movement: only a token is."""
    vigil = Vigil(0.0, patience_s=25)
    assert vigil.look(dataclasses.replace(WELL, at=10.0, is_alarmed=True)) is Verdict.ASK
    found = []
    for at in (40.0, 85.0, 130.0):
        spins = dataclasses.replace(WELL, at=at, cpu_s=at)
        found.append(vigil.asked(spins, has_answered=False, within_s=30))
        if found[-1] is Verdict.WELL:
            assert vigil.look(dataclasses.replace(spins, at=at + 15, cpu_s=at + 15)) is Verdict.ASK
    assert found == [Verdict.WELL, Verdict.WELL, Verdict.HUNG]


def test_alarm_behind_full_slots_that_move_asks_for_nothing() -> None:
    """A token would wait for its turn; that they still move at the next look is an answer as good."""
    vigil = Vigil(0.0, patience_s=25)
    alarmed = dataclasses.replace(busy(2, cpu_s=2.0), is_alarmed=True)
    found = verdicts(vigil, busy(1), alarmed, *[busy(n, cpu_s=float(n)) for n in range(3, 8)], busy(9, n_free=1))
    assert found == [Verdict.WELL] * 8


def test_alarm_behind_full_slots_is_asked_about_once_one_is_free() -> None:
    """That they moved before the line came says nothing of what came after it."""
    vigil = Vigil(0.0, patience_s=25)
    found = verdicts(vigil, busy(1), dataclasses.replace(busy(2), is_alarmed=True), busy(3, n_free=1))
    assert found == [Verdict.WELL, Verdict.WELL, Verdict.ASK]


def test_alarm_behind_full_slots_that_neither_move_nor_compute_is_asked_about() -> None:
    """Nobody has to wait for as long as its patience then."""
    vigil = Vigil(0.0, patience_s=25)
    found = verdicts(vigil, busy(1), dataclasses.replace(busy(1), is_alarmed=True))
    assert found == [Verdict.WELL, Verdict.ASK]
    assert vigil.asked(dataclasses.replace(busy(1), at=52.0), has_answered=False, within_s=30) is Verdict.HUNG


@pytest.mark.parametrize(
    "after",
    [busy(5, cpu_s=2.0), dataclasses.replace(busy(1, cpu_s=2.0), slots=None, is_mute=True), busy(1, cpu_s=2.0)],
    ids=["moved", "in a long step", "full"],
)
def test_token_that_had_to_wait_for_others_proves_nothing(after: Look) -> None:
    """A slot was free when it was asked for, and others were faster; the server works at what they want."""
    vigil = Vigil(0.0, patience_s=25)
    assert verdicts(vigil, busy(1), dataclasses.replace(busy(1, n_free=1), is_alarmed=True))[-1] is Verdict.ASK
    assert vigil.asked(dataclasses.replace(after, at=52.0), has_answered=False, within_s=30) is Verdict.WELL


def test_question_to_a_server_that_answers_nothing_any_more_is_a_missed_probe() -> None:
    """It may have frozen while it was asked; three probes tell, as always."""
    vigil = Vigil(0.0, patience_s=120)
    assert vigil.look(dataclasses.replace(WELL, is_alarmed=True)) is Verdict.ASK
    silent = dataclasses.replace(WELL, answers=False, at=40.0)
    assert vigil.asked(silent, has_answered=False, within_s=30) is Verdict.WAIT


def test_server_that_spins_and_tells_no_slots_is_noticed() -> None:
    """/health has a thread of its own and says 200 while the GPU's driver waits in a loop; that has its time."""
    vigil = Vigil(0.0, patience_s=25)
    spins = [dataclasses.replace(busy(1, cpu_s=float(n)), slots=None, is_mute=True) for n in range(2, 20)]
    found = verdicts(vigil, busy(1), *spins)
    assert found[:13] == [Verdict.WELL] * 13
    assert found[13] is Verdict.ASK
    last = dataclasses.replace(spins[-1], at=171.0, cpu_s=99.0)
    assert vigil.asked(last, has_answered=False, within_s=30) is Verdict.HUNG


def test_long_step_in_which_slots_are_not_told_is_no_standstill() -> None:
    """/slots is answered between two steps of a large prompt; what has moved by then counts."""
    vigil = Vigil(0.0, patience_s=25)
    looks = []
    for n in range(40):
        told = busy(n, cpu_s=float(n))
        looks.append(told if n % 10 == 0 else dataclasses.replace(told, slots=None, is_mute=True))
    assert verdicts(vigil, *looks) == [Verdict.WELL] * 40


def test_server_without_slots_is_judged_by_its_process() -> None:
    """/slots may be switched off."""
    looks = [Look(0.0, answers=True, n_in_flight=1, cpu_s=float(n)) for n in range(10)]
    assert verdicts(Vigil(0.0, patience_s=25), *looks) == [Verdict.WELL] * 10
    still = [Look(0.0, answers=True, n_in_flight=1, cpu_s=1.0)] * 10
    assert Verdict.HUNG in verdicts(Vigil(0.0, patience_s=25), *still)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("0.12.000.000 E /src/ggml-cuda.cu:88: CUDA error", True),
        ("./src/llama-context.cpp:2624: GGML_ASSERT(n_outputs >= 1) failed", True),
        ("0.12.000.000 I slot print_timing: eval time = 3 ms", False),
        ("0.12.000.000 W srv stop: cancel task, id_task = 0", False),
    ],
)
def test_alarming_lines(line: str, expected: bool) -> None:
    """What is reason enough to ask."""
    assert is_alarming(line) == expected


def moves(*looks: tuple[object, float | None]) -> list[bool]:
    """Return what is seen of a load that may stand still for 20 s, looked at every ten."""
    movement = Movement(0.0, patience_s=20)
    return [movement.is_seen(10.0 * n, mark, cpu_s=cpu_s) for n, (mark, cpu_s) in enumerate(looks)]


def test_load_that_reads_and_shows_nothing_moves() -> None:
    """A file that goes through a fixed buffer into a GPU costs CPU time, and neither memory nor a line."""
    assert moves(*[("a", float(n)) for n in range(9)]) == [True] * 9


def test_load_that_spins_stands_still_in_the_end() -> None:
    """CPU time alone counts for five times as long; what else moves begins that anew."""
    spins = [("a", float(n)) for n in range(12)]
    assert moves(*spins) == [True] * 10 + [False] * 2
    assert moves(*spins, ("b", 20.0), ("b", 21.0))[-3:] == [False, True, True]


def test_load_that_does_nothing_stands_still() -> None:
    """Also where its CPU time is not known."""
    assert moves(("a", 1.0), ("a", 1.0), ("a", None), ("a", None)) == [True, False, False, False]


def test_line_is_new_once() -> None:
    """Neither that others follow, nor that some are forgotten, makes an old line a new one; the same words again do."""
    alarm, alarms = "GGML_ASSERT(\nx", Alarms()
    assert alarms.are_new(["a", alarm, "b"], 3)
    assert not alarms.are_new(["a", alarm, "b"], 3)
    assert not alarms.are_new([alarm, "b", "c"], 4)
    assert not alarms.are_new(["b", "c", "d"], 5)
    assert alarms.are_new(["d", alarm, alarm], 7)
    assert alarms.are_new([alarm, alarm, alarm], 8)
    assert list(alarms.last) == [alarm] * 4
    assert alarms.are_new(["e", alarm], 2)  # it is counted from the beginning again
