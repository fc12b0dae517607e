"""However a llama-server ends, whoever waits is told why within a second, and so is the administrator."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

# Relative: without tests/__init__.py the absolute name differs between pytest and python -m.
from .daemon import MODELS, Daemon, unit_of, wait_until  # noqa: TID252
from .failures import ENDLESS, FAILURES, Failing  # noqa: TID252
from .host import Host  # noqa: TID252

WITHIN_S = 1.0
# MESSAGE_IDs of PID 1: a unit's process exited; a unit ended without a fault. Source: systemd's sd-messages.h.
EXITED, ENDED = "98e322203f7a4ed290d09fe03c09fe15", "7ad2d189f7e94e70a38c781354912448"
QUIET = {"program", "system-call"}  # they end before llama-server has said a word
RECIPE = {"threads": 1, "max_model_len": 256, "max_num_seqs": 1}


@pytest.fixture(scope="module")
def failing(installed_host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """The daemon with a model for each failure, and a good one that answers all the while."""
    daemon = Daemon(installed_host)
    host, path = daemon.host, tmp_path_factory.mktemp("failing") / "model.gguf"
    daemon.use_settings(max_instances=0, auto_recipes=False, restart_limit=0)
    host.write(f"{MODELS}/bad.jinja", "{% if }")
    host.run("mkfifo", "--mode=0644", ENDLESS)
    for name, failure in {"tiny": Failing("", ""), **FAILURES}.items():
        failure.write(path)
        host.put(path, f"{MODELS}/{name}.gguf")
        daemon.put_recipe({"id": name, "model_path": f"{MODELS}/{name}.gguf"} | RECIPE | failure.fields)
        if failure.unit:
            drop_in = "[Service]\n" + failure.unit.replace("%%", name) + "\n"
            host.write(f"{_drop_ins(name)}/failure.conf", drop_in)
    daemon.listen()
    daemon.chat()
    yield daemon
    daemon.reset()
    host.run("rm", "-rf", MODELS, ENDLESS, *map(_drop_ins, FAILURES))


def _drop_ins(model: str) -> str:
    return f"/etc/systemd/system/{unit_of(model)}.d"


def exit_of(daemon: Daemon, model: str) -> float:
    """Return when the unit's process was gone, by systemd's own word, in seconds since 1970."""
    daemon.host.run("journalctl", "--sync")
    words = ("--quiet", "--output=json", f"UNIT={unit_of(model)}", f"MESSAGE_ID={EXITED}", f"MESSAGE_ID={ENDED}")
    lines = daemon.host.run("journalctl", *words).stdout.splitlines()
    return int(json.loads(lines[-1])["_SOURCE_REALTIME_TIMESTAMP"]) / 1e6


def hit(daemon: Daemon, model: str, failure: Failing) -> None:
    """Send the signal when the time has come."""
    if failure.loading:
        words = ("journalctl", "--quiet", f"--unit={unit_of(model)}", "--grep=loading model")
        wait_until(lambda: daemon.host.run(*words, check=False).stdout)
    else:
        wait_until(lambda: daemon.status(model)["in_flight"])
    daemon.systemctl("kill", f"--signal={failure.signal}", "--kill-whom=main", unit_of(model), check=False)


@pytest.mark.parametrize("model", FAILURES)
def test_failure_is_told_to_whoever_waits(failing: Daemon, model: str) -> None:
    """The error names the cause within a second of the exit; status tells the same, with the lines of this run."""
    failure = FAILURES[model]
    pid = failing.pid(unit_of("tiny"))
    if failure.signal and not failure.loading:
        failing.ctl("load", model)
    if failure.signal:
        threading.Thread(target=hit, args=(failing, model, failure), daemon=True).start()
    with pytest.raises(openai.APIStatusError) as caught:
        failing.chat(model, max_tokens=4000)
    told_at = time.time()
    error: dict[str, Any] = caught.value.body  # type: ignore[assignment]
    is_mute = failure.may_be_mute and failure.says not in failing.host.journal(unit_of(model))
    assert (error["failure"], failure.says in error["message"]) == (failure.kind, not is_mute), error
    assert error["kind"] == ("upstream_crashed" if failure.signal and not failure.loading else "load_failed")
    assert error["hint"]
    lines = error.get("lines", [])
    assert lines or model in QUIET, error
    shown = failing.status(model)
    assert (shown["state"], shown["kind"]) == ("failed", failure.kind)
    assert shown["hint"] == error["hint"]
    assert shown["last_lines"][-len(lines) :] == lines
    assert (failing.pid(unit_of("tiny")), bool(failing.chat())) == (pid, True)
    if model != "architecture":  # that one was refused by a dry run, before there was a unit
        assert told_at - exit_of(failing, model) < WITHIN_S
