"""A llama-server command that somebody has already becomes the recipe that starts the same server."""

import contextlib
import shlex
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmstudiod.core.errors import BadRequestError
from llmstudiod.core.flag_table import FLAGS, Flag, FlagKind
from llmstudiod.core.from_command import recipe_from_command
from llmstudiod.core.recipe_reader import parse_recipe_bytes
from llmstudiod.http.admin_recipes import yaml_text

MODEL = "/srv/models/a.gguf"
BASE = {"id": "a", "model_path": MODEL}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", {}),
        ("-c 8192", {"max_model_len": 8192}),
        ("--ctx-size=8192", {"max_model_len": 8192}),
        ("-c 0", {}),
        ("-np 4 -c 8192", {"max_num_seqs": 4, "max_model_len": 2048}),
        ("-np 4 -c 8192 --kv-unified", {"max_num_seqs": 4, "max_model_len": 8192, "kv_unified": True}),
        ("-np -1", {}),
        ("-ngl 99", {"n_gpu_layers": 99}),
        ("-ngl all", {"n_gpu_layers": "all"}),
        ("-ngl -1", {"n_gpu_layers": "all"}),
        ("-fa", {"flash_attn": True}),
        ("-fa off", {"flash_attn": False}),
        ("-fa -c 512", {"flash_attn": True, "max_model_len": 512}),
        ("-ctk q8_0 -ctv q8_0", {"cache_type_k": "q8_0", "cache_type_v": "q8_0"}),
        ("-sm row -ts 3,1 -mg 1", {"split_mode": "row", "tensor_split": [3.0, 1.0], "main_gpu": 1}),
        ("-ts 3/1", {"tensor_split": [3.0, 1.0]}),
        ("--alias mine", {"served_model_name": "mine"}),
        ("--alias mine,yours", {"served_model_name": "mine", "aliases": ["yours"]}),
        ("--embedding --pooling mean", {"embedding": True, "pooling": "mean"}),
        ("--mmproj /srv/models/p.gguf", {"mmproj": "/srv/models/p.gguf"}),
        ("--temp 0.7 --top-k 40", {"extra_args": {"temp": 0.7, "top-k": 40}}),
        ("--temp -1", {"extra_args": {"temp": -1.0}}),
        ("--lora /srv/models/l.gguf", {"lora": [{"path": "/srv/models/l.gguf"}]}),
        ("--no-mmap --mlock", {"load_mode": "mlock"}),
        ("--no-mmap", {"load_mode": "none"}),
        ("--mlock", {"load_mode": "mlock"}),
        ("--draft-max 16", {"spec_draft_n_max": 16}),
        ("-t -1 -tb -1 -b -1 --cache-ram -1 -mg -1", {"extra_args": {"threads-batch": -1}}),
        ("-t 0", {}),
        ("-t 8 -b 1024 -ub 256", {"threads": 8, "n_batch": 1024, "n_ubatch": 256}),
    ],
)
def test_flags_become_fields(words: str, expected: dict[str, Any]) -> None:
    """By long name, short name and ``=``; with llama-server's special values."""
    assert recipe_from_command(f"llama-server -m {MODEL} {words}").recipe == BASE | expected


