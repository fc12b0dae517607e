"""The Debian package and `make install`, from building to purging, in hosts that have no network.

The package is built once for the module, from this working tree. What it needs is in the base tree already.
"""

import http.client
import json
import os
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

import pytest

# Relative: without tests/__init__.py the absolute name differs between pytest and python -m.
from .conftest import REPOSITORY, give_up  # noqa: TID252
from .daemon import MODELS, SERVICE, SOCKETS, Daemon, unit_of, wait_until  # noqa: TID252
from .host import Host  # noqa: TID252

LAUNCHER = "llmstudio-launcher.service"
UNIT = unit_of("tiny")
NEWER = "999.0"
CHAT = json.dumps({"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "a bird"}]})
CURL = ("curl", "-sS", "-m", "60", "-H", "Content-Type: application/json", "-d", CHAT)
URL = "http://127.0.0.1:8080/v1/chat/completions"
# apt and dpkg keep books of what they did; Debian leaves users, since files may still be theirs.
BOOKS = ("/var/log/", "/var/cache/apt/", "/var/cache/debconf/", "/var/lib/apt/", "/var/lib/dpkg/", "/var/lib/systemd/")
BACKUPS = ("/etc/passwd-", "/etc/shadow-", "/etc/group-", "/etc/gshadow-", "/etc/.pwd.lock")


def build(*options: str, out: Path, root: Path = REPOSITORY, **environment: str) -> Path:
    """Build the package and return its path."""
    command = [str(root / "packaging/deb/build"), *options]
    whole = os.environ | {"LLMSTUDIO_DIST": str(out)} | environment
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=whole)
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(done.stdout.splitlines()[-1])


def files_of(host: Host) -> set[str]:
    """Return all that is in the host's file tree, but for what lives in memory."""
    skipped = [word for path in ("/proc", "/sys", "/dev", "/tmp") for word in ("-path", path, "-o")]
    output = host.run("find", "/", "(", *skipped[:-1], ")", "-prune", "-o", "-print").stdout
    return set(output.splitlines())


def apt(host: Host, *words: str) -> str:
    """Run apt-get without questions and return what it said."""
    done = host.run("apt-get", "-qq", "-y", *words, env={"DEBIAN_FRONTEND": "noninteractive"}, timeout=180)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def build_tree(base_tree: Path) -> Path:
    """The clean tree with the build dependencies, made if need be."""
    command = [str(REPOSITORY / "packaging/deb/build"), "--tree"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        give_up(f"the build tree cannot be made: {done.stderr.strip()[-2000:]}")
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def package(build_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of this working tree."""
    return build(out=tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def newer_package(build_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, as a later version."""
    return build("--version", NEWER, out=tmp_path_factory.mktemp("newer"))


@pytest.fixture
def packaged(package: Path, gguf_dir: Path) -> Iterator[Daemon]:
    """A host of its own with the package installed, and one model put where models belong."""
    with Host() as host:
        host.put(package, "/root/llmstudiod.deb")
        apt(host, "install", "/root/llmstudiod.deb")
        host.put(gguf_dir / "tiny.gguf", f"{MODELS}/tiny.gguf")
        yield Daemon(host)


# Building


@pytest.mark.slow
def test_lintian_has_no_complaint(build_tree: Path, tmp_path: Path) -> None:
    """No error and no warning, by the lintian of the release that the package is for."""
    build("--lint", out=tmp_path)


@pytest.mark.slow
def test_two_builds_give_the_same_bytes(build_tree: Path, tmp_path: Path) -> None:
    """Another place, umask, time zone, locale and other file times change nothing."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout.split("\0")
    # The first is a copy too: somebody may be editing the working tree.
    first, second = tmp_path / "first", tmp_path / "some where else"
    copy_files(REPOSITORY, first, filter(None, names))
    one = build(out=tmp_path / "one", root=first)
    umask = os.umask(0o077)
    try:
        copy_files(first, second, filter(None, names))
        two = build(out=tmp_path / "two", root=second, TZ="Pacific/Kiritimati", LC_ALL="C")
    finally:
        os.umask(umask)
    assert one.name == two.name
    assert one.read_bytes() == two.read_bytes()


def copy_files(source: Path, destination: Path, names: Iterable[str]) -> None:
    """Copy files with new times, and modes by the umask, to a repository of its own."""
    for name in names:
        if (source / name).exists():
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, destination / name)
    (destination / "packaging/deb/build").chmod(0o700)
    subprocess.run(["git", "init", "--quiet"], check=True, cwd=destination)


# Installing


def test_one_curl_after_the_installation_is_answered(packaged: Daemon) -> None:
    """Nothing is configured or started by hand: the sockets listen, and Debian's llama-server answers."""
    assert [packaged.state(socket) for socket in SOCKETS] == ["active"] * 3
    assert packaged.systemctl("is-enabled", *SOCKETS).split() == ["enabled"] * 3
    assert packaged.state(SERVICE) == "inactive"
    answer = json.loads(packaged.host.run(*CURL, URL).stdout)
    assert answer["choices"][0]["message"]["content"]
    assert answer["system_fingerprint"].endswith("Debian")
    assert packaged.systemctl("--failed", "--no-legend") == ""


def test_programs_are_where_the_units_and_people_look(packaged: Daemon) -> None:
    """They start, whatever lies in the caller's directory; the sockets' owner and the directories' are right."""
    host = packaged.host
    host.write("/tmp/llmstudiod.py", "raise SystemExit('the module of the current directory')")
    host.run(
        "sh", "-c", "cd /tmp && PYTHONPATH=/tmp llmstudioctl --help && /usr/libexec/llmstudiod/llmstudiod --version"
    )
    shown = host.run("stat", "--format=%n %U:%G %a", "/etc/llmstudio", "/etc/llmstudio/recipes.d", MODELS).stdout
    assert shown.splitlines() == [
        "/etc/llmstudio root:root 755",
        "/etc/llmstudio/recipes.d root:root 755",
        f"{MODELS} llmstudio:llmstudio 755",
    ]
    host.run("sh", "-c", "systemd-analyze verify --man=no /usr/lib/systemd/system/llmstudio*")


def test_older_systemd_is_refused_with_the_reason(package: Path, base_tree: Path) -> None:
    """Before anything is unpacked, and in a sentence."""
    with Host() as host:
        host.put(package, "/root/llmstudiod.deb")
        host.run("sed", "-i", "/^Package: systemd$/,/^$/s/^Version: .*/Version: 252.39-1/", "/var/lib/dpkg/status")
        done = host.run("dpkg", "--install", "/root/llmstudiod.deb", check=False)
        assert done.returncode != 0
        assert "llmstudiod needs systemd 254 or newer, and 252.39-1 is installed" in done.stderr
        host.run("test", "!", "-e", "/usr/bin/llmstudioctl")
        host.run("test", "!", "-e", "/etc/llmstudio")


# Upgrading


def invocations(daemon: Daemon, *units: str) -> list[str]:
    """Return what changes whenever a unit is started."""
    return [daemon.show(unit, "InvocationID")["InvocationID"] for unit in units]


def test_upgrade_restarts_the_daemon_and_no_socket(packaged: Daemon, newer_package: Path) -> None:
    """The running daemon and launcher are replaced by the new ones; the sockets go on listening."""
    packaged.chat()
    sockets, services = invocations(packaged, *SOCKETS), invocations(packaged, SERVICE, LAUNCHER)
    packaged.host.write("/etc/llmstudio/llmstudiod.yaml", '{"idle_timeout": "7m"}')
    packaged.host.put(newer_package, "/root/newer.deb")
    apt(packaged.host, "install", "/root/newer.deb")
    assert invocations(packaged, *SOCKETS) == sockets
    assert packaged.state(SERVICE) == "active"
    assert not set(invocations(packaged, SERVICE, LAUNCHER)) & set(services)
    assert packaged.host.run("cat", "/etc/llmstudio/llmstudiod.yaml").stdout == '{"idle_timeout": "7m"}'
    assert packaged.chat()


def test_upgrade_does_not_start_a_daemon_that_nobody_wanted(packaged: Daemon, newer_package: Path) -> None:
    """An administrator who has stopped and disabled it finds it so after the upgrade."""
    packaged.systemctl("disable", "--now", *SOCKETS)
    packaged.host.put(newer_package, "/root/newer.deb")
    apt(packaged.host, "install", "/root/newer.deb")
    assert packaged.systemctl("is-enabled", *SOCKETS, check=False).split() == ["disabled"] * 3
    assert packaged.state(SERVICE) == "inactive"


class Load:
    """Clients that ask one after another, each with a connection of its own, until they are told to stop."""

    def __init__(self, host: Host, *, clients: int = 4) -> None:
        self.answers = 0
        self.failures: list[str] = []
        self._host = host
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        with self._host.network():
            while not self._is_over.is_set():
                connection = http.client.HTTPConnection("127.0.0.1", 8080, timeout=60)
                try:
                    connection.request("POST", "/v1/chat/completions", CHAT, {"Content-Type": "application/json"})
                    answer = connection.getresponse()
                    body = answer.read()
                    if answer.status == 200:
                        self.answers += 1
                    else:
                        self.failures.append(f"{answer.status} {body[:300]!r}")
                except (OSError, http.client.HTTPException) as error:
                    self.failures.append(repr(error))
                finally:
                    connection.close()


@pytest.mark.slow
def test_upgrade_and_downgrade_under_load_lose_nothing(packaged: Daemon, newer_package: Path) -> None:
    """Hundreds of requests in a loop are all answered, and the model's process stays the same."""
    packaged.chat()
    pid = packaged.pid(UNIT)
    assert pid > 0
    packaged.host.put(newer_package, "/root/newer.deb")
    with Load(packaged.host) as load:
        for file, option in (("newer", "--no-remove"), ("llmstudiod", "--allow-downgrades")):
            asked = load.answers
            wait_until(lambda asked=asked: load.answers > asked + 50)  # type: ignore[misc]
            apt(packaged.host, "install", option, f"/root/{file}.deb")
        asked = load.answers
        wait_until(lambda: load.answers > asked + 50)
    assert load.failures == []
    assert load.answers > 200
    assert packaged.pid(UNIT) == pid


# Going


def test_remove_stops_everything(packaged: Daemon) -> None:
    """Sockets, daemon, launcher and models, those that failed too; what the administrator wrote stays."""
    packaged.put_recipe({"id": "mine", "model_path": "tiny.gguf"})
    packaged.chat("mine")
    broken = ("systemd-run", "--unit=llmstudio-model-broken", "--slice=llmstudio-models.slice", "false")
    packaged.host.run(*broken)
    wait_until(lambda: packaged.state(unit_of("broken")) == "failed")
    apt(packaged.host, "remove", "llmstudiod")
    running = packaged.systemctl("list-units", "--plain", "--no-legend", "llmstudio*")
    assert running == ""
    assert packaged.systemctl("--failed", "--no-legend") == ""
    assert packaged.host.run("pgrep", "--list-full", "llmstudio|llama", check=False).stdout == ""
    packaged.host.run("sh", "-c", "! ls -d /run/llmstudio* /run/systemd/transient/llmstudio*")
    packaged.host.run("test", "-e", "/etc/llmstudio/recipes.d/mine.yaml")


@pytest.mark.parametrize("is_model_there", [True, False], ids=["with a model", "without"])
def test_purge_leaves_the_models_and_nothing_else(package: Path, gguf_dir: Path, *, is_model_there: bool) -> None:
    """Recipes, keys, copies and caches go; models are kept, if there are any, and the last words say so."""
    with Host() as host:
        daemon = Daemon(host)
        host.put(package, "/root/llmstudiod.deb")
        before = files_of(host)
        apt(host, "install", "/root/llmstudiod.deb")
        host.put(gguf_dir / "tiny.gguf", f"{MODELS}/tiny.gguf")
        daemon.put_recipe({"id": "mine", "model_path": "tiny.gguf"})
        daemon.chat("mine")
        if not is_model_there:
            host.run("rm", f"{MODELS}/tiny.gguf")
        said = apt(host, "purge", "llmstudiod")
        kept = {path for path in files_of(host) - before if not path.startswith((*BOOKS, *BACKUPS, "/run/"))}
        models = {"/var/lib/llmstudio", MODELS, f"{MODELS}/tiny.gguf"}
        assert kept == (models if is_model_there else set())
        assert (f"Models in {MODELS} are kept" in said) is is_model_there
        host.run("sh", "-c", "! ls -d /run/llmstudio*")


# Without the package


@pytest.mark.slow
def test_make_install_serves_and_uninstall_takes_it_away(build_tree: Path, gguf_dir: Path, tmp_path: Path) -> None:
    """A virtual environment below the prefix serves as well, and leaves settings and models when it goes."""
    wheels = fetch_wheels(tmp_path, python=next((build_tree / "usr/lib").glob("python3.*")).name)
    with Host() as host:
        daemon = Daemon(host)
        for path in ("usr/bin/make", "usr/share/python-wheels", *ensurepip(build_tree)):
            host.bind(build_tree / path, f"/{path}")
        host.bind(wheels, "/srv/wheels")
        host.bind(REPOSITORY, "/srv/source")
        before = files_of(host)
        offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/srv/wheels"}
        host.run("make", "-C", "/srv/source", "install", env=offline, timeout=300)
        host.put(gguf_dir / "tiny.gguf", f"{MODELS}/tiny.gguf")
        assert json.loads(host.run(*CURL, URL).stdout)["choices"][0]["message"]["content"]
        assert "tiny" in host.run("/usr/local/bin/llmstudioctl", "list").stdout
        executable = host.run("readlink", f"/proc/{daemon.pid()}/exe").stdout
        assert executable.startswith("/usr/bin/python3")
        assert b"/usr/local/lib/llmstudiod/bin/python" in host.path(f"/proc/{daemon.pid()}/cmdline").read_bytes()
        host.run("make", "-C", "/srv/source", "uninstall")
        assert daemon.systemctl("list-units", "--plain", "--no-legend", "llmstudio*") == ""
        # What it wrote at run time to its own directories is there as well.
        places = ("/etc/llmstudio", "/var/lib/llmstudio")
        left = {
            path for path in files_of(host) - before if "llmstudio" in path and not path.startswith("/run/systemd/")
        }
        assert [path for path in left if not f"{path}/".startswith(tuple(f"{place}/" for place in places))] == []
        assert {"/etc/llmstudio/llmstudiod.yaml", f"{MODELS}/tiny.gguf"} <= left


def ensurepip(tree: Path) -> Iterator[str]:
    """Yield the paths of the modules that python3-venv adds, relative to the tree."""
    yield from (str(path.relative_to(tree)) for path in (tree / "usr/lib").glob("python3.*/ensurepip"))


def fetch_wheels(directory: Path, *, python: str) -> Path:
    """Fetch what the project requires as wheels for the host's Python, and return where they are."""
    wheels = directory / "wheels"
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"], "wheel"]
    # Pure, and published as source only: for another Python than ours pip takes nothing but wheels.
    pure = [requirement for requirement in wanted if requirement.startswith("sdnotify")]
    version = ["--python-version", python.removeprefix("python"), "--only-binary=:all:", "--find-links", str(wheels)]
    for command in (
        [*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), *pure],
        [*pip, "download", "--dest", str(wheels), *version, *wanted],
    ):
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            give_up(f"the requirements cannot be fetched: {done.stderr.strip()[-2000:]}")
    return wheels
