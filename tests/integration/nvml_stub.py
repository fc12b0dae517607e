"""GPUs that there are not: a libnvidia-ml.so.1 compiled from tests/data/stub_nvml.c, and what it is to answer."""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmstudiod.core.devices import Machine

GIB = 1 << 30
SOURCE = Path(__file__).parents[1] / "data" / "stub_nvml.c"

# Each measurement of one process follows another scenario, and all of them answer to the same Devices.
_MEASURE = """
import pickle, shutil, sys
from pathlib import Path
from llmstudiod.adapters.devices import Devices
root, current, patience, *scenarios = sys.argv[1:]
devices, machines = Devices(root=Path(root), patience_s=float(patience)), []
for scenario in scenarios:
    shutil.copy(scenario, current)
    machines.append(devices.measure())
pickle.dump(machines, sys.stdout.buffer)
"""


def build_library(directory: Path) -> Path:
    """Compile the library into a directory, which goes into LD_LIBRARY_PATH."""
    compiler = shutil.which("cc")
    if compiler is None:
        if os.environ.get("LLMSTUDIO_TEST_REQUIRE_ALL") == "1":
            pytest.fail("there is no C compiler (cc) for the stub of NVML")
        pytest.skip("there is no C compiler (cc) for the stub of NVML")
    argv = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", str(directory / "libnvidia-ml.so.1"), str(SOURCE)]
    subprocess.run(argv, check=True, timeout=60)
    return directory


def gpu(
    number: int, gib: int, *, free: int | None = None, bus: int | None = None, more: str = "30 45 70500 300000"
) -> str:
    """Return the line of a GPU; the numbers of its device node and of its UUID differ from its own."""
    place = 0x10 * (number + 1) if bus is None else bus
    left = gib * GIB if free is None else free
    return f"gpu {place:x} {gib * GIB} {left} {more} {7 - number} {uuid(number)} NVIDIA Test {gib}G\n"


def uuid(number: int) -> str:
    """Return the UUID of a GPU."""
    return f"GPU-{number:08d}-0000-0000-0000-000000000000"


@dataclass
class Bench:
    """A directory with the library, a root in place of /, and scenarios."""

    home: Path
    library: Path
    patience_s: float = 10.0

    @property
    def root(self) -> Path:
        """What stands for /."""
        (self.home / "root").mkdir(exist_ok=True)
        return self.home / "root"

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables with which a process loads the stub."""
        return {"LD_LIBRARY_PATH": str(self.library), "STUB_NVML": str(self.home / "scenario")}

    @property
    def calls(self) -> list[str]:
        """How often the library was initialised and shut down."""
        return (self.home / "scenario.calls").read_text().split()

    def put(self, path: str, text: str = "") -> None:
        """Write a file below the root."""
        at = self.root / path
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_text(text)

    def measure(self, *scenarios: str, environment: Mapping[str, str] | None = None) -> list[Machine]:
        """Return what a process measures that sees these scenarios, one after the other."""
        paths = []
        for number, text in enumerate(scenarios):
            path = self.home / f"scenario-{number}"
            path.write_text(text)
            paths.append(str(path))
        argv = [
            sys.executable,
            "-c",
            _MEASURE,
            str(self.root),
            str(self.home / "scenario"),
            str(self.patience_s),
            *paths,
        ]
        done = subprocess.run(
            argv, env={**os.environ, **(environment or self.environment)}, capture_output=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        machines: list[Machine] = pickle.loads(done.stdout)
        return machines