@pytest.mark.parametrize(
    "command",
    [
        f"llama-server -m {MODEL}",
        f"./build/bin/llama-server -m {MODEL}",
        f"sudo nice -n 5 /usr/bin/llama-server \\\n  -m {MODEL}",
        f"llama-server \\\r\n -m {MODEL}",
        f"'/opt/my llama/llama-server' -m '{MODEL}'",
        f"llama-server.exe --model {MODEL}",
        f"llama-server -m {MODEL}  # the small one",
        f"LLAMA=1 llama-server -m {MODEL}",
        f"-m {MODEL}",
        f"nohup llama-server -m {MODEL} > /tmp/log 2>&1 &",
        f"llama-server -m {MODEL} 2>/dev/null | tee 'a log'; echo \"it's over\" && true",
        f"cd /opt/llama && exec ./llama-server -m {MODEL} &> log",
        f"#!/bin/sh\n# it's ours\nexport LLAMA=1; taskset -c 0-7 numactl -i all env A=b llama-server -m {MODEL}\n",
        f"llama-server ^\r\n  -m {MODEL}",
        f"llama-server `\n  -m {MODEL}",
        f"& .\\llama-server.exe -m {MODEL}",
        f"llama-server \u2013m {MODEL}",
        f"llama-server \u2014model \u201c{MODEL}\u201d",
        f"[Service]\nUser=x\nExecStart=-/usr/bin/llama-server \\\n  -m {MODEL}\nRestart=always",
        f"models:\n a:\n  cmd: |\n   # fast\n   /app/llama-server --port ${{PORT}}\n   -m {MODEL}\n  ttl: 5\n",
        f"cmd: llama-server -m {MODEL} --port ${{PORT}}",
        "docker run -it --rm -p 1:2 --gpus all -v /srv/models:/models:ro img -m /models/a.gguf",
        "sudo podman run --name=x --volume /srv/models/:/m img:full --server --model=/m/a.gguf",
        "docker run --mount type=bind,source=/srv,target=/data img /app/llama-server -m /data/models/a.gguf",
    ],
)
def test_command_is_read_as_shells_do(command: str) -> None:
    """Paths, line ends, quotes, comments, variables and other programs in front."""
    assert recipe_from_command(command).recipe == BASE


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (f"llama-server -m {MODEL} --port 8081", "--port is left out: the endpoint's port"),
        (f"llama-server -m {MODEL} --host 0.0.0.0", "--host is left out: the endpoint's address"),
        (f"llama-server -m {MODEL} --api-key secret", "--api-key is left out: keys are made"),
        (f"llama-server -m {MODEL} --log-file /tmp/x", "--log-file is left out"),
        (f"llama-server -m {MODEL} --frobnicate 3", "--frobnicate: not known"),
        (f"llama-server -m {MODEL} -c 8192 -np 4", "-c 8192 is shared by 4 slots"),
        (f"GGML_X=1 llama-server -m {MODEL}", "the variable GGML_X is left out: recipes over HTTP have none"),
        (f"LD_PRELOAD=/x llama-server -m {MODEL}", "the variable LD_PRELOAD is left out: it can load"),
        (f"docker run -e GGML_X=1 img -m {MODEL}", "the variable GGML_X is left out"),
        ("docker run -v /a:/models img -m /models/x.gguf", "'/models/x.gguf' is '/a/x.gguf' on this machine"),
        ("docker run -v disk:/models img -m /models/x.gguf", "'disk' is a volume of its own"),
        (f"taskset -c 0 llama-server -m {MODEL}", "taskset in front is left out: limits: {allowed_cpus"),
        (f"llama-server -m {MODEL} > log", "where its output goes is left out"),
        (f"llama-server -m {MODEL} | tee log", "'tee log' beside the command is left out"),
        (f"llama-server \u2013m {MODEL}", "a long dash"),
        (f"llama-server -m {MODEL} -t -1", "-t -1 is left out: it is llama-server's word for its own choice"),
        (f"llama-server -m {MODEL} --no-mmap", "--no-mmap was replaced by --load-mode"),
        (f"llama-server -m {MODEL} --spec-replace a", "--spec-replace is left out: llama-server has it no more"),
        (f"llama-server -m {MODEL} -hf a/b", "-hf is left out: it downloads files"),
        (f"llama-server -m {MODEL} --log-frob 3", "--log-frob is left out: the daemon sets it"),
        (f"ExecStart=llama-server -m {MODEL}", "of the unit only ExecStart= is read"),
        ("llama-server -m C:\\models\\a.gguf", "'C:\\models\\a.gguf' is a path of Windows"),
    ],
)
def test_what_does_not_come_along_is_told(command: str, said: str) -> None:
    """Nothing is dropped in silence, and no secret is kept."""
    made = recipe_from_command(command)
    assert any(note.startswith(said) for note in made.notes), made.notes
    assert "secret" not in str(made.recipe) + str(made.notes)


def test_file_by_hand_may_have_more() -> None:
    """Variables and flags that this llmstudiod does not know: what will happen is told."""
    made = recipe_from_command(f"GGML_X=1 PATH=/x llama-server -m {MODEL} --frob 3", over_http=False)
    assert made.recipe == BASE | {"env_vars": {"GGML_X": "1"}, "extra_args": {"frob": "3"}}
    assert [note.partition(":")[0] for note in made.notes] == ["the variable PATH is left out", "--frob"]
    assert recipe_from_command(f"GGML_X=1 llama-server -m {MODEL} --frob 3").recipe == BASE


