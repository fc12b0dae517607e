"""What a model's process can reach, asked from inside its unit.

The probe runs with the very properties of a model's unit, taken from `llmstudioctl explain`; only the command differs.
It is a copy of Python below /usr/lib, since nothing else may be executed there.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Relative: without tests/__init__.py the absolute name differs between pytest and python -m.
from .conftest import install  # noqa: TID252
from .daemon import MODELS, RECIPES, Daemon, unit_of  # noqa: TID252
from .host import Host  # noqa: TID252

PYTHON = "/usr/lib/llmstudiod-probe/python3"
PROBE = r"""
import errno, json, mmap, os, resource, socket

def tried(function, *arguments):
    try:
        return repr(function(*arguments)) and "done"
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))

def connected(path):
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)

def executed(path):
    # With vfork(2) behind it an error of exec(2) comes back; a program that did start is found by its status 0.
    os.waitpid(os.posix_spawn(path, [path, "--version"], {}), 0)

def written(path):
    with open(path, "w") as file:
        file.write("#!/bin/sh\n")
    os.chmod(path, 0o755)
    return path

status = dict(line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\t" in line)
cache = os.environ["HOME"]
print("PROBE" + json.dumps({
    "model": {path: open(path, "rb").read(4).decode() for path in MODEL_FILES},
    "read": {path: tried(open, path, "rb") for path in FORBIDDEN_FILES},
    "list": {path: tried(os.listdir, path) for path in FORBIDDEN_DIRECTORIES},
    "connect": {path: tried(connected, path) for path in FORBIDDEN_SOCKETS},
    "execute": {path: tried(executed, path) for path in ["/bin/sh", "/usr/bin/llama-cli", "/usr/bin/id",
        written(cache + "/own"), written("/tmp/own")]},
    "write": {path: tried(written, path) for path in ["/usr/lib/x", "/etc/x", "/var/x", "/x", "/root/x", "/dev/shm/x",
        *(path + ".x" for path in MODEL_FILES)]},
    "families": {name: tried(socket.socket, getattr(socket, name)) for name in
        ["AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK", "AF_UNIX"]},
    "run": sorted(os.listdir("/run")),
    "runtime": sorted(os.listdir("/run/llmstudio-models")),
    "devices": sorted(os.listdir("/dev")),
    "processes": [int(name) for name in os.listdir("/proc") if name.isdigit()],
    "pid": os.getpid(),
    "uid": os.getuid(),
    "capabilities": [status[name] for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")],
    "no_new_privileges": status["NoNewPrivs"],
    "seccomp": status["Seccomp"],
    "namespaces": tried(os.unshare, os.CLONE_NEWUSER),
    "write_and_execute": tried(lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)),
    "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
    "environment": sorted(os.environ),
}), flush=True)
"""
FORBIDDEN_FILES = [
    f"{MODELS}/tiny.gguf", f"{MODELS}/probe.gguf", f"{RECIPES}/probe.yaml", "/etc/llmstudio/llmstudiod.yaml",
    "/srv/secret", "/root/secret", "/home/user/secret", "/proc/1/environ", "/etc/shadow", "/models/other.gguf",
    "/data/llm/other.gguf", "/mnt/secret", "/opt/secret", "/var/log/dpkg.log",
]  # fmt: skip
FORBIDDEN_DIRECTORIES = [
    "/root", "/srv", "/models", "/data/llm", "/opt", "/var/log", "/var/lib/llmstudio", "/etc/llmstudio",
    "/var/cache/private/llmstudio-models/tiny",
]  # fmt: skip
FORBIDDEN_SOCKETS = [
    "/run/llmstudio-models/tiny/llama.sock", "/run/llmstudio/admin.sock", "/run/dbus/system_bus_socket",
    "/run/systemd/private", "/run/systemd/journal/socket", "/run/systemd/io.systemd.ManagedOOM", "/run/systemd/notify",
]  # fmt: skip


@pytest.fixture(scope="module")
def seen(base_tree: Path, gguf_dir: Path) -> Iterator[dict[str, Any]]:
    """What the probe saw from inside the unit of the model ``probe`` while the model ``tiny`` was served."""
    with Host() as host:
        install(host)
        daemon = Daemon(host)
        for name in ("tiny", "probe"):
            host.put(gguf_dir / "tiny.gguf", f"{MODELS}/{name}.gguf")
        for path in FORBIDDEN_FILES:
            if "secret" in path or "other" in path:
                host.write(path, "secret")
        daemon.put_recipe({"id": "probe", "model_path": f"{MODELS}/probe.gguf"})
        daemon.use_settings(log_level="info", model_dirs=[MODELS, "/models", "/data/llm"])
        host.run("sh", "-c", f"mkdir -p {Path(PYTHON).parent} && cp -L /usr/bin/python3 {PYTHON}")
        daemon.listen()
        daemon.chat("tiny")
        argv = json.loads(daemon.ctl("explain", "--json", "probe"))["systemd_run"]
        files = [word for word in argv if word.startswith("/run/llmstudio-model/")]
        names = {
            "MODEL_FILES": files,
            "FORBIDDEN_FILES": FORBIDDEN_FILES,
            "FORBIDDEN_DIRECTORIES": FORBIDDEN_DIRECTORIES,
            "FORBIDDEN_SOCKETS": FORBIDDEN_SOCKETS,
        }
        code = "".join(f"{name} = {value!r}\n" for name, value in names.items()) + PROBE
        options = argv[1 : argv.index("--")]
        host.run("systemd-run", "--wait", *options, "--", PYTHON, "-I", "-c", code, check=False)
        told = host.journal(unit_of("probe"))
        line = next((line for line in told.splitlines() if line.startswith("PROBE")), None)
        assert line is not None, told
        security = host.run("systemd-analyze", "security", "--no-pager", unit_of("tiny")).stdout
        yield {**json.loads(line.removeprefix("PROBE")), "security": security}


def test_own_model_is_readable(seen: dict[str, Any]) -> None:
    """The one file of the host's that it needs is there, under a path of its own."""
    assert list(seen["model"].values()) == ["GGUF"]


@pytest.mark.parametrize("what", ["read", "list", "connect"])
def test_nothing_else_is_reachable(seen: dict[str, Any], what: str) -> None:
    """Other models, recipes, settings, homes, the bus, the admin socket and systemd's own cannot be opened."""
    assert {path: result for path, result in seen[what].items() if result not in _REFUSED} == {}


def test_run_holds_its_own_alone(seen: dict[str, Any]) -> None:
    """Below /run there is its socket's directory, its file, and nothing of anybody else's."""
    assert set(seen["run"]) <= {"llmstudio-model", "llmstudio-models", "systemd", "credentials"}
    assert seen["runtime"] == ["probe"]


def test_there_is_no_network(seen: dict[str, Any]) -> None:
    """No socket but a Unix one can be made."""
    families = seen["families"]
    assert families.pop("AF_UNIX") == "done"
    assert set(families.values()) <= {"EAFNOSUPPORT", "EPERM"}


def test_nothing_can_be_executed(seen: dict[str, Any]) -> None:
    """No shell, no other program, and nothing that it wrote itself."""
    assert set(seen["execute"].values()) <= _REFUSED
    assert seen["write_and_execute"] in {"EPERM", "EACCES"}


def test_nothing_of_the_system_can_be_written(seen: dict[str, Any]) -> None:
    """Only its cache and its temporary directory, which are its own, can."""
    outside = {path: result for path, result in seen["write"].items() if path != "/dev/shm/x"}
    assert set(outside.values()) <= _REFUSED | {"EROFS"}


def test_it_has_no_rights(seen: dict[str, Any]) -> None:
    """A user of its own, no capability, no way to get one, no namespaces."""
    assert seen["uid"] != 0
    assert {int(word, 16) for word in seen["capabilities"]} == {0}
    assert seen["no_new_privileges"] == "1"
    assert seen["seccomp"] == "2"
    assert seen["namespaces"] == "EPERM"
    assert seen["core"] == 0


def test_it_sees_itself_alone(seen: dict[str, Any]) -> None:
    """No process but its own, and no device that is not everybody's."""
    assert seen["processes"] == [seen["pid"]]
    pseudo = {"char", "core", "fd", "full", "hugepages", "log", "mqueue", "null", "ptmx", "pts", "random", "shm"}
    assert set(seen["devices"]) <= pseudo | {"stderr", "stdin", "stdout", "tty", "urandom", "zero"}


def test_environment_is_clean(seen: dict[str, Any]) -> None:
    """Nothing is in it that llama-server would take for a setting."""
    given = {name for name in seen["environment"] if name.startswith(("LLAMA_", "GGML_", "HF_"))}
    assert given == {"LLAMA_CACHE"}


def test_exposure_is_low(seen: dict[str, Any], record_property: Callable[[str, object], None]) -> None:
    """`systemd-analyze security` of a running model's unit says at most 0.3."""
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", seen["security"])
    assert found is not None, seen["security"]
    record_property("exposure", found[1])
    assert float(found[1]) <= 0.3, seen["security"]


_REFUSED = {"ENOENT", "EACCES", "EPERM", "ENOTDIR"}
