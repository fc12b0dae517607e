"""A first look at what fits: ``llmstudioctl estimate`` on 40 GB with a vocabulary of 32k, whose weights are holes.

    python benchmarks/bench_estimate.py [--rounds 5]

The whole command, Python's start included; medians, beside an interpreter that does nothing.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.model_zoo import Model, write

LARGE = Model(layers=92, embd=4096, ff=14336, heads=32, kv_heads=8, head=128, vocab=32768)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="estimate-") as directory:
        path = Path(directory) / "large.gguf"
        write(path, LARGE)
        status = path.stat()
        print(f"{status.st_size / 1e9:.1f} GB, of which {status.st_blocks * 512 / 1e6:.1f} MB are on the disk")
        commands = {
            "python -c pass": ["-c", "pass"],
            "llmstudioctl estimate": ["-m", "llmstudiod.ctl.main", "estimate", str(path)],
        }
        for name, words in commands.items():
            took = [_timed([sys.executable, *words]) for _ in range(rounds)]
            print(f"  {name:<24}{1e3 * statistics.median(took):6.0f} ms (slowest {1e3 * max(took):.0f})")
    return 0


def _timed(argv: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, timeout=60)
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
