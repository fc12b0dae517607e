"""The llama.cpp command line: each trap of its flags, and the recipe that the issue gives as its example."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmstudiod.adapters.recipe_files import load_recipe_file
from llmstudiod.core.command import (
    DEFAULT_CONTEXT,
    DEFAULT_SLOTS,
    MAX_TOTAL_CONTEXT,
    SUN_PATH_BYTES,
    Command,
    ModelFiles,
    ServerBinary,
    bind_files,
    build_command,
    plan_context,
)
from llmstudiod.core.errors import LoadFailedError
from llmstudiod.core.flags import parse_help_flags
from llmstudiod.core.recipe import MAX_CONTEXT, LoraAdapter, Recipe

HELP = Path(__file__).parents[1] / "data" / "llama-server-0.7.0-help.txt"
KNOWN = parse_help_flags(HELP.read_text())
SOCKET = "/run/llmstudio-models/m/upstream.sock"
GPU = ServerBinary(("/usr/bin/llama-server",), "the test", known_flags=KNOWN, devices=("CUDA0", "CUDA1"))
CPU = ServerBinary(("/usr/bin/llama-server",), "the test", known_flags=KNOWN)

ISSUE_EXAMPLE = """{"id":"llama3-8b-q4","name":"Llama 3 8B Q4_K_M",
"model_path":"/models/Meta-Llama-3-8B-Instruct-Q4_K_M.gguf","backend":"llamacpp","max_model_len":8192,
"max_num_seqs":4,"extra_args":{"n_gpu_layers":99,"flash_attn":true}}"""


def recipe(**fields: Any) -> Recipe:
    """Return a recipe of these fields."""
    return Recipe(**({"id": "m", "model_path": "/models/m.gguf"} | fields))


def command(binary: ServerBinary = GPU, files: ModelFiles | None = None, **fields: Any) -> Command:
    """Return the command for a recipe of these fields."""
    one = recipe(**fields)
    return build_command(one, files or ModelFiles((one.model_path,)), binary, socket_path=SOCKET, is_sandboxed=False)


def options(built: Command) -> Mapping[str, str | None]:
    """Return the flags of a command with their values; that none stands twice is checked on the way."""
    found: dict[str, str | None] = {}
    name = ""
    for word in built.argv[1:]:
        if word.startswith("-") and not word[1:2].isdigit():
            assert word not in found, f"{word} stands twice, and the last one would win: {built.argv}"
            found[name := word] = None
        else:
            assert found[name] is None, f"{word} belongs to no flag"
            found[name] = word
    return found


# The example of the issue


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_example_of_the_issue(tmp_path: Path, suffix: str) -> None:
    """The recipe as it stands in the issue is read without a word, and means this command line."""
    path = tmp_path / f"example{suffix}"
    path.write_text(ISSUE_EXAMPLE)
    loaded = load_recipe_file(path)
    assert loaded.faults == ()
    (entry,) = loaded.entries
    assert entry.warnings == ()
    assert entry.recipe.name == "Llama 3 8B Q4_K_M"
    files = ModelFiles((entry.recipe.model_path,), n_ctx_train=8192)
    built = build_command(entry.recipe, files, GPU, socket_path=SOCKET, is_sandboxed=False)
    assert options(built) == {
        "-m": "/models/Meta-Llama-3-8B-Instruct-Q4_K_M.gguf",
        "--alias": "llama3-8b-q4",
        "--host": SOCKET,
        "-lv": "4",
        "--threads-http": "16",
        "--no-ui": None,
        "--offline": None,
        "--metrics": None,
        "-c": "32768",  # 8192 for each of the four slots
        "-np": "4",
        "-ngl": "99",
        "-fit": "off",
        "--flash-attn": "on",
        "--cache-ram": "8192",
    }
    assert built.notes == ()
    assert built.environment == {"LC_ALL": "C.UTF-8"}


# Values that flags need


@pytest.mark.parametrize(("given_value", "word"), [(True, "on"), (False, "off")])
def test_flash_attn_has_a_value(given_value: bool, word: str) -> None:
    """The flag alone would eat the next argument as its value."""
    assert options(command(flash_attn=given_value))["--flash-attn"] == word
    assert options(command(flash_attn="auto")).keys().isdisjoint({"--flash-attn", "-fa"})


def test_tensor_split_takes_proportions() -> None:
    """Proportions go through as they are: 0 gives a GPU nothing, and is not the number of a GPU."""
    built = options(command(tensor_split=(3.0, 1.0, 0.5)))
    assert built["--tensor-split"] == "3,1,0.5"


def test_one_gpu_is_no_split() -> None:
    """A tensor_parallel_size of 1 keeps the model on one GPU; an explicit split_mode is stronger."""
    assert options(command(tensor_parallel_size=1))["--split-mode"] == "none"
    assert options(command(tensor_parallel_size=1, split_mode="row"))["--split-mode"] == "row"
    assert "--split-mode" not in options(command(tensor_parallel_size=2))


@pytest.mark.parametrize(
    ("fields", "flag", "value"),
    [
        ({"n_gpu_layers": 0}, "-ngl", "0"),
        ({"n_gpu_layers": "all"}, "-ngl", "all"),
        ({"main_gpu": 0}, "--main-gpu", "0"),
        ({"n_batch": 512}, "--batch-size", "512"),
        ({"n_ubatch": 256}, "--ubatch-size", "256"),
        ({"cache_type_k": "q8_0"}, "--cache-type-k", "q8_0"),
        ({"cache_type_v": "f16"}, "--cache-type-v", "f16"),
        ({"threads": 8}, "--threads", "8"),
        ({"load_mode": "none"}, "--load-mode", "none"),
        ({"cache_ram": 0}, "--cache-ram", "0"),
        ({"cache_ram": 512}, "--cache-ram", "512"),
        ({"embedding": True}, "--cache-ram", "0"),
        ({"embedding": True}, "--embedding", None),
        ({"rerank": True}, "--rerank", None),
        ({"pooling": "mean"}, "--pooling", "mean"),
        ({"reasoning_format": "deepseek"}, "--reasoning-format", "deepseek"),
        ({"chat_template": "chatml"}, "--chat-template", "chatml"),
        ({"n_cpu_moe": 3}, "--n-cpu-moe", "3"),
        ({"override_tensor": "exps=CPU"}, "--override-tensor", "exps=CPU"),
        ({"spec_type": "draft-simple"}, "--spec-type", "draft-simple"),
        ({"draft_model": "/m/d.gguf"}, "--spec-type", "draft-simple"),
        ({"draft_model": "/m/d.gguf", "spec_type": "draft-eagle3"}, "--spec-type", "draft-eagle3"),
        ({"spec_draft_n_max": 16}, "--spec-draft-n-max", "16"),
        ({"spec_draft_n_min": 0}, "--spec-draft-n-min", "0"),
        ({"spec_draft_p_min": 0.75}, "--spec-draft-p-min", "0.75"),
        ({"spec_draft_n_gpu_layers": "all"}, "--spec-draft-ngl", "all"),
        ({"kv_unified": True}, "--kv-unified", None),
    ],
)
def test_fields_become_flags(fields: dict[str, Any], flag: str, value: str | None) -> None:
    """Each field is one flag of the recorded build; 0 is a value, not an absence."""
    built = options(command(**fields))
    assert flag in built
    assert built[flag] == value
    assert flag in KNOWN


def test_fields_left_out_leave_no_flag() -> None:
    """Where the recipe says nothing, llama-server decides, except for what the daemon must know."""
    assert options(command()).keys() == {
        "-m", "--alias", "--host", "-lv", "--threads-http", "--no-ui", "--offline", "--metrics", "-c", "-np", "-fit",
        "--cache-ram",
    }  # fmt: skip


# Context


@pytest.mark.parametrize(
    ("fields", "n_ctx", "n_parallel", "total"),
    [
        ({"max_model_len": 8192, "max_num_seqs": 4}, 8192, 4, 32768),
        ({"max_model_len": 128, "max_num_seqs": 256}, 256, 256, 65536),
        ({"max_model_len": 1000, "max_num_seqs": 3}, 1024, 3, 3072),
        ({"max_model_len": 257, "max_num_seqs": 1}, 512, 1, 512),
        ({"max_model_len": 1, "max_num_seqs": 1}, 256, 1, 256),
        ({"max_model_len": 4096, "max_num_seqs": 4, "kv_unified": True}, 4096, 4, 4096),
        ({"max_model_len": 4096}, 4096, DEFAULT_SLOTS, 4096 * DEFAULT_SLOTS),
        ({"max_num_seqs": 2}, DEFAULT_CONTEXT, 2, 2 * DEFAULT_CONTEXT),
    ],
)
def test_context_is_the_total_of_the_slots(fields: dict[str, Any], n_ctx: int, n_parallel: int, total: int) -> None:
    """-c is shared out to the slots, each rounded up to 256 tokens; with one pool it is the pool."""
    context = plan_context(recipe(**fields), None)
    assert (context.n_ctx, context.n_parallel, context.n_ctx_total) == (n_ctx, n_parallel, total)
    built = options(command(**fields))
    assert (built["-c"], built["-np"]) == (str(total), str(n_parallel))


def test_context_left_open_follows_a_small_model() -> None:
    """Without max_model_len a request may use what the model was trained for, up to a bound, and it is told."""
    small = plan_context(recipe(), 2048)
    assert small.n_ctx == 2048
    assert small.notes == ("max_model_len is not set: 2048 tokens for one request (the model: 2048)",)
    assert plan_context(recipe(), 131_072).n_ctx == DEFAULT_CONTEXT
    assert "unknown" in plan_context(recipe(), None).notes[0]


def test_context_over_the_models_is_told() -> None:
    """An explicit length is never changed behind the author's back; that the server caps it is said."""
    context = plan_context(recipe(max_model_len=8192), 4096)
    assert context.n_ctx == 8192
    assert "over the model's 4096 tokens" in context.notes[0]


