"""Recipes in files: what is accepted, and for each fault its file, line, key, what was found and what was expected."""
# ruff: noqa: E501 - a table reads best with one case a line

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmstudiod.adapters.recipe_files import load_recipe_file, load_recipes
from llmstudiod.core.catalogue import build_catalogue
from llmstudiod.core.errors import ModelNotFoundError
from llmstudiod.core.flag_table import FLAGS
from llmstudiod.core.recipe import Fault, Limits, LoadedRecipes, LoraAdapter, Recipe, Severity, recipe_hash
from llmstudiod.core.recipe_names import FOREIGN, IGNORED
from llmstudiod.core.recipe_reader import parse_recipes
from llmstudiod.core.yaml_lines import Document, parse_document

EXAMPLE = (
    '{"id":"llama3-8b-q4","name":"Llama 3 8B Q4_K_M","model_path":"/models/Meta-Llama-3-8B-Instruct-Q4_K_M.gguf",'
    '"backend":"llamacpp","max_model_len":8192,"max_num_seqs":4,"extra_args":{"n_gpu_layers":99,"flash_attn":true}}'
)
HEAD = "id: m\nmodel_path: /m.gguf\n"


def load(text: str, *, file: str = "r.yaml") -> LoadedRecipes:
    """Return the recipes of a text."""
    document = parse_document(text, file=file)
    assert isinstance(document, Document), document
    return parse_recipes(document, default_id=Path(file).stem)


def one(text: str, *, file: str = "r.yaml") -> Recipe:
    """Return the one recipe of a text without faults and warnings."""
    loaded = load(text, file=file)
    assert loaded.faults == ()
    assert len(loaded.entries) == 1
    assert loaded.entries[0].warnings == ()
    return loaded.entries[0].recipe


def refused(text: str) -> Fault:
    """Return the one fault of a text that gives no recipe."""
    loaded = load(text)
    assert loaded.entries == ()
    faults = [fault for fault in loaded.faults if fault.severity is Severity.FAULT]
    assert len(faults) == 1, faults
    return faults[0]


def warnings(text: str) -> tuple[Fault, ...]:
    """Return what was noted about the one recipe of a text, which is served."""
    loaded = load(text)
    assert (loaded.faults, len(loaded.entries)) == ((), 1)
    return loaded.entries[0].warnings


