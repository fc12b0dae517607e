"""From recipe to launch: files found and checked, the parser asked, with a small program for llama-server."""

import dataclasses
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llmstudiod.adapters.learning import Learning
from llmstudiod.adapters.memory_meter import total_ram_bytes
from llmstudiod.adapters.planner import Planner
from llmstudiod.adapters.program import LocalProgram
from llmstudiod.adapters.state_db import StateDb
from llmstudiod.core.errors import BinaryError, LoadFailedError
from llmstudiod.core.launch import Decisions, LaunchRequest, decided
from llmstudiod.core.launcher_protocol import Verb
from llmstudiod.core.needs import default_cache_ram_mib
from llmstudiod.core.placement import Placement, Room, needs, place
from llmstudiod.core.recipe import Limits, LoraAdapter, Recipe, RecipeEntry
from llmstudiod.core.settings import Settings
from llmstudiod.demo.tiny_gguf import Fault, TinyModel, write_tiny_gguf
from llmstudiod.launchers.base import Exit, FoundUnit, Unit
from llmstudiod.launchers.privileged import launch
from tests.gguf_files import write_shards
from tests.unit.fake_server import GOOD, calls, write_program


class NoLauncher:
    """A launcher that starts nothing: a planner only asks where the socket is and whether there is a sandbox."""

    name = "none"
    outlives_us = False

    def __init__(self, runtime_dir: str = "/run/test", *, is_sandboxed: bool = False) -> None:
        self._runtime_dir = runtime_dir
        self.is_sandboxed = is_sandboxed

    def socket_path(self, model_id: str) -> str:
        """Return a path in the runtime directory."""
        return f"{self._runtime_dir}/{model_id}.sock"

    async def show(self, request: LaunchRequest) -> list[str] | None:
        """Have no units."""
        raise NotImplementedError

    async def start(self, request: LaunchRequest) -> Unit:
        """Never called."""
        raise AssertionError(request)

    async def wait(self, unit: Unit) -> Exit:
        """Never called."""
        raise AssertionError(unit)

    async def stop(self, model_id: str, *, is_forced: bool) -> None:
        """Never called."""
        raise AssertionError(model_id, is_forced)

    async def lines(self, model_id: str, *, limit: int) -> list[str]:
        """Return nothing."""
        return []

    async def first_lines(self, unit: Unit, *, limit: int) -> list[str]:
        """Return nothing."""
        return []

    def told(self, unit: Unit) -> list[str]:
        """Never asked here."""
        raise NotImplementedError

    def n_told(self, unit: Unit) -> int:
        """Never asked here."""
        raise NotImplementedError

    async def find_failed(self) -> list[tuple[str, Exit]]:
        """Never asked here."""
        raise NotImplementedError

    async def follow(self, model_id: str, *, limit: int) -> AsyncIterator[str]:
        """Yield nothing."""
        for line in await self.lines(model_id, limit=0):
            yield line

    async def memory(self, unit: Unit) -> int | None:
        """Never called."""
        raise AssertionError(unit)

    async def find_running(self) -> list[FoundUnit]:
        """Return nothing."""
        return []

    async def close(self) -> None:
        """Hold nothing."""


def new_planner(settings: Settings, launcher: NoLauncher | None = None) -> Planner:
    """Return a planner that asks the program itself."""
    return Planner(settings, launcher or NoLauncher(), LocalProgram(settings, {}))


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A llama-server that behaves."""
    return write_program(tmp_path / "llama-server")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A model directory with one small model, ``tiny.gguf``."""
    directory = tmp_path / "models"
    directory.mkdir()
    write_tiny_gguf(directory / "tiny.gguf", TinyModel(n_layers=1))
    return directory


@pytest.fixture
def planner(program: Path, models: Path) -> Planner:
    """A planner with that program and that directory."""
    return new_planner(Settings(llama_server=str(program), model_dirs=(str(models),)))


def entry(path: Path | str, **fields: object) -> RecipeEntry:
    """Return a recipe for a model, from line 3 of a file."""
    recipe = dataclasses.replace(Recipe(id="m", model_path=str(path)), **fields)  # type: ignore[arg-type]
    return RecipeEntry(recipe, "/etc/r.yaml", 3)


