"""Four GPUs that there are not, in a booted host: what NVML tells of them, and a llama-server that takes their memory.

Both live by files below /dev/shm, which the daemon and the models' units share with everybody, and may write to: the
scenario of `tests/data/stub_nvml.c`, and table and refusals of `tests/data/gpu_server.c`.
"""

import contextlib
import fcntl
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

import gguf

from llmstudiod.demo.tiny_gguf import TinyModel, write_tiny_gguf
from tests.integration.nvml_stub import GIB, SOURCE, build_library, gpu, uuid

# Relative: without tests/__init__.py the absolute name differs between pytest and python -m.
from .conftest import DIST_PACKAGES, give_up  # noqa: TID252
from .daemon import MODELS, Daemon  # noqa: TID252
from .host import Host  # noqa: TID252

SIZES_GIB = (2, 3, 4, 6)
RESERVED_BYTES = 512 << 20  # what llmstudiod leaves free on each GPU
RUNTIME_BYTES = 300 << 20  # less than the 512 MiB that llmstudiod counts
SHARED = "/dev/shm/llmstudio-gpus"
SERVER = "/opt/gpu-server/llama-server"
UBATCH = 512
DROP_IN = f"[Service]\nEnvironment=STUB_NVML={SHARED}/scenario\n"
# What NVIDIA's driver shows; the minor number is that of the device node.
INFORMATION = "Model: \t\t NVIDIA Test\nGPU UUID: \t {uuid}\nBus Location: \t {bus}\nDevice Minor: \t {minor}\n"


def node(number: int) -> str:
    """Return the device node of a GPU, whose number is not the GPU's own."""
    return f"/dev/nvidia{minor(number)}"


def minor(number: int) -> int:
    """Return the minor number that `tests.integration.nvml_stub.gpu` gives to a GPU."""
    return 7 - number


def install_gpus(host: Host, scratch: Path) -> None:
    """Put driver, device nodes and the program into a host that has llmstudiod; once for a host."""
    build_library(scratch)
    compiler = shutil.which("cc")
    assert compiler is not None, "build_library skips the test where there is none"
    source = SOURCE.with_name("gpu_server.c")
    argv = [compiler, "-O1", "-Wall", "-o", str(scratch / "llama-server"), str(source)]
    subprocess.run(argv, check=True, timeout=60)
    multiarch = host.run("python3", "-c", "import sysconfig; print(sysconfig.get_config_var('MULTIARCH'))").stdout
    host.put(scratch / "libnvidia-ml.so.1", f"/usr/lib/{multiarch.strip()}/libnvidia-ml.so.1")
    if host.run("python3", "-c", "import pynvml", check=False).returncode != 0:
        _put_bindings(host)
    host.put(scratch / "llama-server", SERVER)
    # What lies beside the program may be executed in the models' sandbox.
    host.run("cp", "/usr/bin/llama-server", str(Path(SERVER).with_name("real-llama-server")))
    _make_nodes(host)
    host.run("install", "-d", SHARED)
    # A unit has a user of its own: everybody may write.
    host.run("sh", "-c", f"cd {SHARED} && touch scenario table refusals && chmod 666 *")
    host.write("/etc/systemd/system/llmstudiod.service.d/gpus.conf", DROP_IN)
    host.run("systemctl", "daemon-reload")


def _put_bindings(host: Host) -> None:
    """Debian has them in contrib, so they are not in the base tree: one file of Python."""
    try:
        import pynvml
    except ImportError:
        give_up("pynvml is not installed; run: pip install nvidia-ml-py")
    host.put(Path(str(pynvml.__file__)), f"{DIST_PACKAGES}/pynvml.py")


def _make_nodes(host: Host) -> None:
    """Nobody opens them, so the driver need not be there; procfs has a directory on which its files can be shown."""
    lines = ["mknod -m 666 /dev/nvidiactl c 195 255", "mknod -m 666 /dev/nvidia-uvm c 511 0"]
    lines += [f"mknod -m 666 {node(number)} c 195 {minor(number)}" for number in range(len(SIZES_GIB))]
    lines.append("mount -t tmpfs -o mode=755 tmpfs /proc/driver")
    host.run("sh", "-ec", "\n".join(lines))
    for number in range(len(SIZES_GIB)):
        bus = f"0000:{0x10 * (number + 1):02x}:00.0"
        text = INFORMATION.format(uuid=uuid(number), bus=bus, minor=minor(number))
        host.write(f"/proc/driver/nvidia/gpus/{bus}/information", text)