def test_example_of_the_documentation_loads_without_a_word() -> None:
    """The recipe that everybody copies first: no fault, no warning, the flags taken as fields."""
    recipe = one(EXAMPLE, file="llama3.json")
    assert recipe == Recipe(
        id="llama3-8b-q4",
        name="Llama 3 8B Q4_K_M",
        model_path="/models/Meta-Llama-3-8B-Instruct-Q4_K_M.gguf",
        max_model_len=8192,
        max_num_seqs=4,
        n_gpu_layers=99,
        flash_attn=True,
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("n_ctx: 4096", {"max_model_len": 4096}),
        ("ctx-size: 4096", {"max_model_len": 4096}),
        ("parallel: 2", {"max_num_seqs": 2}),
        ("tp: 2", {"tensor_parallel_size": 2}),
        ("engine: llamacpp", {}),
        ("kv_cache_dtype: q8_0", {"cache_type_k": "q8_0"}),
        ("kv_cache_dtype: auto", {}),
        ("ngl: all", {"n_gpu_layers": "all"}),
        ("n_gpu_layers: '12'", {"n_gpu_layers": 12}),
        ("flash_attn: off", {"flash_attn": False}),
        ("flash_attn: 'on'", {"flash_attn": True}),
        ("tags: chat", {"tags": ["chat"]}),
        ("aliases: [a, B c]", {"aliases": ["a", "B c"]}),
        ("gpus: 0", {"gpus": ["0"]}),
        ("gpus: 0, 1", {"gpus": ["0", "1"]}),
        ("cuda_visible_devices: [0, GPU-1a2b]", {"gpus": ["0", "GPU-1a2b"]}),
        ("gpus: none", {"gpus": "none"}),
        ("gpus: auto", {}),
        ("tensor_split: 3,1", {"tensor_split": [3.0, 1.0]}),
        ("tensor_split: 3/1", {"tensor_split": [3.0, 1.0]}),
        ("tensor_split: [3, 1.5]", {"tensor_split": [3.0, 1.5]}),
        ("lora: /a", {"lora": [{"path": "/a", "scale": 1.0}]}),
        ("lora: [/a, {path: /b, scale: 0.5}]", {"lora": [{"path": "/a", "scale": 1.0}, {"path": "/b", "scale": 0.5}]}),
        ("override_tensor: [a=CPU, b=CPU]", {"override_tensor": "a=CPU,b=CPU"}),
        ("idle_timeout: 1h 30m", {"idle_timeout": 5400.0}),
        ("idle_timeout: off", {"idle_timeout": 0.0}),
        ("idle_timeout: never", {"idle_timeout": 0.0}),
        ("load_stall_timeout: 90", {"load_stall_timeout": 90.0}),
        ("limits: {memory_max: 1.5G, nice: 5}", {"limits": {"memory_max": 3 << 29, "nice": 5}}),
        ("limits: {allowed_cpus: 3}", {"limits": {"allowed_cpus": "3"}}),
        ("limits: {allowed_cpus: [0-3, 8]}", {"limits": {"allowed_cpus": "0-3,8"}}),
        ("limits: {memory_max: }", {}),
        ("sandbox: strict", {}),
        ("status: running", {}),
        ("host: null", {}),
        ("max_model_len: null", {}),
        ("quantization: null", {}),
        ("name: 12:30", {"name": "12:30"}),
        (
            "env_vars: {A: 1, B: 0, C: 1.5, D: true, E: }",
            {"env_vars": {"A": "1", "B": "0", "C": "1.5", "D": "true", "E": ""}},
        ),
        ("env-vars: {A: x}", {"env_vars": {"A": "x"}}),
        ("envVars: {A: x}", {"env_vars": {"A": "x"}}),
        ("extra_args: {env_vars: {A: x}}", {"env_vars": {"A": "x"}}),
        ("extra_args: {env-vars: {A: x}, top_k: 40}", {"env_vars": {"A": "x"}, "extra_args": {"top_k": 40}}),
        ("extra-args: {top-k: 40}", {"extra_args": {"top-k": 40}}),
        ("extra_args: {ngl: 9, fa: auto}", {"n_gpu_layers": 9}),
        ("extra_args: {--ctx-size: 512}", {"max_model_len": 512}),
        ("extra_args: {n_ctx: 512, pinned: true}", {"max_model_len": 512, "pinned": True}),
        ("extra_args: {cuda-visible-devices: 1}", {"gpus": ["1"]}),
        ("extra_args: {kv_unified: true}", {"kv_unified": True}),
        ("extra_args: {no_kv_unified: true}", {}),
        ("extra_args: {no-kv-unified: false}", {"kv_unified": True}),
        ("extra_args: {lora: '/a,/b'}", {"lora": [{"path": "/a", "scale": 1.0}, {"path": "/b", "scale": 1.0}]}),
        ("extra_args: {lora_scaled: '/a:0.5'}", {"lora": [{"path": "/a", "scale": 0.5}]}),
        ("extra_args: {alias: X}", {"served_model_name": "X"}),
        ("extra_args: {top_k: null}", {}),
        ("extra_args: {mlock: true}", {"extra_args": {"mlock": True}}),
        ("extra_args: {flag_of_tomorrow: 7}", {"extra_args": {"flag_of_tomorrow": 7}}),
        ("extra_args:", {}),
    ],
)
def test_spelling_is_accepted(line: str, expected: dict[str, Any]) -> None:
    """Aliases, twins in extra_args and the usual forms of a value become the documented fields."""
    found = one(HEAD + line).as_dict()
    assert {name: value for name, value in found.items() if name not in {"id", "model_path"}} == expected