def test_absurd_context_is_refused() -> None:
    """llama-server hangs or is killed without a line at such values, so it is not started."""
    with pytest.raises(LoadFailedError, match="256 slots of 16777216 tokens are 4294967296 in all, over 67108864"):
        command(max_model_len=MAX_CONTEXT, max_num_seqs=256)
    command(max_model_len=MAX_CONTEXT, max_num_seqs=256, kv_unified=True)


@given(
    st.integers(1, MAX_CONTEXT), st.integers(1, 256), st.booleans(), st.one_of(st.none(), st.integers(1, MAX_CONTEXT))
)
def test_each_slot_holds_what_the_recipe_promises(
    length: int, slots: int, is_unified: bool, trained: int | None
) -> None:
    """Whatever is asked for: a slot holds max_model_len, in steps of 256, and the total stays within its bound."""
    try:
        context = plan_context(recipe(max_model_len=length, max_num_seqs=slots, kv_unified=is_unified), trained)
    except LoadFailedError:
        assert length * slots > MAX_TOTAL_CONTEXT - 256 * slots
        return
    assert length <= context.n_ctx < length + 256
    assert context.n_ctx_total == context.n_ctx * (1 if is_unified else slots)
    assert context.n_ctx_total % 256 == 0
    assert context.n_ctx_total <= MAX_TOTAL_CONTEXT


