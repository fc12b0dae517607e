"""Reading the header of a model with a large vocabulary, beside gguf.GGUFReader.

Each round reads the same file once in a fresh process for each reader, which tells the time of the reading alone and
the peak of the whole process, imports included. Interleaved rounds, medians.

    python benchmarks/bench_gguf_header.py [--rounds 5] [--tokens 150000]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

OURS = "from llmstudiod.adapters.gguf_file import read_header; read = lambda path: len(read_header(path).tensors)"
THEIRS = "import gguf; read = lambda path: len(gguf.GGUFReader(path).tensors)"
TIMED = """
import json, sys, time
from pathlib import Path
{imports}
began = time.perf_counter()
tensors = read(Path(sys.argv[1]))
seconds = time.perf_counter() - began
# Not ru_maxrss, which begins with that of whoever started the process.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps([seconds, int(peak.split()[1]), tensors]))
"""


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=150_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="header-") as directory:
        path = _write(Path(directory) / "model.gguf", arguments.tokens)
        print(f"{path.stat().st_size / 1e6:.1f} MB, {arguments.tokens} tokens and as many merges")
        rounds: dict[str, list[tuple[float, float]]] = {"llmstudiod": [], "gguf.GGUFReader": []}
        for number in range(arguments.rounds):
            for name, imports in (("llmstudiod", OURS), ("gguf.GGUFReader", THEIRS)):
                rounds[name].append(_read(imports, path))
            told = ", ".join(f"{name} {1e3 * each[-1][0]:.0f} ms" for name, each in rounds.items())
            print(f"round {number + 1}: {told}")
    print(f"\nmedians of {arguments.rounds}")
    medians = {name: [statistics.median(column) for column in zip(*each, strict=True)] for name, each in rounds.items()}
    for name, (seconds, mib) in medians.items():
        print(f"  {name:<18}{1e3 * seconds:8.0f} ms {mib:8.1f} MiB at its peak")
    ours, theirs = medians.values()
    print(f"  time {theirs[0] / ours[0]:.0f} x, memory {theirs[1] / ours[1]:.0f} x")
    return 0


def _read(imports: str, path: Path) -> tuple[float, float]:
    """Return seconds, and MiB of the process at its peak."""
    argv = [sys.executable, "-c", TIMED.format(imports=imports), str(path)]
    seconds, kib, _ = json.loads(subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout)
    return seconds, kib / 1024


def _write(path: Path, tokens: int) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(32)
    writer.add_embedding_length(4096)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token{number}" for number in range(tokens)])
    writer.add_token_scores([0.5] * tokens)
    writer.add_token_types([1] * tokens)
    writer.add_token_merges([f"left{number} right{number}" for number in range(tokens)])
    for layer in range(32):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", np.ones(4096, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


if __name__ == "__main__":
    sys.exit(main())