def set_mode(path: Path, mode: int) -> None:
    """Change who may do what with a file."""
    path.chmod(mode)


def remove(path: Path) -> None:
    """Remove a file."""
    path.unlink()


async def refusal(planner: Planner, wanted: RecipeEntry) -> LoadFailedError:
    """Return why there is no plan."""
    with pytest.raises(LoadFailedError) as caught:
        await planner.plan(wanted)
    assert caught.value.message.startswith("cannot load 'm': ")
    assert caught.value.hint
    return caught.value


async def test_plan_has_everything_that_is_started(planner: Planner, program: Path, models: Path) -> None:
    """The request names recipe, command, socket, files and limits; the model's own context is known."""
    wanted = entry(models / "tiny.gguf", limits=Limits(memory_max=1 << 30, nice=5))
    plan = await planner.plan(wanted)
    path = str(models / "tiny.gguf")
    assert plan.request.argv[:6] == (str(program), "-m", path, "--alias", "m", "--host")
    assert (plan.request.model_id, plan.request.recipe_file, plan.alias) == ("m", "/etc/r.yaml", "m")
    assert plan.request.socket_path == "/run/test/m.sock"
    assert [file.host for file in plan.request.files] == [path]
    assert plan.request.limits == {"MemoryMax": str(1 << 30), "Nice": "5", "MemorySwapMax": "0"}
    assert plan.command.context.n_ctx == 2048
    assert (plan.request.model_path, plan.request.n_ctx_train) == (path, 2048)


async def test_memory_is_limited_where_the_recipe_does_not(planner: Planner, models: Path) -> None:
    """By what the model needs; the launcher is told the number, and has the last word where the recipe sets one."""
    path = models / "tiny.gguf"
    plan = await planner.plan(entry(path))
    assert plan.estimate is not None
    limit = int(plan.request.limits["MemoryMax"])
    least = path.stat().st_size + plan.estimate.kv + plan.estimate.prompt_cache
    assert least < limit < 2 * (least + (1 << 30))
    assert plan.request.limits["MemorySwapMax"] == "0"
    assert launch(Verb.START, plan.request).memory_max == limit
    small = await planner.plan(entry(path, max_model_len=256, max_num_seqs=1, cache_ram=0))
    assert int(small.request.limits["MemoryMax"]) < limit
    beside = await planner.plan(entry(path, max_model_len=256, max_num_seqs=1, cache_ram=0, draft_model=str(path)))
    assert int(beside.request.limits["MemoryMax"]) > int(small.request.limits["MemoryMax"])


def program_that_knows(tmp_path: Path, *flags: str) -> str:
    """A llama-server with these flags more, and without a GPU."""
    words = " ".join(("-m", *flags))
    return str(write_program(tmp_path / "other-server", f'echo "version: 1"; echo \'opts="{words}"\''))


async def test_wish_is_what_a_model_on_the_cpu_needs(tmp_path: Path, models: Path) -> None:
    """Its shape and how it will run; with a GPU that llama-server may use, its place is llama-server's to find."""
    settings = Settings(llama_server=program_that_knows(tmp_path), model_dirs=(str(models),))
    plan = await new_planner(settings).plan(entry(models / "tiny.gguf", n_ubatch=64))
    assert plan.wish is not None
    assert (plan.wish.model, plan.wish.gpus, plan.wish.is_context_open) == ("m", (), True)
    assert (plan.wish.run.n_ctx, plan.wish.run.n_seq, plan.wish.run.n_ubatch) == (8192, 4, 64)
    fixed = await new_planner(settings).plan(entry(models / "tiny.gguf", max_model_len=512))
    assert fixed.wish is not None
    assert not fixed.wish.is_context_open


async def test_gpu_is_not_planned_yet(planner: Planner, models: Path) -> None:
    """The program of this test has one; a recipe that wants none of it is placed in RAM."""
    assert (await planner.plan(entry(models / "tiny.gguf"))).wish is None
    assert (await planner.plan(entry(models / "tiny.gguf", gpus="none"))).wish is not None