@pytest.mark.parametrize(
    ("line", "key", "words", "hint"),
    [
        # wrong types and values, one field after the other
        ("name: 7", "name", "expected text, found the number 7", "put quotes round it"),
        ("name: yes", "name", "expected text, found true", "put quotes round it"),
        ("description: [a]", "description", 'expected text, found ["a"]', None),
        ("tags: 5", "tags", "expected a list of words, found the number 5", None),
        ("tags: [a, 1]", "tags.1", "expected text, found the number 1", "put quotes round it"),
        ("backend: vllm", "backend", "expected 'llamacpp', found 'vllm'", "GGUF"),
        ("served_model_name: 405", "served_model_name", "text of 1 to 200 characters, found the number 405", "quotes"),
        ("served_model_name: ''", "served_model_name", "expected a name without commas", "aliases"),
        ("aliases: 5", "aliases", "expected a list of names, at most 100, found the number 5", None),
        ("aliases: {a: 1}", "aliases", 'expected a list of names, at most 100, found {"a": 1}', None),
        ("default: maybe", "default", "expected true or false, found 'maybe'", None),
        ("unlisted: [1]", "unlisted", "expected true or false, found [1]", None),
        ("max_model_len: 4k", "max_model_len", "expected a whole number from 1 to 16777216, found '4k'", "tokens"),
        ("max_model_len: 0", "max_model_len", "from 1 to 16777216, found the number 0", "tokens"),
        ("max_model_len: true", "max_model_len", "from 1 to 16777216, found true", "tokens"),
        ("max_num_seqs: 257", "max_num_seqs", "expected a whole number from 1 to 256, found the number 257", "requests"),
        ("max_num_seqs: 2.5", "max_num_seqs", "found the number 2.5", None),
        ("kv_unified: 3", "kv_unified", "expected true or false, found the number 3", None),
        ("tp: two", "tp", "expected a whole number from 1 to 64, found 'two'", None),
        ("gpus: [a]", "gpus", 'expected indices or UUIDs of GPUs, auto or none, found ["a"]', None),
        ("gpus: {a: 1}", "gpus", "expected indices or UUIDs of GPUs", None),
        ("n_gpu_layers: -1", "n_gpu_layers", "a whole number of 0 or more, 'auto' or 'all', found the number -1", "all is"),
        ("ngl: most", "ngl", "a whole number of 0 or more, 'auto' or 'all', found 'most'", "all is"),
        ("split_mode: 3", "split_mode", "expected 'none', 'layer', 'row' or 'tensor', found the number 3", None),
        ("tensor_split: a,b", "tensor_split", "expected proportions such as 3,1, found 'a,b'", None),
        ("tensor_split: 3", "tensor_split", "expected proportions such as [3, 1], found the number 3", None),
        ("tensor_split: [1, true]", "tensor_split.1", "expected a number from 0 to 1000000, found true", None),
        ("tensor_split: [.inf]", "tensor_split.0", "found the number inf", None),
        ("main_gpu: -1", "main_gpu", "expected a whole number of 0 or more, found the number -1", None),
        ("flash_attn: maybe", "flash_attn", "expected true, false or 'auto', found 'maybe'", None),
        ("n_batch: []", "n_batch", "expected a whole number from 1 to 1048576, found []", None),
        ("n_ubatch: x", "n_ubatch", "expected a whole number from 1 to 1048576, found 'x'", None),
        ("cache_type_k: fp8", "cache_type_k", "'iq4_nl', 'q5_0' or 'q5_1', found 'fp8'", "q8_0"),
        ("kv_cache_dtype: fp8", "kv_cache_dtype", "found 'fp8'", "q8_0"),
        ("threads: 0", "threads", "expected a whole number from 1 to 1024, found the number 0", None),
        ("load_mode: fast", "load_mode", "expected 'auto', 'none', 'mmap', 'mlock', 'mmap+mlock' or 'dio', found 'fast'", None),
        ("cache_ram: 8G", "cache_ram", "expected a whole number from 0 to 16777216, found '8G'", "8192 for 8 GiB"),
        ("mmproj: 5", "mmproj", "expected the path of a GGUF file, found the number 5", None),
        ("draft_model: {a: 1}", "draft_model", 'expected the path of a GGUF file, found {"a": 1}', None),
        ("spec_draft_p_min: 2", "spec_draft_p_min", "expected a number from 0 to 1, found the number 2", None),
        ("lora: [5]", "lora", "expected a path, or `path: …` and `scale: …`, found the number 5", None),
        ("lora: {scale: 1}", "lora", "expected a path, or `path: …` and `scale: …`", None),
        ("lora: {path: /a, scale: big}", "lora.0.scale", "expected a number from -1000 to 1000, found 'big'", None),
        ("lora: {path: /a, scale: .nan}", "lora.0.scale", "found the number nan", None),
        ('lora: "a\\nb"', "lora", "expected a path", None),
        ("chat_template: 5", "chat_template", "expected text, found the number 5", None),
        ('chat_template: "a\\0"', "chat_template", "expected text, found a NUL character in it", None),
        ("chat_template_file: 5", "chat_template_file", "expected the path of a file, found the number 5", None),
        ("reasoning_format: x", "reasoning_format", "expected 'none', 'auto', 'deepseek' or 'deepseek-legacy'", None),
        ("embedding: x", "embedding", "expected true or false, found 'x'", None),
        ("pooling: big", "pooling", "expected 'none', 'mean', 'cls', 'last' or 'rank', found 'big'", None),
        ("n_cpu_moe: -1", "n_cpu_moe", "expected a whole number of 0 or more, found the number -1", None),
        ("idle_timeout: soon", "idle_timeout", "expected a duration such as 90s, 10m or 1h 30m, found 'soon'", None),
        ("idle_timeout: [1]", "idle_timeout", "expected a duration such as 90s or 10m, found [1]", None),
        ("idle_timeout: -5", "idle_timeout", "expected a duration of 0 or more, found -5", None),
        ("drain_timeout: 99999d", "drain_timeout", "expected a duration of at most 3650d, found '99999d'", None),
        (f"drain_timeout: '{'9' * 400}'", "drain_timeout", "expected a duration", None),
        ("load_stall_timeout: 0", "load_stall_timeout", "expected a duration of 1s or more, found the number 0", None),
        ("priority: high", "priority", "expected a whole number from -1000 to 1000, found 'high'", None),
        ("concurrency_limit: 0", "concurrency_limit", "expected a whole number from 1 to 4096, found the number 0", None),
        ("limits: 5", "limits", "expected limits as `name: value`, found the number 5", None),
        ("limits: {memory_max: lots}", "limits.memory_max", "expected a size such as 512MiB or 2G, found 'lots'", None),
        (f"limits: {{memory_max: '{'9' * 400}G'}}", "limits.memory_max", "expected a size such as 512MiB or 2G", None),
        ("limits: {memory_max: 10}", "limits.memory_max", "expected a size of 1MiB or more, found the number 10", None),
        ("limits: {nice: 50}", "limits.nice", "expected a whole number from -20 to 19, found the number 50", None),
        ("limits: {nice: yes}", "limits.nice", "expected a whole number from -20 to 19, found true", None),
        ("limits: {memory: 4G}", "limits.memory", "there is no such limit", "did you mean memory_max?"),
        ("limits: {allowed_cpus: 0-x}", "limits.allowed_cpus", "expected numbers of CPUs such as 0-7,16, found '0-x'", None),
        ("sandbox: {gpu: 1}", "sandbox.gpu", "there is no such relaxation", "there are network"),
        ("sandbox: {netwrok: host}", "sandbox.netwrok", "there is no such relaxation", "did you mean network?"),
        ("sandbox: {network: all}", "sandbox.network", "expected 'none', 'loopback' or 'host', found 'all'", None),
        ("sandbox: {shared_ipc: maybe}", "sandbox.shared_ipc", "expected true or false, found 'maybe'", None),
        ("sandbox: off", "sandbox", "expected strict, or relaxations as `name: value`, found false", None),
        ("extra_args: [a]", "extra_args", 'expected flags as `name: value`, found ["a"]', "top_k: 40"),
        ("extra_args: yes", "extra_args", "expected flags as `name: value`, found true", "top_k: 40"),
        ("extra_args: 1.5", "extra_args", "expected flags as `name: value`, found the number 1.5", "top_k: 40"),
        # texts that would end up in a command line or a unit
        ('name: "a\\nb"', "name", "expected text in one line, found 'a\\nb'", None),
        ('mmproj: "a\\eb"', "mmproj", "expected text in one line, found 'a\\x1bb'", None),
        ("aliases: [' ']", "aliases", "found ' '", "list"),
        # flags
        ("extra_args: {top_k: many}", "extra_args.top_k", "--top-k takes a whole number, found 'many'", "--help"),
        ("extra_args: {warmup: 3}", "extra_args.warmup", "expected true or false, found the number 3", None),
        ("extra_args: {no_kv_unified: maybe}", "extra_args.no_kv_unified", "expected true or false, found 'maybe'", None),
        ("extra_args: {-zz: 1}", "extra_args.-zz", "is no flag that llmstudiod knows", None),
        ("extra_args: {extra_args: {log_file: /x}}", "extra_args.extra_args.log_file", "it writes files", "remove it"),
        ("extra_args: {flag_file: /x}", "extra_args.flag_file", "is not allowed: it reads another file", "remove it"),
        # what a recipe may not decide
        ("llama_server_path: /bin/sh", "llama_server_path", "expected no name of a binary in a recipe", "`llama_server` in"),
        ("extra_args: {env_vars: {PATH: /x}}", "extra_args.env_vars.PATH", "no recipe may set PATH", "remove it"),
        ("env_vars: [a]", "env_vars", 'expected variables as `NAME: value`, found ["a"]', None),
        ("env_vars: {A: [1]}", "env_vars.A", "expected text or a number, found [1]", None),
        ("env_vars: {'a b': x}", "env_vars.a b", "expected the name of a variable (letters, digits and _), found 'a b'", None),
        ('env_vars: {A: "a\\nb"}', "env_vars.A", "expected text in one line, found 'a\\nb'", None),
    ],
)  # fmt: skip
def test_fault_has_place_words_and_hint(line: str, key: str, words: str, hint: str | None) -> None:
    """Each fault leaves the recipe out and names file, line, key, what was expected and what was found."""
    fault = refused(HEAD + line)
    assert (fault.file, fault.line, fault.key) == ("r.yaml", 3, key)
    assert words in fault.message
    assert (hint or "") in (fault.hint or "")
    assert fault.recipe_id == "m"
    assert str(fault).startswith(f"r.yaml:3: {key}: ")
    assert str(fault).isprintable()


