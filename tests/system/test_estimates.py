"""The estimator against the installed llama-server: what it logs of its memory, for models of many kinds."""

import itertools
from pathlib import Path

import pytest

from llmstudiod.adapters.gguf_file import read_header
from llmstudiod.core.memory import MIB, Run, compute_bytes, estimate
from llmstudiod.core.model_shape import ModelShape, model_shape
from tests.memory_cases import CASES, Told, told
from tests.model_zoo import ZOO, write

# Relative: without tests/__init__.py the absolute name differs between pytest and python -m.
from .host import Host  # noqa: TID252

# The log goes to a file: a server whose pipe nobody reads hangs, and does not mind that it is closed.
SCRIPT = """
cd /root; rm -f zoo.sock zoo.log
llama-server --host /root/zoo.sock -lv 4 --no-warmup -fit off "$@" >zoo.log 2>&1 &
for i in $(seq 1000); do
  grep -q "listening on" zoo.log && break
  kill -0 $! 2>/dev/null || break
  sleep 0.02
done
kill -KILL $!
cat zoo.log
"""
WITHIN = 0.06
DRY_RUN_COUNTS = {"mamba": 0.10, "qwen3moe": 0.06}  # a formula that is not validated, so its error may be larger


@pytest.fixture(scope="module")
def zoo(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, whose weights are holes, shown inside the host."""
    directory = tmp_path_factory.mktemp("zoo")
    for name, model in ZOO.items():
        write(directory / f"{name}.gguf", model)
    host.bind(directory, "/mnt")
    return directory


# llama.cpp refuses keys and values of two types for latent attention, which has no values of its own.
PAIRS = [(name, flags) for name, flags in itertools.product(ZOO, CASES) if not ("mla" in name and "iq4_nl" in flags)]


@pytest.mark.parametrize(("name", "flags"), PAIRS)
def test_estimate_is_what_llama_server_counts(host: Host, zoo: Path, name: str, flags: str) -> None:
    """KV to the rounding of its log, weights likewise, compute buffers within 6 %, and so is the total."""
    seen = _run(host, name, flags)
    shape, run = _shape(zoo / f"{name}.gguf"), Run(**CASES[flags])
    need = estimate(shape, run)
    assert need.kv / MIB == pytest.approx(seen.cache, abs=0.006 * seen.lines)
    assert need.host.weights / MIB == pytest.approx(seen.model, abs=0.02)
    assert compute_bytes(shape, run) / MIB == pytest.approx(seen.compute, rel=DRY_RUN_COUNTS.get(name, WITHIN))
    total = need.host.weights + need.kv + compute_bytes(shape, run)
    assert total / MIB == pytest.approx(seen.model + seen.cache + seen.compute, rel=WITHIN)


def _shape(path: Path) -> ModelShape:
    header = read_header(path)
    shape = model_shape(header.metadata, header.tensors)
    assert shape is not None
    return shape


def _run(host: Host, name: str, flags: str) -> Told:
    """Return what the log says until the model is loaded."""
    done = host.run("bash", "-c", SCRIPT, "_", "-m", f"/mnt/{name}.gguf", *flags.split(), timeout=60)
    assert "listening on" in done.stdout, done.stdout[-2000:]
    return told(done.stdout.splitlines())