def test_http_threads_exceed_the_slots() -> None:
    """A burst as large as all slots leaves threads for the health probe."""
    for slots in (1, 4, 256):
        assert int(options(command(max_num_seqs=slots))["--threads-http"] or 0) > 2 * slots


# Devices


def test_gpus_restrict_the_devices_by_the_environment() -> None:
    """One GPU of several: CUDA sees only that one, counted by the bus as nvidia-smi does."""
    environment = command(gpus=("1",)).environment
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    by_name = command(gpus=("GPU-8f6c", "GPU-11aa")).environment
    assert by_name["CUDA_VISIBLE_DEVICES"] == "GPU-8f6c,GPU-11aa"
    assert "CUDA_VISIBLE_DEVICES" not in command().environment


@pytest.mark.parametrize("binary", [GPU, CPU])
def test_no_gpus_is_no_device(binary: ServerBinary) -> None:
    """`gpus: none` hides the GPUs twice, from CUDA and from llama-server."""
    built = command(binary, gpus="none")
    assert built.environment["CUDA_VISIBLE_DEVICES"] == ""
    assert options(built)["--device"] == "none"
    assert options(built)["-fit"] == "off"


@pytest.mark.parametrize(
    ("gpus", "devices", "expected"),
    [
        (("1",), ("CUDA0", "CUDA1"), "CUDA0"),
        (("GPU-8f6c", "GPU-11aa"), ("CUDA0", "CUDA1"), "CUDA0,CUDA1"),
        (None, ("CUDA0",), None),
        (("0",), (), None),
        (("0",), ("Vulkan0",), None),
    ],
)
def test_chosen_gpus_are_required(gpus: Any, devices: tuple[str, ...], expected: str | None) -> None:
    """One that CUDA cannot use is an error then; otherwise the model would run on the CPU without a word."""
    built = command(dataclasses.replace(GPU, devices=devices), gpus=gpus)
    assert options(built).get("--device") == expected