async def test_reduced_context_is_used(tmp_path: Path, models: Path) -> None:
    """Where the recipe left it open; the launcher is told the same number."""
    settings = Settings(llama_server=program_that_knows(tmp_path), model_dirs=(str(models),))
    planner = new_planner(settings)
    wanted = entry(models / "tiny.gguf")
    wish = (await planner.plan(wanted)).wish
    assert wish is not None
    run = dataclasses.replace(wish.run, n_ctx=4 * 512)
    placement = Placement((), run, needs(wish, run), is_reduced=True)
    plan = await planner.plan(wanted, placement)
    assert plan.command.context.n_ctx == 512
    assert launch(Verb.START, plan.request).max_model_len == 512
    whole = await planner.plan(wanted, dataclasses.replace(placement, is_reduced=False))
    assert launch(Verb.START, whole.request).max_model_len is None
    own = await planner.plan(entry(models / "tiny.gguf", max_model_len=1024), placement)
    assert own.command.context.n_ctx == 1024


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, str(default_cache_ram_mib(total_ram_bytes()))), ({"cache_ram": 7}, "7"), ({"embedding": True}, "0")],
)
async def test_prompt_cache_is_a_part_of_the_ram(
    tmp_path: Path, models: Path, fields: dict[str, object], expected: str
) -> None:
    """llama-server's own 8 GiB for each model would leave no room for a second one; a recipe's number stays."""
    settings = Settings(llama_server=program_that_knows(tmp_path, "--cache-ram"), model_dirs=(str(models),))
    plan = await new_planner(settings).plan(entry(models / "tiny.gguf", **fields))
    assert plan.request.argv[plan.request.argv.index("--cache-ram") + 1] == expected
    told = launch(Verb.START, plan.request).cache_ram
    assert decided(Recipe(id="m", model_path="/m"), Decisions(cache_ram=told)).cache_ram == told


async def test_relative_path_is_looked_up_in_the_model_directories(program: Path, models: Path, tmp_path: Path) -> None:
    """The first directory that has it wins; a file that is nowhere is told with the places."""
    settings = Settings(llama_server=str(program), model_dirs=(str(tmp_path / "no"), str(models)))
    planner = new_planner(settings)
    assert str(models / "tiny.gguf") in (await planner.plan(entry("tiny.gguf"))).request.argv
    error = await refusal(planner, entry("no.gguf"))
    places = f"{tmp_path / 'no'}, {models}"
    assert error.message == f"cannot load 'm': model_path: there is no 'no.gguf' in the model directories ({places})"
    assert error.details["failure"] == "model_not_found"
    assert "~ is not expanded" in str((await refusal(planner, entry("~/no.gguf"))).hint)


async def test_directory_with_one_model_is_that_model(planner: Planner, models: Path) -> None:
    """A directory stands for its one model; with two it is refused with their names."""
    assert str(models / "tiny.gguf") in (await planner.plan(entry(models))).request.argv
    write_tiny_gguf(models / "b.gguf", TinyModel(n_layers=1))
    error = await refusal(planner, entry(models))
    assert "holds 2 models, expected one: 'b.gguf', 'tiny.gguf'" in error.message


async def test_shards_are_all_bound(planner: Planner, models: Path) -> None:
    """Every part of a split model belongs to its files; the command names the first."""
    shards = [str(path) for path in write_shards(models / "set")]
    plan = await planner.plan(entry(models / "set"))
    assert [file.host for file in plan.request.files] == shards
    assert plan.request.argv[2] == shards[0]


async def test_missing_model_names_recipe_and_path(planner: Planner, tmp_path: Path) -> None:
    """What is missing, which field names it, and where that stands."""
    error = await refusal(planner, entry(tmp_path / "no.gguf"))
    assert error.message == f"cannot load 'm': model_path: '{tmp_path / 'no.gguf'}' does not exist"
    assert "check the path, or download the model (the recipe in /etc/r.yaml:3)" in str(error.hint)
    assert error.details["failure"] == "model_not_found"


