"""The JSON schema of recipes: it says what the reader says, for every field and every way in which one is written."""
# ruff: noqa: E501 - a table reads best with one case a line

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from llmstudiod.adapters.recipe_schema import DESCRIPTIONS, NAMES_OF_BINARIES, recipe_schema
from llmstudiod.core.flag_table import FLAGS
from llmstudiod.core.recipe import Limits, LoraAdapter, Recipe, Sandbox
from llmstudiod.core.recipe_names import ALIASES, FOREIGN, IGNORED
from llmstudiod.core.recipe_reader import parse_recipes
from llmstudiod.core.yaml_lines import Document, parse_document
from tests.unit.test_recipe_files import EXAMPLE

EXAMPLES = sorted((Path(__file__).parents[2] / "etc" / "recipes.d").iterdir())
SCHEMA = recipe_schema()
FIELDS: Mapping[str, Any] = SCHEMA["$defs"]["recipe"]["properties"]

# A validator for the keywords that the schema uses, and no others: an unknown keyword is a KeyError here.
_ANNOTATIONS = frozenset({"$schema", "$defs", "title", "description", "default", "examples", "deprecated", "then"})
_TYPES: Mapping[str, Any] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
}


def is_valid(value: Any, schema: Any = SCHEMA) -> bool:
    """Return whether ``value`` is an instance of ``schema``, as JSON Schema 2020-12 has it."""
    return all(_CHECKS[word](value, argument, schema) for word, argument in schema.items() if word not in _ANNOTATIONS)


def _same(value: Any, other: Any) -> bool:
    return bool(value == other and isinstance(value, bool) == isinstance(other, bool))


def _properties(value: Any, argument: Any) -> bool:
    return not isinstance(value, dict) or all(
        is_valid(value[name], inner) for name, inner in argument.items() if name in value
    )


def _others(value: Any, argument: Any, schema: Any) -> bool:
    others = set(value) - set(schema.get("properties", {})) if isinstance(value, dict) else set()
    return all(argument if isinstance(argument, bool) else is_valid(value[name], argument) for name in others)


_CHECKS: Mapping[str, Any] = {
    "$ref": lambda v, a, _: is_valid(v, SCHEMA["$defs"][a.removeprefix("#/$defs/")]),
    "type": lambda v, a, _: any(_TYPES[name](v) for name in ([a] if isinstance(a, str) else a)),
    "enum": lambda v, a, _: any(_same(v, item) for item in a),
    "const": lambda v, a, _: _same(v, a),
    "anyOf": lambda v, a, _: any(is_valid(v, inner) for inner in a),
    "not": lambda v, a, _: not is_valid(v, a),
    "if": lambda v, a, schema: not is_valid(v, a) or is_valid(v, schema["then"]),
    "required": lambda v, a, _: not isinstance(v, dict) or set(a) <= set(v),
    "properties": lambda v, a, _: _properties(v, a),
    "additionalProperties": _others,
    "propertyNames": lambda v, a, _: not isinstance(v, dict) or all(is_valid(name, a) for name in v),
    "items": lambda v, a, _: not isinstance(v, list) or all(is_valid(item, a) for item in v),
    "minItems": lambda v, a, _: not isinstance(v, list) or len(v) >= a,
    "maxItems": lambda v, a, _: not isinstance(v, list) or len(v) <= a,
    "minimum": lambda v, a, _: not _TYPES["number"](v) or v >= a,
    "maximum": lambda v, a, _: not _TYPES["number"](v) or v <= a,
    "minLength": lambda v, a, _: not isinstance(v, str) or len(v) >= a,
    "maxLength": lambda v, a, _: not isinstance(v, str) or len(v) <= a,
    # Python's $ also fits before a line break at the end, JavaScript's does not.
    "pattern": lambda v, a, _: not isinstance(v, str) or bool(re.search(re.sub(r"\$$", r"\\Z", a), v)),
}