@dataclass(frozen=True)
class Model:
    """A model and its recipe. What it takes of a GPU's memory is nearly all KV cache, so its file is small.

    ``runtime`` is what its server takes on each GPU beside its buffers, ``load_s`` how long it loads once it has taken
    them; ``recipe`` whatever else its recipe says.
    """

    id: str
    n_layers: int
    n_ctx: int
    n_seq: int = 2
    n_embd: int = 256
    runtime: int = RUNTIME_BYTES
    load_s: float = 0.2
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kv_of_a_layer(self) -> int:
        """Keys and values in f16, as wide as the model, for each token of each slot."""
        return 2 * (self.n_embd + self.n_embd) * self.n_ctx * self.n_seq

    @property
    def compute(self) -> int:
        """Intermediate results of a micro-batch: the feed-forward part, twice as wide as the model, and the mask."""
        return UBATCH * (4 * (3 * 2 * self.n_embd + 5 * self.n_embd) + 2 * self.n_ctx)

    def write(self, directory: Path) -> Path:
        """Write the GGUF."""
        path = directory / f"{self.id}.gguf"
        shape = TinyModel(
            name=self.id, n_layers=self.n_layers, n_embd=self.n_embd, n_head_kv=4, context_length=self.n_ctx
        )
        write_tiny_gguf(path, shape)
        return path

    def recipe_values(self) -> dict[str, Any]:
        """Return its recipe."""
        return {
            "id": self.id, "model_path": f"{MODELS}/{self.id}.gguf", "max_model_len": self.n_ctx,
            "max_num_seqs": self.n_seq, "n_gpu_layers": "all", "cache_ram": 0, "idle_timeout": 0,
            "threads": 1,  # several threads of several servers wait for each other on a machine of two cores
            **self.recipe,
        }  # fmt: skip

    def table_line(self, path: Path) -> str:
        """Return its line of the table: what is in its file, and the arithmetic above."""
        sizes = {str(tensor.name): int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
        weights = sum(size for name, size in sizes.items() if name.startswith("blk.0."))
        output = sum(size for name, size in sizes.items() if name.startswith("output"))
        host = UBATCH * (4 * self.n_embd + 2 * self.n_ctx)
        numbers = (self.n_layers, self.runtime, self.compute, host, weights, self.kv_of_a_layer, output)
        return f"model {self.id} {' '.join(map(str, numbers))} {round(1000 * self.load_s)}\n"


@dataclass(frozen=True)
class Held:
    """What a process holds on a GPU; ``is_alive`` False: it has gone, and its memory follows within a second."""

    number: int
    pid: int
    size: int
    is_alive: bool


class Gpus:
    """The GPUs of a host, as the daemon in it sees them, with nobody on them."""

    def __init__(self, daemon: Daemon, scratch: Path) -> None:
        self.daemon = daemon
        self._scratch = scratch
        self._shared = daemon.host.path(SHARED)
        self._root = daemon.host.path("/")
        with self._locked() as scenario:
            scenario.truncate()
            scenario.write("".join(gpu(number, gib) for number, gib in enumerate(SIZES_GIB)))
        (self._shared / "table").write_text("")
        (self._shared / "refusals").write_text("")

    @property
    def refusals(self) -> list[str]:
        """The lines of those who found too little memory."""
        return (self._shared / "refusals").read_text().splitlines()

    def put(self, *models: Model) -> None:
        """Put models, their recipes and their lines of the table in place."""
        with (self._shared / "table").open("a") as table:
            for model in models:
                path = model.write(self._scratch)
                self.daemon.host.put(path, f"{MODELS}/{model.id}.gguf")
                self.daemon.put_recipe(model.recipe_values())
                table.write(model.table_line(path))

    def take(self, number: int, *, pid: int, size: int) -> None:
        """Let another program hold memory of a GPU."""
        with self._locked() as scenario:
            scenario.seek(0, 2)
            scenario.write(f"used {number} {size}\nproc {number} compute {pid} {size}\n")

    def held(self) -> list[Held]:
        """Return who holds what, and note who has gone: whoever first sees it does, as stub and server do."""
        found = []
        with self._locked() as scenario:
            now = time.monotonic_ns() // 1_000_000
            lines, at = scenario.read().splitlines(keepends=True), 0
            for line in lines:
                at += len(line)
                if not line.startswith("lease "):
                    continue
                number, pid, size, dead_since = map(int, line.split()[1:])
                is_alive = not dead_since and (self._root / "proc" / str(pid)).exists()
                if not is_alive and not dead_since:
                    dead_since = now
                    scenario.seek(at - 16)
                    scenario.write(f"{now:015d}\n")
                if is_alive or now < dead_since + 1000:
                    found.append(Held(number, pid, size, is_alive))
        return found

    @contextlib.contextmanager
    def _locked(self) -> Iterator[IO[str]]:
        with (self._shared / "scenario").open("r+") as scenario:
            fcntl.flock(scenario, fcntl.LOCK_EX)
            yield scenario


class Watch:
    """Looks twenty times a second at who holds what, in a thread; ``over`` tells each time that it was too much."""

    def __init__(self, gpus: Gpus) -> None:
        self.over: list[str] = []
        self.most = [0] * len(SIZES_GIB)
        self.looks = 0
        self._gpus = gpus
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._is_done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_done.wait(0.05):
            self.look()

    def look(self) -> None:
        """Add up what is held on each GPU, by those who are going too."""
        self.looks += 1
        held = self._gpus.held()
        for number, gib in enumerate(SIZES_GIB):
            here = [each for each in held if each.number == number]
            total = sum(each.size for each in here)
            self.most[number] = max(self.most[number], total)
            if total > gib * GIB - RESERVED_BYTES:
                self.over.append(f"GPU {number}: {total / GIB:.2f} of {gib} GiB: {here}")
