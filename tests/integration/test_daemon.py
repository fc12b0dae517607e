"""The whole daemon with the real embedded engine over real sockets, as apps and administrators use it."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest

from llmstudiod.adapters.key_file import read_keys, write_own_keys
from llmstudiod.core.keys import Key, hash_of, write_keys
from llmstudiod.daemon import keyring
from llmstudiod.daemon.application import Application
from llmstudiod.demo.tiny_gguf import TinyModel, write_tiny_gguf
from llmstudiod.launchers.base import FoundUnit, Unit
from tests.integration.running_daemon import RunningDaemon, running_daemon, wait_until
from tests.model_zoo import ZOO, write

pytestmark = pytest.mark.engine

QUESTION: list[openai.types.chat.ChatCompletionUserMessageParam] = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    """A daemon with one GGUF without a recipe (`tiny`) and one recipe for embeddings (`vectors`)."""
    (tmp_path / "models").mkdir()
    (tmp_path / "recipes.d").mkdir()
    write_tiny_gguf(tmp_path / "models" / "tiny.gguf")
    vectors = tmp_path / "vectors.gguf"
    write_tiny_gguf(vectors, TinyModel(seed=3))
    recipe = {
        "id": "vectors", "model_path": str(vectors), "embedding": True, "pooling": "mean", "threads": 1,
        "max_model_len": 512, "served_model_name": "text-embedding-3-small", "aliases": ["ada"], "name": "Vectors",
    }  # fmt: skip
    (tmp_path / "recipes.d" / "vectors.json").write_text(json.dumps(recipe))
    with running_daemon(tmp_path, wait_comment_interval="100ms") as running:
        yield running


@pytest.fixture
def client(daemon: RunningDaemon) -> Iterator[openai.OpenAI]:
    """The openai package's client, unmodified."""
    with openai.OpenAI(base_url=daemon.base_url, api_key="none", max_retries=0, timeout=30) as made:
        yield made


def test_openai_client_chats_embeds_and_lists(daemon: RunningDaemon, client: openai.OpenAI) -> None:
    """Plain and streaming chat, embeddings and the list of models work, and the models come up by themselves."""
    plain = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=8)
    assert plain.choices[0].message.content
    assert plain.model == "tiny"
    pieces = [
        chunk.choices[0].delta.content
        for chunk in client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=8, stream=True)
        if chunk.choices
    ]
    assert "".join(piece or "" for piece in pieces).strip()
    vectors = client.embeddings.create(model="ada", input=["one", "two"])
    assert len(vectors.data) == 2
    assert len(vectors.data[0].embedding) == 64
    assert [model.id for model in client.models.list()] == ["text-embedding-3-small", "tiny"]
    assert client.models.retrieve("ada").id == "text-embedding-3-small"
    assert daemon.state("tiny") == daemon.state("vectors") == "ready"


def test_openai_client_gets_typed_errors(client: openai.OpenAI) -> None:
    """Our errors have the envelope from which the client makes its own exceptions."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="tinny", messages=QUESTION)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert "did you mean tiny?" in str(caught.value.body)


def test_simultaneous_first_requests_share_one_start(daemon: RunningDaemon, client: openai.OpenAI) -> None:
    """Twelve clients at a cold model are all answered by one process."""

    def ask(number: int) -> str | None:
        text = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=4, seed=number)
        return text.choices[0].message.content

    with ThreadPoolExecutor(12) as threads:
        assert all(threads.map(ask, range(12)))
    assert daemon.log().count("tiny: stopped -> starting") == 1


def test_load_unload_status_list_logs(daemon: RunningDaemon) -> None:
    """An administrator's round, as text and as JSON."""
    assert daemon.ctl("load", "tiny").stdout == "'tiny' is ready\n"
    listing = json.loads(daemon.ctl("list", "--json").stdout)
    assert [(item["id"], item["state"]) for item in listing] == [("tiny", "ready"), ("vectors", "stopped")]
    assert "ready" in daemon.ctl("list").stdout
    status = json.loads(daemon.ctl("--json", "status", "tiny").stdout)
    assert status["slots"] == 4
    assert status["n_ctx"] == 2048
    assert [step["to"] for step in status["story"]] == ["starting", "loading", "ready"]
    assert psutil.pid_exists(status["pid"])
    assert "llama-server" in daemon.ctl("status").stdout
    assert 10 << 20 < status["memory"]["measured"] < status["memory"]["estimated"] * 4
    assert "of RAM" in daemon.ctl("status", "tiny").stdout
    assert "listening on" in daemon.ctl("logs", "tiny").stdout
    assert daemon.ctl("unload", "tiny").stdout == "unloaded: tiny\n"
    assert not psutil.pid_exists(status["pid"])
    assert daemon.state("tiny") == "stopped"
    assert json.loads(daemon.ctl("version", "--json").stdout)["llmstudiod"] == "0.1.0"