def test_fitting_is_on_only_where_nothing_is_fixed() -> None:
    """llama-server may choose the layers where the recipe leaves them open and there is a GPU; its context is ours."""
    assert options(command())["-fit"] == "on"
    assert options(command(n_gpu_layers=20))["-fit"] == "off"
    assert options(command(CPU))["-fit"] == "off"


# Names, sockets, environment


def test_there_is_one_alias() -> None:
    """The upstream has one name, whatever other names the catalogue knows: it would choose the first of several."""
    built = options(command(served_model_name="zephyr", aliases=("alpha", "beta")))
    assert built["--alias"] == "zephyr"
    assert options(command(aliases=("alpha",)))["--alias"] == "m"


def test_environment_is_clean() -> None:
    """Only what the recipe says and a fixed locale: nothing of the daemon's own environment is passed on."""
    assert command().environment == {"LC_ALL": "C.UTF-8"}
    assert command(env_vars={"OMP_NUM_THREADS": "4"}).environment == {"LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "4"}


def test_gpus_win_over_environment_variables() -> None:
    """Should a variable slip through the loader, the field still decides which GPUs are seen."""
    built = command(gpus=("0",), env_vars={"CUDA_VISIBLE_DEVICES": "7"})
    assert built.environment["CUDA_VISIBLE_DEVICES"] == "0"


def test_socket_path_may_have_107_bytes() -> None:
    """A longer path is refused with its length, in bytes; llama-server would only say that it cannot bind."""
    files = ModelFiles(("/m.gguf",))
    longest = "/" + "x" * (SUN_PATH_BYTES - 1)
    build_command(recipe(), files, GPU, socket_path=longest, is_sandboxed=False)
    for path in (longest + "x", "/" + "ö" * 54):
        with pytest.raises(LoadFailedError, match=r"has (108|109) bytes, a Unix socket holds 107"):
            build_command(recipe(), files, GPU, socket_path=path, is_sandboxed=False)


def test_flags_of_other_builds_are_left_out() -> None:
    """What only some builds know is given only where it is known, under the name that it has there."""
    old = ServerBinary(("llama-server",), "the test", known_flags=frozenset({"--no-webui"}))
    built = options(command(old))
    assert "--no-webui" in built
    assert built.keys().isdisjoint({"--no-ui", "--offline", "--metrics", "--cache-ram"})


# extra_args


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"top_k": 40}, ["--top-k", "40"]),
        ({"--top-k": 40}, ["--top-k", "40"]),
        ({"temp": 0.7}, ["--temp", "0.7"]),
        ({"warmup": False}, ["--no-warmup"]),
        ({"warmup": None}, []),
        ({"chat_template_kwargs": {"enable_thinking": False}}, ["--chat-template-kwargs", '{"enable_thinking":false}']),
        ({"jinja": True}, ["--jinja"]),
        ({"draft_max": 16}, ["--spec-draft-n-max", "16"]),
        ({"no_mmap": True}, ["--load-mode", "none"]),
        ({"mlock": True}, ["--load-mode", "mlock"]),
    ],
)
def test_extra_args_are_rendered(extra: dict[str, object], words: list[str]) -> None:
    """Underscores are dashes, switches have no value, false is the --no- twin, old names are the new ones."""
    with_extra, without = command(extra_args=extra), command()
    assert with_extra.argv == (*without.argv, *words)
    assert not any("=" in word for word in words if word.startswith("-"))


def test_renamed_flags_are_told() -> None:
    """A flag that was translated leaves a note, so that the recipe can be brought up to date."""
    (note, *_) = command(extra_args={"no_mmap": True}, max_model_len=512).notes
    assert "--no-mmap was replaced by --load-mode" in note


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"host": "0.0.0.0"}, "host is not allowed"),
        ({"port": 70000}, "port is not allowed"),
        ({"mu": "https://example.org/m.gguf"}, "mu is not allowed"),
        ({"hf": "org/model"}, "hf is not allowed"),
        ({"api_key": "secret"}, "api_key is not allowed"),
        ({"top_k": "4k"}, "whole number"),
        ({"flag_that_never_was": 1}, "does not accept --flag-that-never-was"),
        ({"top_k=40": None}, "top_k=40"),
        ({"draft_max": 1, "spec_draft_n_max": 2}, "set the same thing"),
    ],
)
def test_extra_args_that_are_refused(extra: dict[str, object], message: str) -> None:
    """What could change the endpoint, fetch from the network or be misread ends in one sentence, before a start."""
    with pytest.raises(LoadFailedError, match=message) as caught:
        command(extra_args=extra)
    assert caught.value.message.startswith("cannot load 'm': extra_args: ")
    assert caught.value.hint