@pytest.mark.parametrize(
    "line", ["served_model_name: 'b,c'", "aliases: 'b,c'", "aliases: [a, 'b,c']", "extra_args: {alias: 'b,c'}"]
)
def test_names_with_commas_are_faults(line: str) -> None:
    """llama-server reads a comma as the end of a name and answers under the alphabetically first."""
    fault = refused(HEAD + line)
    assert fault.message == "expected a name without commas, line breaks and outer blanks, found 'b,c'"
    assert fault.hint == "give several names as a list in aliases: [a, b]"


@pytest.mark.parametrize(
    ("text", "found", "hint"),
    [
        ("id: Qwen/Qwen3", "found 'Qwen/Qwen3'", "served_model_name"),
        ("id: Qwen3-8B", "found 'Qwen3-8B'", "write id: qwen3-8b"),
        (f"id: {'x' * 64}", f"found '{'x' * 64}'", "names the unit"),
        ("id: ''", "found ''", "names the unit"),
        ("id: 7", "found the number 7", 'write id: "7", with the quotes'),
        ("id: [a]", 'found ["a"]', "names the unit"),
        ("id: .hidden", "found '.hidden'", "names the unit"),
        ('id: "a\\n"', "found 'a\\n'", "names the unit"),
    ],
)
def test_id_that_names_no_unit_is_refused(text: str, found: str, hint: str) -> None:
    """An id is part of a unit's name and a socket's path."""
    fault = refused(f"model_path: /m.gguf\n{text}")
    assert (fault.line, fault.key) == (2, "id")
    assert fault.message.startswith("expected an id of a-z, 0-9, '.', '_' and '-' that begins with a letter or digit")
    assert found in fault.message
    assert hint in str(fault.hint)