def reader_accepts(value: Any) -> bool:
    """Return whether the daemon serves every recipe of a document."""
    text = json.dumps(value)
    document = parse_document(text, file="the-file.json")
    assert isinstance(document, Document), document
    loaded = parse_recipes(document, default_id="the-file")
    return bool(loaded.entries) and not loaded.faults


# Fields


def test_every_field_has_a_description_and_no_other_has() -> None:
    """What is added to the code must be told here."""
    inner = {"limits": Limits, "sandbox": Sandbox, "lora": LoraAdapter}
    names = {field.name for field in dataclasses.fields(Recipe)}
    names |= {f"{name}.{field.name}" for name, kind in inner.items() for field in dataclasses.fields(kind)}
    assert names == DESCRIPTIONS.keys()
    assert all(re.search(r"[.=]$", text) for text in DESCRIPTIONS.values())


def test_schema_names_every_field_and_spelling() -> None:
    """An editor offers each field, each alias, and says of foreign keys that they do nothing."""
    names = {field.name for field in dataclasses.fields(Recipe)} | ALIASES.keys() | IGNORED.keys() | FOREIGN.keys()
    assert FIELDS.keys() == names | set(NAMES_OF_BINARIES)
    for name in FIELDS:
        assert FIELDS[name]["description"]
    for name in {*IGNORED, *FOREIGN}:
        assert FIELDS[name]["deprecated"] is True


def test_schema_names_every_flag() -> None:
    """Under extra_args an editor offers llama-server's flags, and tells of the denied ones why."""
    flags = FIELDS["extra_args"]["properties"]
    for flag in FLAGS:
        for spelling in (*flag.names, *flag.negated):
            schema = flags[spelling.lstrip("-").replace("-", "_")]
            assert ("not" in schema) == bool(flag.denied), spelling
            assert flag.denied is None or flag.denied in schema["description"]


@pytest.mark.parametrize("key", NAMES_OF_BINARIES)
def test_names_of_binaries_are_those_of_the_reader(key: str) -> None:
    """What the schema forbids, the reader refuses."""
    value = {"model_path": "/m.gguf", key: "/bin/sh"}
    assert (is_valid(value), reader_accepts(value)) == (False, False)


def test_schema_is_plain_json() -> None:
    """It is printed as it is."""
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    assert recipe_schema() == SCHEMA


def test_schema_uses_only_keywords_that_are_checked_here() -> None:
    """Whatever the schema says, the tests below look at."""

    def walk(schema: Any) -> Iterator[str]:
        yield from schema
        for word in ("properties", "$defs"):
            for inner in schema.get(word, {}).values():
                yield from walk(inner)
        for inner in schema.get("anyOf", []):
            yield from walk(inner)
        for word in ("items", "not", "if", "then", "propertyNames", "additionalProperties"):
            if isinstance(schema.get(word), dict):
                yield from walk(schema[word])

    assert set(walk(SCHEMA)) <= _CHECKS.keys() | _ANNOTATIONS


# Whole files


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
@pytest.mark.parametrize("is_uncommented", [False, True])
def test_examples_are_valid(path: Path, is_uncommented: bool) -> None:
    """Each recipe that is installed, as it is and with every comment sign taken away; the daemon reads it too."""
    assert path.name.endswith(".yaml.disabled"), "an example must not be served"
    text = path.read_text()
    if is_uncommented:
        text = re.sub(r"^#(?! [A-Z])", "", text, flags=re.MULTILINE)
    document = parse_document(text, file=str(path))
    assert isinstance(document, Document), document
    loaded = parse_recipes(document, default_id=path.name.partition(".")[0])
    assert loaded.faults == ()
    assert [entry.warnings for entry in loaded.entries] == [()] * len(loaded.entries)
    assert is_valid(document.value)


def test_the_recipe_of_the_first_demand_is_valid() -> None:
    """The JSON with which it all began."""
    assert is_valid(json.loads(EXAMPLE))


ONE = {"id": "m", "model_path": "/m.gguf"}


