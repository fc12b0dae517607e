"""What the launcher takes for a request: a closed set of keys and values, and nothing else."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmstudiod.core.errors import BadRequestError
from llmstudiod.core.launcher_protocol import (
    MAX_REQUEST_BYTES,
    Act,
    Launch,
    Request,
    Verb,
    Write,
    parse_request,
    write_request,
)

HASH = "sha256:" + "0" * 64
LAUNCH = {
    "verb": "start",
    "id": "m",
    "hash": HASH,
    "file": "/etc/llmstudio/recipes.d/m.yaml",
    "model": "/models/m.gguf",
}
REQUESTS: list[Request] = [
    Launch(Verb.START, "m", HASH, "/etc/llmstudio/recipes.d/m.yaml", "/models/m.gguf", 4096, 1 << 30, ("GPU-1a-2b",)),
    Launch(Verb.SHOW, "qwen3-32b.q4_k", HASH, None, "/models/x y.gguf"),
    Launch(Verb.CHECK, "m", HASH, None, "/m.gguf", max_num_seqs=2, tensor_split=(3, 1)),
    Launch(Verb.DRY_RUN, "m", HASH, None, "/m.gguf"),
    Act(Verb.STOP, "m"),
    Act(Verb.KILL, "m"),
    Act(Verb.PROBE),
    Write(Verb.PUT_RECIPE, "m.yaml", "id: m\nmodel_path: /m.gguf\n"),
    Write(Verb.DELETE_RECIPE, "m.json"),
    Write(Verb.PUT_KEYS, text="[]"),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: str(request.verb))
def test_request_is_read_as_it_was_written(request_: Request) -> None:
    """Each is one line, and nothing of it is lost."""
    line = write_request(request_)
    assert line.count(b"\n") == 1
    assert parse_request(line.rstrip(b"\n")) == request_


def test_every_verb_is_tried_here() -> None:
    """A new one has to come into the list above."""
    assert {request.verb for request in REQUESTS} == set(Verb)


def launch(**changes: object) -> bytes:
    """A start with other or more keys; ``...`` takes one away."""
    values = {name: value for name, value in {**LAUNCH, **changes}.items() if value is not ...}
    return json.dumps(values).encode()


HOSTILE = [
    # Not even a request
    (b"", "one line of JSON"),
    (b"\xff", "one line of JSON"),
    (b"[]", "JSON object"),
    (b'"start"', "JSON object"),
    (b"{" * 100_000, "one line of JSON"),
    (b'{"verb":"start","verb":"stop"}', "given twice"),
    (b'{"verb":"stop","id":NaN}', "NaN is no number"),
    (b"x" * (MAX_REQUEST_BYTES + 1), "at most"),
    # Verbs and keys
    (b"{}", "expected a verb"),
    (b'{"verb":null}', "expected a verb"),
    (b'{"verb":["start"]}', "expected a verb"),
    (b'{"verb":"exec","argv":["/bin/sh"]}', "expected a verb"),
    (b'{"verb":"START"}', "expected a verb"),
    (b'{"verb":"stop"}', "expected a key 'id'"),
    (launch(argv=["/bin/sh"]), "expected no key 'argv'"),
    (launch(binary="/bin/sh"), "expected no key 'binary'"),
    (launch(environment={"LD_PRELOAD": "/x"}), "expected no key 'environment'"),
    (launch(properties=["User=root"]), "expected no key 'properties'"),
    (launch(sandbox={"network": "host"}), "expected no key 'sandbox'"),
    (launch(file=...), "expected a key 'file'"),
    (b'{"verb":"probe","id":"m"}', "expected no key 'id'"),
    (b'{"verb":"put-keys","text":"","name":"/etc/shadow"}', "expected no key 'name'"),
    # Ids name units
    *((json.dumps({"verb": "stop", "id": bad}).encode(), "id: expected an id") for bad in (
        "", ".", "..", "../evil", "a/b", "a b", "a\n", "A", "-a", "a@b", "a\x00", "x" * 64, "m.service --now", "é", 5,
        None, ["m"], {"a": 1}, True,
    )),
    (launch(id="m\nUser=root"), "id: expected an id"),
    # Hashes, paths
    (launch(hash="sha256:" + "0" * 63), "hash: expected"),
    (launch(hash="md5:0"), "hash: expected"),
    (launch(hash=HASH + "\n"), "hash: expected"),
    *((launch(file=bad), "file: expected") for bad in (
        "m.yaml", "", "/etc/llmstudio/../shadow", "/etc//llmstudio/m.yaml", "//etc/m.yaml", "/etc/a\nb.yaml", "/a\x00b",
        "/etc/llmstudio/", "/etc/llmstudio/recipes.d/m.yaml.disabled", "/etc/llmstudio/recipes.d/m.yaml~",
        "/etc/llmstudio/recipes.d/.m.yaml", "/etc/llmstudio/recipes.d/m.yaml.dpkg-old",
        "/" + "x" * 5000, 5, ["/etc/m.yaml"], "/\ud800",
    )),
    (launch(model=None), "model: expected"),
    (launch(model="m.gguf"), "model: expected"),
    (launch(model="/models/./m.gguf"), "model: expected"),
    # Numbers and GPUs
    *((launch(n_ctx_train=bad), "n_ctx_train: expected") for bad in (0, -1, 1 << 40, 1.5, "1", True, [1])),
    *((launch(max_model_len=bad), "max_model_len: expected") for bad in (0, -1, 1 << 25, "1", True)),
    *((launch(n_gpu_layers=bad), "n_gpu_layers: expected") for bad in (-1, 4097, "all", True, 1.0)),
    *((launch(tensor_split=bad), "tensor_split: expected") for bad in (
        None, 1, "1,2", [-1], [4097], [1.5], ["1"], [True], [1] * 65, [[1]], {"0": 1},
    )),
    *((launch(cache_ram=bad), "cache_ram: expected") for bad in (-1, 1 << 25, 1.5, "1")),
    *((launch(memory_max=bad), "memory_max: expected") for bad in (-1, 1 << 61, None, "1G")),
    *((launch(gpus=bad), "gpus: expected") for bad in (
        "GPU-1", [0], ["0"], ["GPU-"], ["GPU-1\n"], ["GPU-../../x y"], ["GPU-1"] * 65, [["GPU-1"]], {"GPU-1": 1},
    )),
    # Files to be written
    *((json.dumps({"verb": "put-recipe", "name": bad, "text": ""}).encode(), "name: expected") for bad in (
        "../m.yaml", "/etc/passwd", "m", "m.txt", ".m.yaml", "a/b.yaml", "m.yaml\n", "m.yaml.d/x.yaml/", "",
        None, "é.yaml", "x" * 200 + ".yaml",
    )),
    (json.dumps({"verb": "put-recipe", "name": "m.yaml", "text": "x" * ((1 << 20) + 1)}).encode(), "text: expected"),
    (b'{"verb":"put-recipe","name":"m.yaml","text":"\\ud800"}', "text: expected"),
    (b'{"verb":"put-keys","text":[]}', "text: expected"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "says"), HOSTILE, ids=lambda value: repr(value)[:60])
def test_hostile_request_is_refused(line: bytes, says: str) -> None:
    """The answer says what was found and what was expected, in a line that is safe to print."""
    with pytest.raises(BadRequestError) as caught:
        parse_request(line)
    assert says in caught.value.message
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 500


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
KEYS = st.sampled_from(
    ["verb", "id", "hash", "file", "model", "n_ctx_train", "memory_max", "gpus", "name", "text", "x"]
)
NEARLY = st.dictionaries(KEYS, JSON | st.sampled_from([*Verb, *LAUNCH.values()]), max_size=8)


@given(
    st.binary(max_size=200)
    | JSON.map(lambda value: json.dumps(value).encode())
    | NEARLY.map(lambda value: json.dumps(value).encode())
)
def test_any_input_is_a_request_or_is_refused(line: bytes) -> None:
    """Nothing else is raised, and what is taken can be written again."""
    try:
        request = parse_request(line)
    except BadRequestError:
        return
    assert parse_request(write_request(request).rstrip(b"\n")) == request