def test_longest_id_is_accepted() -> None:
    """63 characters are the limit."""
    assert one(f"id: {'x' * 63}\nmodel_path: /m").id == "x" * 63


def test_id_is_the_file_name_where_there_is_none(tmp_path: Path) -> None:
    """One recipe in a file needs no id; a file's name that is none is told as that."""
    (tmp_path / "qwen3-8b.yaml").write_text("model_path: /m.gguf")
    assert load_recipe_file(tmp_path / "qwen3-8b.yaml").entries[0].recipe.id == "qwen3-8b"
    (tmp_path / "My\nModel.yaml").write_text("model_path: /m.gguf")
    fault = load_recipe_file(tmp_path / "My\nModel.yaml").faults[0]
    assert "found 'My\\nModel' (the file's name, since the recipe has no id)" in fault.message


def test_recipe_without_a_model_is_refused() -> None:
    """model_path is the only thing that every recipe must say."""
    fault = refused("id: m")
    assert (fault.line, fault.key, fault.message) == (1, "model_path", "expected the path of a GGUF file, found none")
    assert "model_path: /models/x.gguf" in str(fault.hint)


@pytest.mark.parametrize(
    ("text", "line", "key", "first"),
    [
        ("n_ctx: 1\nmax_model_len: 2", 4, "max_model_len", "n_ctx in line 3"),
        ("max_model_len: 2\nctx_size: 2", 4, "ctx_size", "max_model_len in line 3"),
        ("max_model_len: 2\nmax-model-len: 2", 4, "max-model-len", "max_model_len in line 3"),
        ("n_gpu_layers: 1\nextra_args:\n  n_gpu_layers: 1", 5, "extra_args.n_gpu_layers", "n_gpu_layers in line 3"),
        ("extra_args:\n  fa: true\nflash_attn: true", 5, "flash_attn", "extra_args.fa in line 4"),
        ("kv_unified: true\nextra_args:\n  no_kv_unified: true", 5, "extra_args.no_kv_unified", "kv_unified in line 3"),
        ("extra_args:\n  top-k: 1\n  top_k: 2", 5, "extra_args.top_k", "extra_args.top-k in line 4"),
        ("extra_args:\n  new-one: 1\n  new_one: 2", 5, "extra_args.new_one", "extra_args.new-one in line 4"),
        ("env_vars: {A: 1}\nextra_args:\n  env-vars: {A: 2}", 5, "extra_args.env-vars.A", "env_vars.A in line 3"),
        ("extra_args: {model: /x}", 3, "extra_args.model", "model_path in line 2"),
    ],
)
def test_one_meaning_given_twice_is_refused(text: str, line: int, key: str, first: str) -> None:
    """Two spellings of one thing: nobody knows which was meant, so both lines are named."""
    fault = refused(HEAD + text)
    assert (fault.line, fault.key) == (line, key)
    assert fault.message.endswith(f"is given twice, first as {first}")