def test_explain_shows_what_would_be_run(daemon: RunningDaemon) -> None:
    """The plan is made for a model that does not run, and starts nothing."""
    plan = json.loads(daemon.ctl("explain", "vectors", "--json").stdout)
    argv = plan["argv"]
    assert argv[argv.index("--alias") + 1] == "text-embedding-3-small"
    assert plan["n_ctx_total"] == plan["n_ctx"] * plan["n_parallel"]
    assert plan["estimate"]["host"]["total"] > plan["estimate"]["host"]["kv"] > 0
    told = daemon.ctl("explain", "ada").stdout
    assert "--pooling mean" in told
    assert "KV cache" in told
    assert daemon.state("vectors") == "stopped"


def test_model_that_does_not_fit_is_refused_with_the_sum(daemon: RunningDaemon, client: openai.OpenAI) -> None:
    """Before anything is started; the hint names a context that fits, and with that it does."""
    write(daemon.home / "wide.gguf", ZOO["llama-wide"])
    recipe = {"id": "wide", "model_path": str(daemon.home / "wide.gguf"), "max_model_len": 1 << 24}
    daemon.put_recipe(recipe)
    daemon.reload()
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="wide", messages=QUESTION)
    error = caught.value.body
    assert isinstance(error, dict)
    assert (caught.value.status_code, error["kind"]) == (503, "does_not_fit")
    assert "cannot load 'wide': it needs 1" in error["message"]
    assert "GiB for 16,777,216 tokens" in error["message"]
    assert "of RAM are free" in error["message"]
    length = int(error["hint"].removeprefix("it would fit with max_model_len "))
    assert 256 <= length < 1 << 24
    assert daemon.state("wide") == "stopped"
    loaded = daemon.ctl("load", "wide")
    assert (loaded.returncode, "it would fit with" in loaded.stderr) == (7, True)
    shown = daemon.admin.get("instances", "wide")
    assert (shown["kind"], shown["is_refused"], shown["hint"]) == ("does_not_fit", True, error["hint"])
    assert "it needs 1" in daemon.ctl("status").stdout
    daemon.ctl("reset", "wide")
    assert daemon.admin.get("instances", "wide")["is_refused"] is False


def test_logs_can_be_followed(daemon: RunningDaemon) -> None:
    """`logs -f` shows lines as they are written, and ends with whoever reads it."""
    argv = [sys.executable, "-m", "llmstudiod.ctl.main", "--socket", daemon.admin.socket_path, "logs", "-f", "tiny"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        daemon.ctl("load", "tiny")
        lines = iter(follower.stdout.readline, "")
        assert any("listening on" in line for line in lines)
        follower.terminate()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["status", "nope"], 4, "there is no model 'nope'"),
        (["load", "broken"], 7, "cannot load 'broken'"),
        (["unload"], 2, "expected either a model or --all"),
        (["check", "/nonexistent/recipe.yaml"], 3, "recipe.yaml"),
        (["--socket", "/nonexistent.sock", "list"], 8, "systemctl start llmstudiod"),
        (["frobnicate"], 2, "there is no command 'frobnicate'"),
    ],
)
def test_exit_codes_and_next_steps(daemon: RunningDaemon, words: list[str], code: int, message: str) -> None:
    """Each kind of failure has its exit code, and a sentence that says what to do."""
    daemon.put_recipe({"id": "broken", "model_path": "/nonexistent/model.gguf"})
    daemon.reload()
    done = daemon.ctl(*words)
    assert done.returncode == code, done
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_check_tells_faults_of_files_and_of_what_is_loaded(daemon: RunningDaemon) -> None:
    """A file is checked with or without a daemon; without a file everything that is loaded is."""
    bad = daemon.put_recipe({"id": "bad", "model_path": "/m.gguf", "max_num_seqs": 0})
    done = daemon.ctl("check", str(bad))
    assert done.returncode == 3
    assert f"{bad}:1: max_num_seqs: " in done.stdout
    daemon.put_recipe({"id": "gone", "model_path": "/nonexistent/model.gguf"})
    daemon.reload()
    done = daemon.ctl("check")
    assert done.returncode == 3
    assert "max_num_seqs" in done.stdout
    assert "/nonexistent/model.gguf" in done.stdout
    assert daemon.ctl("check", str(daemon.home / "recipes.d" / "vectors.json")).returncode == 0