# Files


def test_files_keep_their_groups() -> None:
    """Shards stay in one directory, other files have one each, since two of them may share a name."""
    files = ModelFiles(
        ("/a/m-00001-of-00002.gguf", "/a/m-00002-of-00002.gguf"),
        mmproj="/b/same.gguf",
        draft_model="/c/same.gguf",
        chat_template_file="/d/t.jinja",
        lora=("/e/one.gguf", "/f/two.gguf"),
    )
    bound = {file.host: file.inside for file in bind_files(files, is_sandboxed=True)}
    assert bound == {
        "/a/m-00001-of-00002.gguf": "/run/llmstudio-model/0/m-00001-of-00002.gguf",
        "/a/m-00002-of-00002.gguf": "/run/llmstudio-model/0/m-00002-of-00002.gguf",
        "/b/same.gguf": "/run/llmstudio-model/1/same.gguf",
        "/c/same.gguf": "/run/llmstudio-model/2/same.gguf",
        "/d/t.jinja": "/run/llmstudio-model/3/t.jinja",
        "/e/one.gguf": "/run/llmstudio-model/4/one.gguf",
        "/f/two.gguf": "/run/llmstudio-model/5/two.gguf",
    }
    built = build_command(
        recipe(lora=(LoraAdapter("/e/one.gguf"), LoraAdapter("/f/two.gguf", 0.5))),
        files,
        GPU,
        socket_path=SOCKET,
        is_sandboxed=True,
    )
    found = options(built)
    assert found["-m"] == "/run/llmstudio-model/0/m-00001-of-00002.gguf"
    assert found["--mmproj"] == "/run/llmstudio-model/1/same.gguf"
    assert found["--model-draft"] == "/run/llmstudio-model/2/same.gguf"
    assert found["--chat-template-file"] == "/run/llmstudio-model/3/t.jinja"
    assert found["--lora-scaled"] == "/run/llmstudio-model/4/one.gguf:1,/run/llmstudio-model/5/two.gguf:0.5"
    assert {file.host for file in built.files} == set(bound)


@pytest.mark.parametrize("path", ["/models/a,b.gguf", "/models/a:b.gguf"])
def test_lora_path_that_cannot_be_written_is_refused(path: str) -> None:
    """llama-server splits the list of adapters at commas and colons, so a path may have neither."""
    with pytest.raises(LoadFailedError, match="may not have a comma or colon in its path"):
        command(files=ModelFiles(("/m.gguf",), lora=(path,)), lora=(LoraAdapter(path),))


def test_file_that_stands_in_two_places_is_bound_once() -> None:
    """A model that is its own draft is one file with one name."""
    bound = bind_files(ModelFiles(("/a/m.gguf",), draft_model="/a/m.gguf"), is_sandboxed=True)
    assert [file.inside for file in bound] == ["/run/llmstudio-model/0/m.gguf"]


def test_every_flag_we_write_is_known_to_the_recorded_build() -> None:
    """A command that uses every field names only flags that llama-server 0.7.0 accepts."""
    everything = json.loads(
        '{"kv_unified": true, "flash_attn": true, "n_gpu_layers": 1, "split_mode": "row", "tensor_split": [1],'
        '"main_gpu": 0, "n_batch": 1, "n_ubatch": 1, "cache_type_k": "f16", "cache_type_v": "f16", "threads": 1,'
        '"load_mode": "auto", "cache_ram": 1, "pooling": "none", "reasoning_format": "none", "chat_template": "x",'
        '"n_cpu_moe": 1, "override_tensor": "x=CPU", "spec_type": "x", "spec_draft_n_max": 1, "spec_draft_n_min": 1,'
        '"spec_draft_p_min": 0.5, "spec_draft_n_gpu_layers": 1, "embedding": true, "rerank": true, "gpus": "none"}'
    )
    files = ModelFiles(
        ("/m.gguf",), mmproj="/p.gguf", draft_model="/d.gguf", chat_template_file="/t", lora=("/l.gguf",)
    )
    built = command(files=files, lora=(LoraAdapter("/l.gguf"),), **everything)
    assert {flag for flag in options(built) if flag not in KNOWN} == set()