def test_old_flag_beside_the_field_of_its_successor_is_refused() -> None:
    """``no_mmap`` became a load mode, which the recipe gives itself."""
    fault = refused(HEAD + "load_mode: mmap\nextra_args:\n  no_mmap: true")
    assert (fault.line, fault.key) == (5, "extra_args.no_mmap")
    assert fault.message == "it sets load_mode, which is given as load_mode in line 3"
    assert one(HEAD + "load_mode: mmap\nextra_args:\n  no_mmap: false").load_mode == "mmap", "it says nothing"


DENIED = (
    "tools log_file rpc models_dir host port api_key hf_repo path slot_save_path agent model_url device ssl-key-file"
)


@pytest.mark.parametrize("flag", DENIED.split())
def test_denied_flag_is_a_fault(flag: str) -> None:
    """What reads or writes other files, listens, connects or runs tools is not a recipe's to give."""
    for spelling in (flag, flag.replace("_", "-"), "--" + flag.replace("_", "-")):
        fault = refused(HEAD + f"extra_args:\n  {spelling}: x")
        assert (fault.line, fault.key) == (4, f"extra_args.{spelling}")
        assert "is not allowed: " in fault.message
        assert fault.hint


def test_every_denied_flag_of_the_table_is_refused() -> None:
    """No spelling of a denied flag slips through, whatever else its name may mean."""
    slipped = [
        name
        for flag in FLAGS
        if flag.denied
        for name in (*flag.names, *flag.negated)
        if load(HEAD + f"extra_args: {{{json.dumps(name)}: true}}").entries
    ]
    assert slipped == []


@pytest.mark.parametrize(
    "name",
    ["LD_PRELOAD", "LD_LIBRARY_PATH", "PATH", "LLAMA_ARG_CTX_SIZE", "HF_TOKEN", "ld_preload", "CUDA_VISIBLE_DEVICES"],
)
@pytest.mark.parametrize("where", ["env_vars", "env-vars", "envVars", "extra_args.env_vars"])
def test_denied_variable_is_refused_wherever_it_stands(name: str, where: str) -> None:
    """Variables that load code or go round the recipe's fields are refused in every spelling of env_vars."""
    *outer, key = where.split(".")
    inner = f"{key}: {{{name}: x}}"
    fault = refused(HEAD + (f"{outer[0]}: {{{inner}}}" if outer else inner))
    assert fault.key == f"{where}.{name}"
    assert fault.message.startswith(f"no recipe may set {name}: ")