@pytest.mark.parametrize(
    ("document", "is_good"),
    [
        (ONE, True),
        ({"model_path": "/m.gguf"}, True),
        ([ONE], True),
        ([{"model_path": "/m.gguf"}], True),
        ([ONE, {"id": "n", "model_path": "/n.gguf"}], True),
        ({"recipes": [ONE]}, True),
        ([], False),
        ({"recipes": []}, False),
        ([ONE, {"model_path": "/m.gguf"}], False),
        ({"id": "m"}, False),
        ({}, False),
        ("m", False),
        (None, False),
        (5, False),
    ],
)
def test_shapes_of_a_file(document: Any, is_good: bool) -> None:
    """One recipe, a list of them, vllm-studio's export: schema and reader agree."""
    assert (is_valid(document), reader_accepts(document)) == (is_good, is_good)


# Values: the schema and the reader agree on each line.

GOOD: Mapping[str, list[Any]] = {
    "id": ["m", "qwen3-32b.q4_k_m", None],
    "model_path": ["/m.gguf", "dir/m.gguf"],
    "name": ["A model", None],
    "description": ["two\nlines"],
    "tags": ["chat", ["chat", "code"], []],
    "backend": ["llamacpp"],
    "served_model_name": ["Qwen3 32B", "q"],
    "aliases": ["a", ["a", "b c"]],
    "default": [True, False, "yes", "off", None],
    "max_model_len": [1, 8192, 1 << 24, None],
    "max_num_seqs": [1, 256],
    "gpus": ["auto", "none", "", 0, "0,1", "GPU-11-22", [0, 1], ["GPU-1", "MIG-2"], "0, 1", None],
    "n_gpu_layers": [0, 99, "auto", "all"],
    "split_mode": ["none", "layer", "row", "tensor"],
    "tensor_split": [[3, 1], [0.5, 0.5], "3,1", "3/1"],
    "flash_attn": [True, "auto", "on", "off"],
    "cache_type_k": ["q8_0", "auto"],
    "load_mode": ["mmap+mlock"],
    "cache_ram": [0, 8192],
    "override_tensor": ["exps=CPU", ["a=CPU", "b=CPU"]],
    "spec_type": ["draft-simple", ["a", "b"]],
    "spec_draft_p_min": [0, 0.5, 1],
    "lora": ["/a.gguf", ["/a.gguf", {"path": "/b.gguf", "scale": 0.5}], {"path": "/b.gguf"}],
    "idle_timeout": [0, 30, 0.5, "10m", "1h 30m", "90", "500ms", "off", "never", False, "2 h"],
    "load_stall_timeout": [1, "5m"],
    "drain_timeout": [0, "1m", False],
    "restart": ["on-request", "always", "never"],
    "restart_limit": [0, 100],
    "restart_window": [1, "10m"],
    "priority": [-1000, 1000],
    "concurrency_limit": [1, 4096],
    "limits": [{}, {"memory_max": "8GiB"}, {"memory_max": "1.5G"}, {"memory_max": 1 << 20}, {"memory_max": "512 MiB"}, {"allowed_cpus": "0-7,16"}, {"allowed_cpus": 3}, {"allowed_cpus": [0, "2-3"]}, {"nice": -20, "tasks_max": 16, "cpu_weight": 1, "io_weight": 10000}, {"nice": None}, None],
    "sandbox": ["strict", {}, {"network": "host"}, {"writable_code": True}, {"shared_ipc": "yes", "scheduling": None}],
    "env_vars": [{}, {"GGML_VK_VISIBLE_DEVICES": 0, "X": True, "y": None, "Z": "text"}, None],
    "extra_args": [{}, {"top_k": 40}, {"temp": "0.7"}, {"temp": 1e-3}, {"warmup": False}, {"no_warmup": True}, {"ngl": "all"}, {"flash_attn": True}, {"samplers": "top_k;temp"}, {"override_kv": ["a=int:1", "b=int:2"]}, {"chat_template_kwargs": {"a": True}}, {"chat_template_kwargs": '{"a": true}'}, {"seed": False}, {"seed": None}, {"flag_of_tomorrow": [1, 2]}, {"lazy_mode": "auto"}, {"ctx_size": 4096}, None],
    "n_ctx": [4096],
    "kv_cache_dtype": ["q8_0", "auto"],
    "CUDA_VISIBLE_DEVICES": ["0,1"],
    "gpu_memory_utilization": [0.9],
    "host": ["0.0.0.0"],
    "no_such_key": ["anything", [1], {"a": 1}],
}  # fmt: skip