def test_reload_adds_changes_and_removes(daemon: RunningDaemon) -> None:
    """Unchanged models keep their process, a changed one is replaced when idle, a removed one goes."""
    daemon.put_recipe({"id": "other", "model_path": str(daemon.home / "vectors.gguf"), "threads": 1})
    daemon.reload()
    for model in ("tiny", "vectors", "other"):
        daemon.ctl("load", model)
    pid = daemon.admin.get("instances", "tiny")["pid"]
    daemon.put_recipe({"id": "other", "model_path": str(daemon.home / "vectors.gguf"), "max_num_seqs": 2})
    (daemon.home / "recipes.d" / "vectors.json").unlink()
    daemon.reload()
    wait_until(lambda: daemon.state("other") == "stopped")
    assert daemon.ctl("status", "vectors").returncode == 4
    assert daemon.admin.get("instances", "tiny")["pid"] == pid


def test_faulty_reload_keeps_serving(daemon: RunningDaemon, client: openai.OpenAI) -> None:
    """A recipe that breaks is left out and shown as faulty, a broken settings file means defaults; nobody exits."""
    (daemon.home / "recipes.d" / "bad.yaml").write_text("id: [\n")
    daemon.reload()
    assert client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=2).choices
    faults = daemon.admin.get("status")["faults"]
    assert faults[0]["file"].endswith("bad.yaml")
    assert faults[0]["line"]
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="bad", messages=QUESTION)
    assert "bad.yaml:" in str(caught.value.body)


def test_taken_name_or_lost_directory_ends_no_model(daemon: RunningDaemon, client: openai.OpenAI) -> None:
    """A new recipe takes no alias away, and recipes that are moved away for a moment are still those in force."""
    daemon.ctl("load", "vectors")
    pid = daemon.admin.get("instances", "vectors")["pid"]
    daemon.put_recipe({"id": "ada", "model_path": str(daemon.home / "vectors.gguf")})
    daemon.reload()
    assert client.embeddings.create(model="ada", input="one").data
    assert [fault["recipe_id"] for fault in daemon.admin.get("status")["faults"]] == ["ada"]
    (daemon.home / "recipes.d").rename(daemon.home / "away")
    daemon.reload()
    assert client.embeddings.create(model="ada", input="one").data
    assert "stays in force" in daemon.admin.get("instances", "vectors")["warnings"][0]
    (daemon.home / "away").rename(daemon.home / "recipes.d")
    (daemon.home / "recipes.d" / "ada.json").unlink()
    wait_until(lambda: daemon.admin.get("status")["faults"] == [])  # it is noticed
    assert daemon.admin.get("instances", "vectors")["pid"] == pid


async def test_what_changes_while_the_daemon_starts_is_noticed(tmp_path: Path) -> None:
    """A recipe, and a GGUF: written after all was read, and before anybody looked for changes."""
    for name in ("models", "recipes.d"):
        (tmp_path / name).mkdir()
    config = tmp_path / "llmstudiod.yaml"
    settings = {"recipes_dir": str(tmp_path / "recipes.d"), "model_dirs": [str(tmp_path / "models")]}
    config.write_text(json.dumps(settings | {"launcher": "subprocess", "runtime_dir": str(tmp_path)}))
    app = Application(config, {}, clock=time.monotonic)
    watches = (app.config_watch(), app.model_watch())
    (tmp_path / "recipes.d" / "new.yaml").write_text("model_path: /m.gguf")
    write_tiny_gguf(tmp_path / "models" / "new.gguf")
    async with asyncio.timeout(5):
        for watch in watches:
            await watch.changed(period_s=0.01, settle_s=0.01)
    await app.reload()
    for watch in watches:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await watch.changed(period_s=0.01, settle_s=0.01)


