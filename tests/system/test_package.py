"""The Debian package and `make install`, from building to purging, in hosts that have no network.

The package is built once for the module, from this working tree. What it needs is in the base tree already.
"""

import http.client
import json
import os
import re
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
from . import host as testhost  # noqa: TID252
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


def test_page_comes_with_the_package(packaged: Daemon) -> None:
    """Every file of it."""
    files = [
        f"page/{path.name}" for path in (REPOSITORY / "llmstudiod/page").iterdir() if path.suffix in {".js", ".css"}
    ]
    urls = [f"http://127.0.0.1:8080/{path}" for path in ("", *files)]
    words = ("curl", "-sS", "-m", "20", "-o", "/dev/null", "-w", "%{http_code} ", "-H", "Accept: text/html")
    assert {packaged.host.run(*words, url).stdout for url in urls} == {"200 "}


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


def test_documents_are_where_the_readme_links_to_them(packaged: Daemon) -> None:
    """Below /usr/share/doc as in the repository, and not compressed."""
    directory = packaged.host.path("/usr/share/doc/llmstudiod")
    documents = [directory / "README.md", *(directory / "docs").glob("*.md")]
    assert len(documents) == 1 + len(list((REPOSITORY / "docs").glob("*.md")))
    for document in documents:
        links = re.findall(r"\]\(([^)#:]+)\)", document.read_text())
        assert [link for link in links if not (document.parent / link).exists()] == [], document.name


def take_port(host: Host) -> None:
    """Start another server on the endpoint's port."""
    listening = ("python3", "-c", "import socket, time; s = socket.create_server(('127.0.0.1', 8080)); time.sleep(999)")
    host.run("systemd-run", "--quiet", "--unit=taker", *listening)
    wait_until(lambda: host.run("ss", "--no-header", "-ltn", "sport = :8080").stdout)


def test_taken_port_is_named_and_everything_else_works(package: Path, gguf_dir: Path) -> None:
    """The installation succeeds and says what to do; the daemon serves its administrators, as often as they ask."""
    with Host() as host:
        daemon = Daemon(host)
        take_port(host)
        host.put(package, "/root/llmstudiod.deb")
        said = apt(host, "install", "/root/llmstudiod.deb")
        assert re.search(r"port 8080 is taken by python3 \(pid \d+\)", said)
        assert "systemctl edit llmstudiod.socket" in said
        # More starts than the limits of systemd allow in their intervals.
        for _ in range(8):
            daemon.ctl("status")
            daemon.systemctl("stop", SERVICE)
        daemon.ctl("status")
        assert [daemon.state(unit) for unit in (*SOCKETS, SERVICE)] == ["failed", "active", "active", "active"]
        assert daemon.show(SOCKETS[0], "Result")["Result"] == "resources"
        assert "systemd has handed over no socket for the endpoint" in host.journal(SERVICE)
        # Moved while the port is taken, and back when it is free: each takes one command.
        host.put(gguf_dir / "tiny.gguf", f"{MODELS}/tiny.gguf")
        moved = "/etc/systemd/system/llmstudiod.socket.d/override.conf"
        host.write(moved, "[Socket]\nListenStream=\nListenStream=127.0.0.1:8081\n")
        daemon.systemctl("daemon-reload")
        daemon.systemctl("restart", SOCKETS[0])
        assert "choices" in host.run(*CURL, URL.replace("8080", "8081")).stdout
        host.run("rm", moved)
        daemon.systemctl("daemon-reload")
        daemon.systemctl("stop", "taker")
        daemon.systemctl("restart", SERVICE)
        daemon.systemctl("restart", SOCKETS[0])
        assert daemon.chat()


def test_stopped_socket_closes_the_port(packaged: Daemon) -> None:
    """The daemon holds it open as well, so it goes with the socket; the administrators' socket stays."""
    packaged.chat()
    packaged.systemctl("stop", "llmstudiod.socket")
    assert packaged.host.run("ss", "--no-header", "-ltn", "sport = :8080").stdout == ""
    assert packaged.state("llmstudiod-admin.socket") == "active"


def test_socket_that_nobody_serves_is_told_with_the_units_to_look_at(packaged: Daemon) -> None:
    """The service alone would show no more than that it does not run."""
    packaged.systemctl("stop", *SOCKETS)
    said = packaged.ctl("status", check=False)
    assert "systemctl status llmstudiod.socket llmstudiod-admin.socket" in said