@pytest.mark.parametrize("name", sorted({*FOREIGN, *IGNORED}))
def test_key_of_another_backend_is_told_with_what_to_use(name: str) -> None:
    """The recipe is served; the warning says why the key has no effect, or what to use."""
    told = warnings(HEAD + f"{name}: 1")
    assert [(note.key, note.line, note.message) for note in told] == [(name, 3, "it has no effect here")]
    assert told[0].hint == (IGNORED.get(name) or FOREIGN[name])
    assert told[0].recipe_id == "m"


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("n_gpu_layer: 5", "did you mean n_gpu_layers?"),
        ("max_modl_len: 5", "did you mean max_model_len?"),
        ("top_k: 5", "a flag of llama-server belongs under extra_args: {top_k: …}"),
        ("zzz: 5", "the README and the example recipe tell the fields"),
    ],
)
def test_unknown_key_is_told_with_a_suggestion(line: str, hint: str) -> None:
    """A slip of the pen does not take the model down; it is told."""
    (note,) = warnings(HEAD + line)
    assert (note.line, note.message, note.hint) == (3, "there is no such field, it has no effect", hint)
    assert note.severity is Severity.WARNING


def test_installed_example_loads_without_a_word() -> None:
    """The recipe in /etc, as it is and with every comment sign taken away, has no fault; as installed it is not read."""
    path = Path(__file__).parents[2] / "etc" / "recipes.d" / "example.yaml.disabled"
    assert load_recipes(path.parent) == LoadedRecipes((), ())
    assert one(path.read_text()).id == "llama3-8b-q4"
    full = one(re.sub(r"^#(?=\S)", "", path.read_text(), flags=re.MULTILINE).replace("\n#  ", "\n  "))
    assert (full.limits.nice, full.pinned, full.idle_timeout) == (5, True, 1800)
    assert full.extra_args == {"top_k": 40, "cache_reuse": 256}


def test_export_of_vllm_studio_loads() -> None:
    """Every field that it writes is taken, or told; the model is served."""
    recipe: dict[str, Any] = {
        "id": "qwen", "name": "Qwen", "model_path": "/m.gguf", "backend": "llamacpp", "env_vars": None,
        "tensor_parallel_size": 1, "pipeline_parallel_size": 1, "max_model_len": 32768, "gpu_memory_utilization": 0.9,
        "kv_cache_dtype": "auto", "max_num_seqs": 16, "trust_remote_code": True, "tool_call_parser": None,
        "reasoning_parser": None, "enable_auto_tool_choice": False, "quantization": None, "dtype": None,
        "host": "0.0.0.0", "port": 8000, "served_model_name": None, "python_path": None, "extra_args": {},
        "max_thinking_tokens": None, "thinking_mode": "conservative", "status": "stopped",
    }  # fmt: skip
    loaded = load(json.dumps({"recipes": [recipe, recipe | {"id": "b", "backend": "vllm"}]}, indent=1), file="x.json")
    assert [entry.recipe.id for entry in loaded.entries] == ["qwen"]
    assert {note.key for note in loaded.entries[0].warnings} == {
        "pipeline_parallel_size", "gpu_memory_utilization", "trust_remote_code", "enable_auto_tool_choice",
        "host", "port", "thinking_mode",
    }  # fmt: skip
    faults = [fault for fault in loaded.faults if fault.severity is Severity.FAULT]
    assert [(fault.key, fault.recipe_id) for fault in faults] == [("backend", "b")]


def test_list_gives_each_recipe_its_lines() -> None:
    """One faulty recipe of several is left out; keys are told without the position in the list."""
    loaded = load("- id: a\n  model_path: /a\n- id: b\n  model_path: /b\n  threads: x\n- 5\n- model_path: /c\n")
    assert [(entry.recipe.id, entry.line) for entry in loaded.entries] == [("a", 1)]
    assert [(fault.line, fault.key, fault.recipe_id) for fault in loaded.faults] == [
        (5, "threads", "b"),
        (6, None, None),
        (7, "id", None),
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "expected a recipe, found an empty file"),
        ("# later", "expected a recipe, found an empty file"),
        ("[]", "expected a recipe, found an empty list"),
        ("{recipes: []}", "expected a recipe, found an empty list"),
        ("5", "expected a recipe as `key: value`, found the number 5"),
        ("hello", "expected a recipe as `key: value`, found 'hello'"),
    ],
)
def test_file_without_a_recipe_is_told(text: str, found: str) -> None:
    """A file that holds none is a fault, which the model of its name is told by."""
    fault = refused(text)
    assert (fault.message, fault.recipe_id) == (found, "r")