async def test_found_model_is_pinned_before_the_first_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks first may want its place."""
    (tmp_path / "models").mkdir()
    write_tiny_gguf(tmp_path / "models" / "tiny.gguf")
    config = tmp_path / "llmstudiod.yaml"
    settings = {"recipes_dir": str(tmp_path), "model_dirs": [str(tmp_path / "models")], "runtime_dir": str(tmp_path)}
    config.write_text(json.dumps(settings | {"launcher": "subprocess"}))
    app = Application(config, {}, clock=time.monotonic)
    app.state.put("pins", "tiny", {"at": 1.0})

    async def find() -> list[FoundUnit]:
        return [FoundUnit(Unit("tiny", "process", os.getpid(), "run-1"), "hash")]

    async def run_on(_: Unit) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(app.launcher, "find_running", find)
    monkeypatch.setattr(app.launcher, "wait", run_on)
    await app.take_over()
    shown = app.supervisor.view("tiny")
    assert shown is not None
    assert (shown.is_resident, shown.spec.is_pinned) == (True, True)
    await app.supervisor.leave(within_s=0)


async def test_keys_that_a_reload_reads_meanwhile_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that was taken away is not back in force because somebody was still reading the file as it was."""
    (tmp_path / "models").mkdir()
    config, keys = tmp_path / "llmstudiod.yaml", tmp_path / "keys"
    settings = {"keys_file": str(keys), "recipes_dir": str(tmp_path), "model_dirs": [str(tmp_path / "models")]}
    config.write_text(json.dumps(settings | {"launcher": "subprocess", "runtime_dir": str(tmp_path)}))
    write_own_keys(keys, write_keys((Key("lost", hash_of("x")),)))
    app = Application(config, {}, clock=time.monotonic)
    has_read, may_go_on = threading.Event(), threading.Event()

    def slowly(path: Path) -> tuple[Key, ...]:
        found = read_keys(path)
        if not has_read.is_set():
            has_read.set()
            may_go_on.wait(10)
        return found

    monkeypatch.setattr(keyring, "read_keys", slowly)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(app.keyring.reread())
        await asyncio.to_thread(has_read.wait, 10)
        write_own_keys(keys, write_keys(()))
        reload = tasks.create_task(app.reload())
        await asyncio.wait({reload}, timeout=0.5)  # it waits for its turn
        may_go_on.set()
    assert app.access.rules.keys == ()


def test_idle_unload(tmp_path: Path) -> None:
    """A model that nobody uses goes by itself, counted from the end of its last request."""
    (tmp_path / "models").mkdir()
    write_tiny_gguf(tmp_path / "models" / "tiny.gguf")
    with running_daemon(tmp_path, idle_timeout="300ms") as daemon:
        assert daemon.ctl("load", "tiny").returncode == 0
        wait_until(lambda: daemon.state("tiny") == "stopped")
        assert daemon.admin.get("instances", "tiny")["reason"] == "idle unload"


def test_max_instances_takes_turns(tmp_path: Path) -> None:
    """With room for one, two models serve in turn, and nobody is turned away."""
    (tmp_path / "models").mkdir()
    for name in ("a", "b"):
        write_tiny_gguf(tmp_path / "models" / f"{name}.gguf")
    with running_daemon(tmp_path, max_instances=1) as daemon:

        def ask(number: int) -> str:
            with openai.OpenAI(base_url=daemon.base_url, api_key="none", max_retries=0, timeout=60) as client:
                model = "ab"[number % 2]
                return client.chat.completions.create(model=model, messages=QUESTION, max_tokens=2).model

        with ThreadPoolExecutor(6) as threads:
            assert list(threads.map(ask, range(6))) == ["a", "b"] * 3
        assert sum(item["state"] == "ready" for item in daemon.admin.get("status")["instances"]) == 1