def test_drop_ins_of_the_manual_do_what_it_says(packaged: Daemon) -> None:
    """Both are in force for one model: neither hides the other, and the directory is seen, read-only."""
    page = (REPOSITORY / "docs/man/llmstudiod.8").read_text().partition(".Ss Site overrides")[2]
    block = page.partition(".Bd -literal -offset indent\n")[2].partition(".Ed\n")[0]
    drop_ins = dict(part.split("\n", 1) for part in block.split("# ") if part)
    assert len(drop_ins) == 2
    host = packaged.host
    host.write("/srv/shared/file", "hello")
    for path, text in drop_ins.items():
        host.write(f"/etc/systemd/system/{path.replace('qwen3-32b', 'tiny')}", text)
    packaged.chat()
    assert packaged.show(UNIT, "CPUQuotaPerSecUSec") == {"CPUQuotaPerSecUSec": "4s"}
    inside = f"/proc/{packaged.pid(UNIT)}"
    assert host.run("cat", f"{inside}/root/run/shared/file").stdout == "hello"
    mounts = [line.split() for line in host.run("cat", f"{inside}/mountinfo").stdout.splitlines()]
    assert [fields[5].split(",")[0] for fields in mounts if fields[4] == "/run/shared"] == ["ro"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_debian_13_takes_the_package(package: Path, monkeypatch: pytest.MonkeyPatch, base_tree: Path) -> None:
    """What it depends on is in trixie, whose systemd starts it; there is no llama-server, and it says so."""
    wanted = testhost.PACKAGES.split(",")
    absent = {"llama.cpp-tools", "python3-gguf"}
    monkeypatch.setattr(testhost, "PACKAGES", ",".join(name for name in wanted if name not in absent))
    monkeypatch.setenv("LLMSTUDIO_TESTHOST_SUITE", "trixie")
    try:
        testhost.build_base()
    except testhost.HostError as error:
        give_up(f"the base tree of trixie cannot be built: {error}")
    with Host() as host:
        daemon = Daemon(host)
        assert 'VERSION_ID="13"' in host.run("cat", "/etc/os-release").stdout
        host.put(package, "/root/llmstudiod.deb")
        apt(host, "install", "/root/llmstudiod.deb")
        assert [daemon.state(socket) for socket in SOCKETS] == ["active"] * 3
        said = daemon.ctl("status")
        assert "launcher systemd" in said
        assert "there is no llama-server on this machine" in said
        assert daemon.state(SERVICE) == "active"
        host.run("curl", "-sS", "--fail", "http://127.0.0.1:8080/v1/models")
        verify = host.run("sh", "-c", "systemd-analyze verify --man=no /usr/lib/systemd/system/llmstudio*")
        assert verify.stdout + verify.stderr == ""
        apt(host, "purge", "llmstudiod")
        assert daemon.systemctl("list-units", "--failed", "--no-legend", "llmstudio*") == ""


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
    # Installed again it is as after the first time, and has nothing to complain of.
    said = apt(packaged.host, "install", "/root/llmstudiod.deb")
    assert "llmstudiod.service" not in said
    assert packaged.state(SERVICE) == "inactive"
    packaged.chat("mine")


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
        take_port(host)
        done = host.run("make", "-C", "/srv/source", "install", env=offline, timeout=300)
        assert "llmstudioctl is /usr/local/bin/llmstudioctl" in done.stdout
        assert "llmstudiod.socket cannot listen; is its port taken" in done.stderr
        daemon.systemctl("stop", "taker")
        daemon.systemctl("restart", SOCKETS[0])
        shown = host.run("ls", "/usr/local/share/doc/llmstudiod/examples", "/etc/llmstudio/recipes.d").stdout
        assert {path.name for path in (REPOSITORY / "etc/recipes.d").iterdir()} <= set(shown.splitlines())
        host.put(gguf_dir / "tiny.gguf", f"{MODELS}/tiny.gguf")
        assert json.loads(host.run(*CURL, URL).stdout)["choices"][0]["message"]["content"]
        assert "tiny" in host.run("/usr/local/bin/llmstudioctl", "list").stdout
        executable = host.run("readlink", f"/proc/{daemon.pid()}/exe").stdout
        assert executable.startswith("/usr/bin/python3")
        assert b"/usr/local/lib/llmstudiod/bin/python" in host.path(f"/proc/{daemon.pid()}/cmdline").read_bytes()
        # Who types another prefix, or is not root, breaks nothing.
        for target in ("install", "uninstall"):
            assert "make uninstall PREFIX=/usr/local" in refused(host, target, "PREFIX=/opt/x")
            assert f"sudo make {target}" in refused(host, target, user=65534)
        assert daemon.state(SERVICE) == "active"
        said = host.run("make", "-C", "/srv/source", "uninstall").stdout
        assert all(word in said for word in ("/etc/llmstudio", MODELS, "llmstudio-admin"))
        assert daemon.systemctl("list-units", "--plain", "--no-legend", "llmstudio*") == ""
        # The books of others aside, what is left is what it has just said.
        left = {path for path in files_of(host) - before if not path.startswith((*BOOKS, *BACKUPS, "/run/", "/srv/"))}
        settings = {path for path in left if f"{path}/".startswith("/etc/llmstudio/")}
        assert "/etc/llmstudio/llmstudiod.yaml" in settings
        assert left - settings == {"/var/lib/llmstudio", MODELS, f"{MODELS}/tiny.gguf"}


def test_make_leaves_the_package_alone(packaged: Daemon, build_tree: Path) -> None:
    """Its units would be hidden by an installation, and stopped by an uninstallation."""
    packaged.host.bind(build_tree / "usr/bin/make", "/usr/bin/make")
    packaged.host.bind(REPOSITORY, "/srv/source")
    for target in ("install", "uninstall"):
        assert "the package llmstudiod is installed" in refused(packaged.host, target)
    assert [packaged.state(socket) for socket in SOCKETS] == ["active"] * 3
    packaged.host.run("test", "!", "-e", "/etc/systemd/system/llmstudiod.socket")


def refused(host: Host, *words: str, user: int = 0) -> str:
    """Return what make says when it refuses."""
    done = host.run("setpriv", f"--reuid={user}", "make", "-C", "/srv/source", *words, check=False)
    assert done.returncode != 0
    return done.stderr


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
