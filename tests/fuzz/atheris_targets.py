"""Coverage-guided fuzzing: ``python -m tests.fuzz.atheris_targets launcher|recipe [-runs=100000]``."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["llmstudiod", "json", "yaml"]):
    from llmstudiod.core.launcher_protocol import Act, Launch, Request, Verb, Write, write_request
    from tests.fuzz.targets import new_launcher, read_recipe

HASH = "sha256:" + "0" * 64
REQUESTS: list[Request] = [
    Launch(Verb.START, "m", HASH, "/etc/llmstudio/recipes.d/m.yaml", "/models/m.gguf", 4096, 1 << 30, ("GPU-1",)),
    Launch(Verb.CHECK, "m", HASH, None, "/models/m.gguf"),
    Act(Verb.STOP, "m"),
    Act(Verb.PROBE),
    Write(Verb.PUT_RECIPE, "m.yaml", "id: m\nmodel_path: /models/m.gguf\n"),
    Write(Verb.DELETE_RECIPE, "m.yaml"),
    Write(Verb.PUT_KEYS, text='[{"name": "a", "hash": "' + HASH + '"}]'),
]
RECIPES = [
    b"id: m\nmodel_path: /m.gguf\nmax_model_len: 4096\ngpus: [0]\nsandbox: {network: host}\n",
    b'{"id":"m","model_path":"/m.gguf","extra_args":{"top_k":40},"env_vars":{"A":"b"},"limits":{"memory_max":"1G"}}',
    b"- id: a\n  model_path: /a.gguf\n- id: b\n  model_path: /b.gguf\n  aliases: [c, d]\n",
]


def main(name: str, options: list[str]) -> None:
    """Fuzz one target, from requests or recipes that are good."""
    targets: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
        "launcher": (new_launcher().take, [write_request(request).rstrip(b"\n") for request in REQUESTS]),
        "recipe": (read_recipe, RECIPES),
    }
    target, seeds = targets[name]
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds):
            Path(corpus, str(number)).write_bytes(seed)
        atheris.Setup([sys.argv[0], *options, corpus], target)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