def test_crash_is_told_and_the_next_request_starts_anew(daemon: RunningDaemon, client: openai.OpenAI) -> None:
    """A killed model answers its client with the reason, and comes up again for the next one."""
    daemon.ctl("load", "tiny")
    pid = daemon.admin.get("instances", "tiny")["pid"]
    stream = client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=4096, stream=True, logit_bias={"2": -100}
    )
    next(iter(stream))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="killed"):
        for _ in stream:
            pass
    wait_until(lambda: daemon.state("tiny") == "failed")
    assert daemon.admin.get("instances", "tiny")["kind"] == "killed"
    assert daemon.ctl("load", "tiny").returncode == 0
    assert daemon.admin.get("instances", "tiny")["pid"] != pid


def test_sigterm_answers_everybody_and_leaves_nothing(daemon: RunningDaemon) -> None:
    """A polite end stops the models, removes the sockets' directories, and takes a moment only."""
    daemon.ctl("load", "tiny")
    children = psutil.Process(daemon.process.pid).children(recursive=True)
    began = time.monotonic()
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(timeout=20) == 0
    assert time.monotonic() - began < 10
    assert not psutil.wait_procs(children, timeout=5)[1]


def test_sigkill_leaves_no_process_behind(daemon: RunningDaemon) -> None:
    """Even a daemon that had no chance to clean up takes its models with it."""
    daemon.ctl("load", "tiny")
    children = psutil.Process(daemon.process.pid).children(recursive=True)
    assert children
    daemon.process.kill()
    assert not psutil.wait_procs(children, timeout=5)[1]


def test_missing_binary_is_told_with_the_next_step(tmp_path: Path) -> None:
    """A setting that names no file costs every start, and nothing else; the daemon stays and says so."""
    (tmp_path / "models").mkdir()
    write_tiny_gguf(tmp_path / "models" / "tiny.gguf")
    with running_daemon(tmp_path, llama_server="/nonexistent/llama-server") as daemon:
        done = daemon.ctl("load", "tiny")
        assert done.returncode == 7
        assert "/nonexistent/llama-server" in done.stderr
        assert "llama_server" in done.stderr
        assert daemon.ctl("status").returncode == 0


def test_demo_runs_from_nothing_to_a_reply(tmp_path: Path) -> None:
    """`make demo` prints a reply and what happened, and ends cleanly."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "llmstudiod.demo", "--home", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "first word after" in done.stdout
    assert "ready: /health answers 200" in done.stdout
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_demo_that_is_ended_takes_its_daemon_with_it(tmp_path: Path, number: signal.Signals) -> None:
    """A closed terminal, Ctrl-C or a kill: nothing goes on serving, and no port stays taken."""
    argv = [sys.executable, "-m", "llmstudiod.demo", "--serve", "--home", str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as demo:
        children = wait_until(lambda: psutil.Process(demo.pid).children(recursive=True))
        wait_until(lambda: (tmp_path / "llmstudiod.yaml").exists())
        time.sleep(1)  # it is serving, or nearly: either way it must end
        demo.send_signal(number)
        demo.wait(timeout=20)
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_check_looks_at_what_a_recipe_names(tmp_path: Path) -> None:
    """A file that reads well is of no use without its model or with an unknown flag; settings are files too."""
    write_tiny_gguf(tmp_path / "tiny.gguf")
    files = {
        "good.yaml": f"model_path: {tmp_path}/tiny.gguf\n",
        "missing.yaml": "model_path: /nonexistent/model.gguf\n",
        "flag.yaml": f"model_path: {tmp_path}/tiny.gguf\nextra_args: {{frobnicate: 1}}\n",
        "llmstudiod.yaml": "idle_timeout: soon\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    argv = [sys.executable, "-m", "llmstudiod.ctl.main", "check", "--json", *(str(tmp_path / name) for name in files)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    found = {Path(fault["file"]).name: fault["message"] for fault in json.loads(done.stdout)}
    assert done.returncode == 3
    assert set(found) == {"missing.yaml", "flag.yaml", "llmstudiod.yaml"}
    assert "/nonexistent/model.gguf" in found["missing.yaml"]
    assert "frobnicate" in found["flag.yaml"]