async def test_truncated_model_is_refused_before_a_start(planner: Planner, models: Path, program: Path) -> None:
    """A broken download costs nobody a start, and the binary is not even asked."""
    write_tiny_gguf(models / "cut.gguf", TinyModel(n_layers=1, fault=Fault.TRUNCATED))
    error = await refusal(planner, entry(models / "cut.gguf"))
    assert "the download is incomplete, 64 B are missing" in error.message
    assert error.details["failure"] == "bad_model_file"
    assert "download it again" in str(error.hint)
    assert calls(program) == []


@pytest.mark.parametrize("fault", [Fault.MISSING_KEY, Fault.MISSING_TENSOR, Fault.UNKNOWN_ARCHITECTURE])
async def test_fault_that_only_llama_cpp_can_judge_is_left_to_it(planner: Planner, models: Path, fault: Fault) -> None:
    """A whole GGUF goes to llama-server, whatever is in it."""
    write_tiny_gguf(models / "odd.gguf", TinyModel(n_layers=1, fault=fault))
    plan = await planner.plan(entry(models / "odd.gguf"))
    assert str(models / "odd.gguf") in plan.request.argv


@pytest.mark.parametrize("field", ["mmproj", "draft_model", "chat_template_file", "lora"])
@pytest.mark.parametrize(("name", "words"), [("no", "does not exist"), ("models", "is not a regular file")])
async def test_other_files_are_checked_and_named(
    field: str, name: str, words: str, planner: Planner, models: Path, tmp_path: Path
) -> None:
    """The message says which of the recipe's files it is."""
    path = str(tmp_path / name)
    value = (LoraAdapter(path),) if field == "lora" else path
    error = await refusal(planner, entry(models / "tiny.gguf", **{field: value}))
    assert error.message == f"cannot load 'm': {field}: '{path}' {words}"


async def test_sandbox_needs_files_that_everybody_may_read(program: Path, models: Path) -> None:
    """The unit's user is nobody's acquaintance; outside a sandbox the daemon's own rights count."""
    settings = Settings(llama_server=str(program), model_dirs=(str(models),))
    path = models / "tiny.gguf"
    path.chmod(0o640)
    sandboxed = new_planner(settings, NoLauncher(is_sandboxed=True))
    error = await refusal(sandboxed, entry(path))
    assert f"'{path}' has mode 0640: the model's own user may not read it" in error.message
    assert error.hint == f"chmod o+r {path}"
    assert error.details["failure"] == "permission"
    plan = await new_planner(settings).plan(entry(path))
    assert plan.request.argv[2] == str(path)
    path.chmod(0o644)
    plan = await sandboxed.plan(entry(path))
    assert plan.request.argv[2] == "/run/llmstudio-model/0/tiny.gguf"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
async def test_file_behind_a_closed_directory_is_a_permission_fault(planner: Planner, models: Path) -> None:
    """A directory that the daemon may not search is not a missing file."""
    set_mode(models, 0)
    try:
        for wanted in (entry(models / "tiny.gguf"), entry("tiny.gguf")):
            assert (await refusal(planner, wanted)).details["failure"] == "permission"
    finally:
        set_mode(models, 0o755)


async def test_refused_command_line_carries_the_complaint(planner: Planner, models: Path) -> None:
    """What the parser says, whose recipe it is, and what to look at."""
    error = await refusal(planner, entry(models / "tiny.gguf", chat_template="--bad"))
    assert error.message == ("cannot load 'm': llama-server refuses its command line: error: invalid argument: --bad")
    assert "the recipe in /etc/r.yaml:3" in str(error.hint)
    assert error.details["failure"] == "bad_args"


async def test_unknown_flag_is_refused_before_the_parser_is_asked(
    planner: Planner, models: Path, program: Path
) -> None:
    """The installed build does not list it."""
    error = await refusal(planner, entry(models / "tiny.gguf", extra_args={"flag_of_tomorrow": 1}))
    assert "does not accept --flag-of-tomorrow" in error.message
    assert "the recipe in /etc/r.yaml:3" in str(error.hint)
    assert error.details["failure"] == "bad_args"
    assert len(calls(program)) == 4, "only the probe"