def test_gpus_come_from_the_variable() -> None:
    """Which is how people choose them."""
    assert recipe_from_command(f"CUDA_VISIBLE_DEVICES=0,1 llama-server -m {MODEL}").recipe["gpus"] == ["0", "1"]
    assert recipe_from_command(f"CUDA_VISIBLE_DEVICES= llama-server -m {MODEL}").recipe["gpus"] == "none"
    for words in ("export CUDA_VISIBLE_DEVICES=1 && llama-server", "$env:CUDA_VISIBLE_DEVICES='1'; llama-server.exe",
                  "docker run --gpus '\"device=1\"' img", "docker run -e CUDA_VISIBLE_DEVICES=1 img"):  # fmt: skip
        made = recipe_from_command(f"{words} -m {MODEL}")
        assert (made.recipe["gpus"], [note for note in made.notes if "beside" in note]) == (["1"], [])


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/srv/Qwen3-8B Q4_K_M.gguf", "qwen3-8b-q4_k_m"),
        ("/srv/big-00001-of-00003.gguf", "big"),
        ("C:\\models\\Llama.gguf", "llama"),
        ("/srv/" + "x" * 99 + ".gguf", "x" * 63),
        ("/srv/---.gguf", "model"),
    ],
)
def test_id_is_made_of_the_file(path: str, model: str) -> None:
    """And is always one that a recipe may have."""
    recipe = recipe_from_command(f"llama-server -m {shlex.quote(path)}").recipe
    assert recipe["id"] == model
    assert parse_recipe_bytes(yaml_text(recipe | {"model_path": MODEL}).encode(), file="x.yaml").faults == ()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("", "names no model"),
        ("llama-server -c 512", "names no model"),
        ("llama-server -m 'x.gguf", "cannot be read"),
        (f"llama-server -m {MODEL} -c many", "-c: expected a number, found 'many'"),
        (f"llama-server -m {MODEL} -c", "-c: expected a value after it"),
        (f"llama-server {MODEL} --", "expected a flag of llama-server"),
        ("llama-server -hf unsloth/Qwen3-8B-GGUF:Q4_K_M", "does not download 'unsloth/Qwen3-8B-GGUF:Q4_K_M'"),
        ("vllm serve Qwen/Qwen3-8B", "found one of vLLM"),
        ("docker run vllm/vllm-openai:latest --model Qwen/Qwen3-8B", "found one of vLLM"),
        ("ollama run qwen3", "found one of Ollama"),
        (f"./build/bin/llama-cli -m {MODEL} -p hello", "not of its server"),
        (f"python3 -m llama_cpp.server --model {MODEL}", "found one of llama-cpp-python"),
        ("models:\n a:\n  cmd: llama-server -m a\n b:\n  cmd: llama-server -m b", "has 2 commands"),
        (f"llama-server -m {MODEL} --mmap --mlock --dio", "contradict each other"),
        (f"llama-server -m {MODEL} -ngl some", "-ngl: expected a number"),
        (f"llama-server -m {MODEL} -ts 1,x", "--tensor-split: expected a number"),
    ],
)
def test_what_is_no_command_is_refused(command: str, says: str) -> None:
    """With what was found and what was expected."""
    with pytest.raises(BadRequestError) as caught:
        recipe_from_command(command)
    assert says in caught.value.message


@pytest.mark.parametrize(
    "command", ["-hf a/b", "-mu https://x/y.gguf", "vllm serve x", "ollama run x", "llama-cli -m x"]
)
def test_refusal_says_what_to_do(command: str) -> None:
    """Not only what is wrong."""
    with pytest.raises(BadRequestError) as caught:
        recipe_from_command(command)
    assert caught.value.hint


@given(st.text(st.sampled_from("ab-m \\\n'\"<>|&;2#$`^=/.:\u2013\u201c{}")))
def test_any_text_is_read_or_refused(text: str) -> None:
    """With a sentence, never a traceback."""
    with contextlib.suppress(BadRequestError):
        recipe_from_command(text)


VALUES = {
    FlagKind.SWITCH: None, FlagKind.INTEGER: "3", FlagKind.NUMBER: "0.5", FlagKind.ON_OFF_AUTO: "on",
    FlagKind.JSON: '{"a": 1}', FlagKind.VALUE: "x", FlagKind.LIST: "x",
}  # fmt: skip
CHOSEN = {
    "--cache-type-k": "q8_0", "--cache-type-v": "q8_0", "--load-mode": "mmap", "--n-gpu-layers": "7",
    "--split-mode": "row", "--tensor-split": "3,1", "--spec-draft-ngl": "7", "--pooling": "mean",
    "--reasoning-format": "auto",
}  # fmt: skip


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag.denied is None], ids=lambda flag: flag.names[0])
def test_every_flag_makes_a_recipe_without_faults(flag: Flag) -> None:
    """By each of its names; also one that is negated."""
    value = CHOSEN.get(flag.names[0], VALUES[flag.kind])
    for name in (*flag.names, *flag.negated):
        words = [name] if value is None else [name, value]
        made = recipe_from_command(shlex.join(["llama-server", "-m", MODEL, *words]))
        loaded = parse_recipe_bytes(yaml_text(made.recipe).encode(), file="a.yaml")
        assert (list(map(str, loaded.faults)), len(loaded.entries)) == ([], 1)


def test_short_number_is_explained() -> None:
    """What it meant to llama-server all the time is worth knowing."""
    with pytest.raises(BadRequestError) as caught:
        recipe_from_command(f"llama-server -m {MODEL} -c 8k")
    assert caught.value.hint == "llama-server takes this for 8: write the number in full"


def test_alias_without_a_name_is_none() -> None:
    """Commas alone name nothing."""
    assert "served_model_name" not in recipe_from_command(f"llama-server -m {MODEL} --alias ,").recipe