def test_half_written_file_is_told_under_its_name(tmp_path: Path) -> None:
    """Whoever asks for the model by the file's name finds out why it is not served."""
    (tmp_path / "qwen.json").write_text(EXAMPLE[:100])
    loaded = load_recipes(tmp_path)
    assert loaded.entries == ()
    (fault,) = loaded.faults
    assert (fault.file, fault.line, fault.recipe_id) == (str(tmp_path / "qwen.json"), 1, "qwen")
    with pytest.raises(ModelNotFoundError) as caught:
        build_catalogue((), loaded.faults).resolve("qwen")
    assert "its recipe is faulty" in str(caught.value.hint)


def test_directory_is_read_in_order_and_other_files_are_not(tmp_path: Path) -> None:
    """Only .yaml, .yml and .json count, and no hidden files; a directory that is not there is empty."""
    for name in ("b.yml", "a.yaml", "c.json"):
        (tmp_path / name).write_text('{"model_path": "/m"}')
    for name in (".d.yaml", "e.yaml~", "f.yaml.disabled", "README.md"):
        (tmp_path / name).write_text("broken: [")
    loaded = load_recipes(tmp_path)
    assert ([entry.recipe.id for entry in loaded.entries], loaded.faults) == (["a", "b", "c"], ())
    assert load_recipes(tmp_path / "no") == LoadedRecipes((), ())
    assert "Not a directory" in load_recipes(tmp_path / "a.yaml").faults[0].message


def test_spelling_does_not_change_the_hash() -> None:
    """Aliases, order and comments are not the recipe's meaning; a value is."""
    first = one("id: m\nmodel_path: /m\nn_ctx: 512\nextra_args: {fa: true}")
    second = one("# note\nflash_attn: on\nmax_model_len: 512\nmodel_path: /m\nid: m")
    assert recipe_hash(first) == recipe_hash(second)
    assert recipe_hash(first) != recipe_hash(one("id: m\nmodel_path: /m\nn_ctx: 513\nextra_args: {fa: true}"))


def test_nested_values_have_their_types() -> None:
    """Limits and adapters are objects, not dictionaries."""
    recipe = one(HEAD + "limits: {nice: 5}\nlora: /a")
    assert recipe.limits == Limits(nice=5)
    assert recipe.lora == (LoraAdapter("/a"),)


def test_number_of_faults_is_bounded() -> None:
    """A list of a thousand wrong items is one mistake."""
    loaded = load(HEAD + f"tags: {list(range(1000))}")
    assert len(loaded.faults) == 20


# Whatever is in a file, nothing is raised

WORDS = st.sampled_from(
    [
        *Recipe.__dataclass_fields__,
        "n_ctx",
        "ngl",
        "extra-args",
        "env",
        "envVars",
        "no_mmap",
        "mlock",
        "fa",
        "kvu",
        "lora_scaled",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.sampled_from(
    ["none", "auto", "all", "1,2", "10m", "8G", "a,b", "x:1", "q8_0", "on", "never", "{}"]
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(WORDS | st.sampled_from(["path", "scale", "nice", "memory_max", "A"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(value=st.dictionaries(WORDS | st.text(max_size=8), VALUES, max_size=6) | VALUES)
@settings(max_examples=600, deadline=None)
def test_any_structure_gives_recipes_or_faults(value: Any) -> None:
    """Whatever stands in a recipe, the outcome is a recipe or a printable fault, and a recipe has a hash."""
    if isinstance(value, dict):
        value = {"id": "m", "model_path": "/m"} | value
    document = Document("r.yaml", value, {(): 1})
    loaded = parse_recipes(document, default_id="r")
    found = build_catalogue(loaded.entries, loaded.faults)
    assert all(str(fault).isprintable() for fault in found.faults if fault.key is None)
    for entry in loaded.entries:
        assert recipe_hash(entry.recipe).startswith("sha256:")
        json.dumps(entry.recipe.as_dict(), allow_nan=False, default=str)


@given(text=st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_file_gives_recipes_or_faults(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever text stands in a file, nothing is raised."""
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, "utf-8", errors="surrogatepass", newline="")
    loaded = load_recipe_file(path)
    assert loaded.entries or loaded.faults