async def test_good_command_line_is_checked_once(planner: Planner, models: Path, program: Path) -> None:
    """A model that starts often is not checked every time; another command line is."""
    for _ in range(3):
        await planner.plan(entry(models / "tiny.gguf"))
    assert len(calls(program)) == 4 + 1
    await planner.plan(entry(models / "tiny.gguf", n_batch=64))
    assert len(calls(program)) == 4 + 2
    for _ in range(2):
        await refusal(planner, entry(models / "tiny.gguf", chat_template="--bad"))
    assert len(calls(program)) == 4 + 4, "a refusal is not remembered: files may have changed"


async def test_changed_binary_is_asked_again(planner: Planner, models: Path, program: Path) -> None:
    """An upgrade on disk counts at the next start, for the probe and for the command lines."""
    assert (await planner.plan(entry(models / "tiny.gguf"))).binary.version == "11669 (abc)"
    write_program(program, GOOD.replace("11669", "12000"))
    assert (await planner.plan(entry(models / "tiny.gguf"))).binary.version == "12000 (abc)"
    assert len(calls(program)) == 2 * 5


async def test_other_binary_of_a_reload_is_used(planner: Planner, tmp_path: Path) -> None:
    """The setting may name another binary after a reload."""
    await planner.binary()
    other = write_program(tmp_path / "other", GOOD.replace("11669", "9"))
    planner.use_settings(Settings(llama_server=str(other)))
    assert (await planner.binary()).argv == (str(other),)


async def test_binary_that_vanished_is_a_binary_fault(planner: Planner, models: Path, program: Path) -> None:
    """The model is not to blame."""
    remove(program)
    with pytest.raises(BinaryError, match="llama_server: expected a program, found no file"):
        await planner.plan(entry(models / "tiny.gguf"))


async def test_long_socket_path_is_refused(program: Path, models: Path) -> None:
    """bind(2) would refuse it, and llama-server would not say why."""
    planner = new_planner(Settings(llama_server=str(program)), NoLauncher("/run/" + "x" * 110))
    error = await refusal(planner, entry(models / "tiny.gguf"))
    assert "a Unix socket holds 107" in error.message


BREAKDOWN = '{"type":"fit_memory_breakdown","data":{"unit":"MiB","rows":[{"name":"Host","context":7,"compute":900}]}}'
ERROR = '{"type":"log","level":"error","msg":"llama_model_load: error loading model: %s\\\\n"}'


def dry_program(*lines: str, then: str = "sleep 60") -> str:
    """A llama-server that prints these lines in a dry run."""
    printed = "; ".join(f"echo '{line}'" for line in lines)
    return f"""
        case "$*" in
            *"--log-jsonl"*) {printed}; {then} ;;
            "--completion-bash") echo 'opts="-m -fit --log-jsonl"' ;;
            *) echo "version: 1" ;;
        esac
    """


DRY = dry_program("warming up", '{"type":"log","level":"info","msg":"load\\\\n"}', BREAKDOWN)


def dry_planner(tmp_path: Path, models: Path, body: str = DRY, state: StateDb | None = None) -> Planner:
    """A planner of a program that can tell what memory it would take."""
    settings = Settings(llama_server=str(write_program(tmp_path / "dry-server", body)), model_dirs=(str(models),))
    return Planner(settings, NoLauncher(), LocalProgram(settings, {}), learning=Learning(state or StateDb(None), None))


def dry_runs(tmp_path: Path) -> list[str]:
    """The command lines of the dry runs."""
    return [line for line in calls(tmp_path / "dry-server") if "--log-jsonl" in line]


