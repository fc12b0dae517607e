"""How doctor judges what it finds, where no machine here is so; the whole: `test_ctl.py` and `tests/system`."""

import grp
from typing import Any

import pytest

from llmstudiod.ctl import doctor
from llmstudiod.ctl.client import AnswerError, Client

GOOD = {"LoadState": "loaded", "ActiveState": "active", "SubState": "running", "UnitFileState": "enabled"}
SERVICE, SOCKET = "llmstudiod.service", "llmstudiod.socket"


@pytest.mark.parametrize(
    ("unit", "facts", "level", "hint"),
    [
        (SERVICE, {}, doctor.OK, None),
        (SERVICE, {"ActiveState": "inactive", "SubState": "dead"}, doctor.OK, None),
        (SERVICE, {"ActiveState": "failed"}, doctor.FAULT, f"systemctl status {SERVICE}"),
        (
            SERVICE,
            {"ActiveState": "activating", "SubState": "auto-restart"},
            doctor.FAULT,
            "journalctl -u llmstudiod -n 30",
        ),
        (SERVICE, {"ActiveState": "activating", "SubState": "auto-restart-queued"}, doctor.FAULT, "journalctl"),
        (SERVICE, {"LoadState": "masked", "ActiveState": "inactive"}, doctor.FAULT, f"systemctl unmask {SERVICE}"),
        (SOCKET, {"LoadState": "masked", "ActiveState": "inactive"}, doctor.FAULT, f"systemctl unmask {SOCKET}"),
        (SOCKET, {"ActiveState": "inactive"}, doctor.FAULT, f"systemctl enable --now {SOCKET}"),
        (SOCKET, {"UnitFileState": "disabled"}, doctor.WARNING, f"systemctl enable {SOCKET}"),
        (SERVICE, {"NeedDaemonReload": "yes"}, doctor.WARNING, "systemctl daemon-reload"),
        (SERVICE, {"LoadState": "not-found"}, doctor.WARNING, "by hand"),
    ],
)
def test_unit_is_judged(unit: str, facts: dict[str, str], level: str, hint: str | None) -> None:
    """A daemon that never comes up is no unit in order, and what is masked says how it is not."""
    found = doctor._unit(unit, GOOD | facts)
    assert found.level == level
    assert found.hint == hint if hint is None else hint in str(found.hint)


def test_missing_groups_are_seen_by_root_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the models' group no unit of a model starts."""

    def nothing(_: str) -> grp.struct_group:
        raise KeyError

    monkeypatch.setattr("grp.getgrnam", nothing)
    monkeypatch.setattr(doctor, "_shown", lambda _: {"LoadState": "loaded"})
    assert [(each.level, each.text) for each in doctor._groups()] == [
        (doctor.WARNING, "there is no group llmstudio-admin"),
        (doctor.FAULT, "there is no group llmstudio-model"),
    ]


def status(*faults: dict[str, Any]) -> dict[str, Any]:
    """Return what the daemon answers, as far as it is looked at."""
    return {"launcher": "systemd", "instances": [{"id": "a", "state": "stopped", "alerts": []}], "faults": list(faults)}


def fault(severity: str, file: str = "/etc/llmstudio/recipes.d/a.yaml") -> dict[str, Any]:
    """Return a fault of a file."""
    return {"severity": severity, "file": file}


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ([], [(doctor.OK, "1 model")]),
        ([fault("warning")], [(doctor.WARNING, "1 model, 1 warning")]),
        ([fault("fault")], [(doctor.FAULT, "1 fault in recipes or settings")]),
        ([fault("fault", "/keys")], [(doctor.OK, "1 model")]),
    ],
)
def test_recipes_are_judged(faults: list[dict[str, Any]], expected: list[tuple[str, str]]) -> None:
    """A model that cannot be read is a warning, and the keys, which have a topic of their own, count once."""
    found = doctor._recipes(status(*faults), {"keys_file": "/keys"})
    assert [(each.level, each.text) for each in found] == expected


@pytest.mark.parametrize(
    ("kind", "level"), [("launcher", doctor.FAULT), ("does_not_fit", doctor.OK), (None, doctor.OK)]
)
def test_launcher_is_asked(kind: str | None, level: str) -> None:
    """One that cannot run is found before the first model needs it; what is wrong with a model is another matter."""

    class Answers(Client):
        def get(self, *parts: str, query: str = "", timeout_s: float | None = None) -> Any:
            assert parts == ("explain", "a")
            if kind is not None:
                raise AnswerError(503, {"detail": "it is not there", "kind": kind})
            return {}

    (found,) = doctor._launcher(Answers("nowhere"), status())
    assert found.level == level
    assert (found.hint is not None) == (level == doctor.FAULT)
