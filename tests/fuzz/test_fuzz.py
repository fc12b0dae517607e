"""The targets with inputs that nearly are what they should be. ``--hypothesis-profile=fuzz`` tries 100,000 of each."""

import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmstudiod.core.launcher_protocol import Verb
from llmstudiod.core.recipe import Recipe
from tests.fuzz.targets import Launcher, new_launcher, read_recipe

pytestmark = pytest.mark.timeout(3600)  # 100,000 inputs take a quarter of an hour
HASH = "sha256:" + "0" * 64
WORDS = st.sampled_from(
    [
        "m",
        "../x",
        HASH,
        "/etc/shadow",
        "/models/m.gguf",
        "m.yaml",
        "GPU-1",
        "id: m\nmodel_path: /m.gguf\n",
        "[]",
        "true",
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
KEYS = st.sampled_from(["id", "hash", "file", "model", "n_ctx_train", "memory_max", "gpus", "name", "text", "argv"])
REQUESTS = st.builds(
    lambda verb, rest: json.dumps({"verb": verb, **rest}).encode(),
    st.sampled_from([*Verb]) | JSON,
    st.dictionaries(KEYS, JSON, max_size=6),
)
FIELDS = st.sampled_from([*Recipe.__dataclass_fields__, "n_ctx", "ngl", "backend", "extra_args", "unknown"])
RECIPES = st.dictionaries(FIELDS, JSON, max_size=8)
RECIPE_FILES = (RECIPES | st.lists(RECIPES, max_size=3)).map(lambda value: json.dumps(value).encode())
TEXTS = st.text(alphabet="abc:-[]{},'\"#&*!|>%@`\n\t \\é\0", max_size=80).map(str.encode)


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    """A launcher that can start nothing, and would be seen to try."""
    with pytest.MonkeyPatch.context() as patch:
        from llmstudiod.privileged import units

        patch.setattr(units, "_run", units._run)
        yield new_launcher()


@given(line=REQUESTS | st.binary(max_size=200))
def test_launcher_refuses_or_does_nothing(launcher: Launcher, line: bytes) -> None:
    """No traceback, nothing started."""
    launcher.take(line)


@given(raw=RECIPE_FILES | TEXTS | st.binary(max_size=200))
def test_recipe_loader_tells_faults(raw: bytes) -> None:
    """Whatever stands in a file."""
    read_recipe(raw)