async def test_llama_server_tells_its_need_before_it_takes_it(tmp_path: Path, models: Path) -> None:
    """Once for a file, settings and build; it is the very command line, and is ended when it has told."""
    path = tmp_path / "state.db"
    wanted = entry(models / "tiny.gguf", max_model_len=512, threads=2)
    planner = dry_planner(tmp_path, models, state=StateDb(path))
    estimated, is_proven = await planner.vet(wanted, is_thorough=False)
    assert estimated is not None
    assert (is_proven, estimated.correction.source, dry_runs(tmp_path)) == (False, "", [])
    wish, is_proven = await planner.vet(wanted, is_thorough=True)
    assert wish is not None
    assert is_proven
    assert needs(wish, wish.run).host.compute > 900 << 20 > needs(estimated, estimated.run).host.compute
    (line,) = dry_runs(tmp_path)
    assert "-c 2048 -np 4" in line
    assert "-fit on" in line
    for _ in range(2):
        again, is_proven = await planner.vet(wanted, is_thorough=False)
        assert (again, is_proven) == (wish, True)
    later = dry_planner(tmp_path, models, state=StateDb(path))
    assert await later.vet(wanted, is_thorough=True) == (wish, True)
    assert len(dry_runs(tmp_path)) == 1
    renamed = dataclasses.replace(wanted, recipe=dataclasses.replace(wanted.recipe, pinned=True, name="x"))
    assert (await later.vet(renamed, is_thorough=False))[1]
    for changed in ({"max_model_len": 256}, {"cache_type_k": "q8_0"}):
        other = dataclasses.replace(wanted, recipe=dataclasses.replace(wanted.recipe, **changed))
        assert not (await later.vet(other, is_thorough=False))[1]
    os.utime(models / "tiny.gguf", ns=(1, 1))
    assert not (await later.vet(wanted, is_thorough=False))[1]


async def test_program_that_cannot_tell_is_not_asked(planner: Planner, models: Path) -> None:
    """The estimate counts."""
    wanted = entry(models / "tiny.gguf", gpus="none")
    wish, is_proven = await planner.vet(wanted, is_thorough=False)
    assert wish is not None
    assert is_proven


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("unknown model architecture: 'llamazz'", "unsupported_arch"),
        ("tensor 'x' data is not within", "bad_model_file"),
    ],
)
async def test_model_that_cannot_be_loaded_costs_nobody_a_place(
    tmp_path: Path, models: Path, said: str, kind: str
) -> None:
    """The dry run says why."""
    planner = dry_planner(tmp_path, models, dry_program(ERROR % said.replace("'", r"\\u0027"), then="exit 1"))
    with pytest.raises(LoadFailedError) as caught:
        await planner.vet(entry(models / "tiny.gguf"), is_thorough=True)
    assert caught.value.details["failure"] == kind
    assert said in caught.value.message


@pytest.mark.parametrize(
    "body",
    [dry_program("killed", then="exit 137"), dry_program(ERROR % "mmap failed: Cannot allocate memory", then="exit 1")],
)
async def test_dry_run_that_says_nothing_for_sure_changes_nothing(tmp_path: Path, models: Path, body: str) -> None:
    """It may go better the next time, so the estimate counts."""
    planner = dry_planner(tmp_path, models, body)
    wish, is_proven = await planner.vet(entry(models / "tiny.gguf"), is_thorough=True)
    assert wish is not None
    assert (is_proven, wish.correction.source) == (True, "")


async def test_last_run_counts_instead_of_the_estimate(tmp_path: Path, models: Path) -> None:
    """What its log said; a run in which nothing can be read teaches nothing."""
    planner = dry_planner(tmp_path, models)
    wanted = entry(models / "tiny.gguf", max_model_len=512)
    wish = (await planner.plan(wanted)).wish
    assert wish is not None
    placement = place(wish, Room(8 << 30))
    assert placement is not None
    plan = await planner.plan(wanted, placement)
    planner.learn(plan, ["nothing"], os.getpid())
    assert not (await planner.vet(wanted, is_thorough=False))[1]
    planner.learn(plan, ["sched_reserve:  CPU compute buffer size =   700.00 MiB"], 1 << 30)
    learned, is_proven = await planner.vet(wanted, is_thorough=False)
    assert learned is not None
    assert (is_proven, learned.correction.is_of_a_run) == (True, True)
    assert needs(learned, learned.run).host.compute == pytest.approx(700 << 20, rel=0.01)
    before, after = (int(each.request.limits["MemoryMax"]) for each in (plan, await planner.plan(wanted)))
    assert after > before + (700 << 20)
