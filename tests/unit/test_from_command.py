"""A llama-server command that somebody has already becomes the recipe that starts the same server."""

import shlex
from typing import Any

import pytest

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
        (f"GGML_X=1 llama-server -m {MODEL}", "the variable GGML_X is left out"),
    ],
)
def test_what_does_not_come_along_is_told(command: str, said: str) -> None:
    """Nothing is dropped in silence, and no secret is kept."""
    made = recipe_from_command(command)
    assert any(note.startswith(said) for note in made.notes), made.notes
    assert "secret" not in str(made.recipe) + str(made.notes)


def test_gpus_come_from_the_variable() -> None:
    """Which is how people choose them."""
    assert recipe_from_command(f"CUDA_VISIBLE_DEVICES=0,1 llama-server -m {MODEL}").recipe["gpus"] == ["0", "1"]
    assert recipe_from_command(f"CUDA_VISIBLE_DEVICES= llama-server -m {MODEL}").recipe["gpus"] == "none"


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
        (f"llama-server -m {MODEL} -ngl some", "-ngl: expected a number"),
        (f"llama-server -m {MODEL} -ts 1,x", "--tensor-split: expected a number"),
    ],
)
def test_what_is_no_command_is_refused(command: str, says: str) -> None:
    """With what was found and what was expected."""
    with pytest.raises(BadRequestError) as caught:
        recipe_from_command(command)
    assert says in caught.value.message


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