BAD: Mapping[str, list[Any]] = {
    "id": ["M", "a/b", "", "-a", 5, "x" * 64],
    "model_path": ["", None, 5, "/a\nb", []],
    "name": [5, "a\nb"],
    "tags": [5, [5]],
    "backend": ["vllm", True],
    "served_model_name": ["a,b", " a", "", 5, "a\n", "x" * 201],
    "aliases": ["a,b", ["a,b"], ["" ], 5, ["a"] * 101],
    "default": ["maybe", 2, []],
    "max_model_len": [0, -1, "4k", True, 1 << 25, [1]],
    "max_num_seqs": [0, 257],
    "gpus": ["first", "GPU_1", -1, 1000, [0, "x"], True, {"a": 1}],
    "n_gpu_layers": [-1, "most", True],
    "tensor_split": ["a,b", [-1], ["x"], 3],
    "flash_attn": ["maybe", 5],
    "cache_type_k": ["q9_9"],
    "load_mode": ["fast"],
    "spec_draft_p_min": [1.5],
    "lora": [5, [{"scale": 1}], [{"path": "/a", "weight": 1}], [{"path": "/a", "scale": None}], [{"path": "/a", "scale": 1001}]],
    "idle_timeout": ["soon", "10 parsecs", "1h 30", -1, True, [1], ""],
    "load_stall_timeout": [0, "off", False],
    "priority": [1001],
    "limits": [{"memory": "8G"}, {"memory_max": "lots"}, {"memory_max": 5}, {"memory_max": "8X"}, {"nice": 20}, {"allowed_cpus": "all"}, {"allowed_cpus": []}, [1], 5],
    "sandbox": ["off", {"netwrok": "host"}, {"network": "some"}, {"writable_code": "perhaps"}, 5],
    "env_vars": [{"LD_PRELOAD": "/x"}, {"ld_preload": "/x"}, {"PATH": "/x"}, {"a b": "x"}, {"A": [1]}, {"HF_HOME": "/x"}, "A=1", 5],
    "extra_args": [{"tools": "all"}, {"log_file": "/etc/x"}, {"rpc": "h:1"}, {"models_dir": "/x"}, {"host": "::"}, {"api_key": None}, {"top_k": "many"}, {"warmup": 5}, {"ngl": -1}, {"temp": [1]}, {"lazy_mode": "yes"}, "--top-k 40", [1]],
    "n_ctx": [0],
}  # fmt: skip

# The schema lets these through: a text of which only the daemon knows what it comes to.
LOOSER = {("load_stall_timeout", "off")}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in GOOD.items() for value in values])
def test_what_the_reader_accepts_is_valid(key: str, value: Any) -> None:
    """An editor marks nothing that the daemon takes."""
    recipe = {"model_path": "/m.gguf", key: value}
    assert (is_valid(recipe), reader_accepts(recipe)) == (True, True)


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_what_the_reader_refuses_is_invalid(key: str, value: Any) -> None:
    """An editor marks what the daemon leaves out."""
    recipe = {"model_path": "/m.gguf", key: value}
    assert not reader_accepts(recipe)
    assert is_valid(recipe) is ((key, value) in LOOSER if isinstance(value, str) else False)


def test_every_field_is_tried() -> None:
    """Fields that take a bare type are tried with it; the others stand in the tables above."""
    bare = {
        name
        for name, schema in FIELDS.items()
        if all(
            set(member) <= {"type", "minimum", "maximum", "pattern", "enum", "const"}
            for member in schema.get("anyOf", [{}])
        )
    }
    assert {field.name for field in dataclasses.fields(Recipe)} - bare <= GOOD.keys()
