"""A disposable Debian with a real systemd as PID 1, booted in namespaces in about a second, without a virtual machine.

The fixtures in `conftest.py` and people at a shell (`python -m tests.system.host`) call this; README.md is its manual.

Three things make clean-up dependable, whatever happens to the test run:

* Everything the host mounts, it mounts in its own mount namespace: the mounts go when its processes go.
* All its processes live in one cgroup of the machine's, so one write to `cgroup.kill` ends them without a race.
* A guard process waits for the end of the process that made the host, even by SIGKILL, and then does the clean-up.
  Should the guard be killed too, the next start finds that the owner is gone and clears the host away.

Only the standard library, and no import of the project: this file runs itself as a bare script for the steps that need
a process of their own (`_boot`, `_bind`, `_guard`).
"""

import contextlib
import ctypes
import fcntl
import hashlib
import io
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

# python3-* is what the project needs at run time: its tree is copied in, nothing is installed from an index.
# llama.cpp-tools, not llama.cpp: the metapackage brings a llama-server.service of its own on port 8080.
# python3-pytest*: the launchers' tests also run inside.
PACKAGES = (
    "ca-certificates,curl,dbus,iproute2,llama.cpp-tools,polkitd,procps,systemd,systemd-sysv,python3,"
    "python3-aiohttp,python3-gguf,python3-psutil,python3-pydantic,python3-pytest,python3-pytest-asyncio,"
    "python3-pytest-timeout,python3-sdnotify,python3-yaml"
)
MMDEBSTRAP_OPTIONS = (
    "--variant=minbase",
    # The Release file of a frozen copy of the archive may be past its Valid-Until date.
    '--aptopt=Acquire::Check-Valid-Until "false"',
    "--dpkgopt=path-exclude=/usr/share/locale/*",
    "--dpkgopt=path-exclude=/usr/share/man/*",
)
FINGERPRINT = "etc/llmstudiod-testhost"  # inside the base tree, so that one rename publishes both
BOOT_TIMEOUT_S = 30.0
KILL_TIMEOUT_S = 10.0
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8", "TERM": "dumb"}

# From <sys/mount.h> and <sched.h>. Python has os.setns from 3.12 only and the mount calls not at all.
CLONE_NEWNET, CLONE_NEWCGROUP, CLONE_NEWNS = 0x40000000, 0x02000000, 0x00020000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_PRIVATE = 1, 2, 4, 8, 0x20, 0x1000, 1 << 18
MNT_DETACH = 2
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000
OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_SYMLINKS, MOUNT_ATTR_RDONLY = 1, 4, 0x10, 1
# These three have the same number on every architecture (all calls after 424 do).
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_MOUNT_SETATTR = 428, 429, 442


class HostError(Exception):
    """A test host could not be built, booted or used; the message is for the person who runs the tests."""


def missing() -> str | None:
    """One sentence that says why this machine cannot boot a host and what to do; None when it can."""
    if sys.platform != "linux":
        return "a test host needs Linux; run the tests on a Linux machine"
    if os.geteuid() != 0:
        return "only root can boot a test host; run pytest with sudo"
    if [int(number) for number in re.findall(r"\d+", os.uname().release)[:2]] < [5, 14]:
        return f"Linux {os.uname().release} has no cgroup.kill; boot a kernel of 5.14 or later"
    cgroup2 = _cgroup2()
    if cgroup2 is None or not os.access(cgroup2, os.W_OK):
        return "no writable cgroup v2 is mounted; run: mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified"
    for program in ("unshare", "nsenter"):
        if shutil.which(program) is None:
            return f"{program} is not installed; run: apt-get install util-linux"
    if not _has_overlayfs():
        return "the kernel has no overlayfs; run: modprobe overlay"
    if _file_system(state_dir()) == "overlayfs":
        return f"{state_dir()} is itself on overlayfs; set LLMSTUDIO_TESTHOST_DIR to a directory on a disk"
    probe = subprocess.run([*_unshare(), "true"], check=False, capture_output=True, text=True)
    if probe.returncode != 0:
        return f"root may not make namespaces here ({probe.stderr.strip()}); give the container CAP_SYS_ADMIN"
    if not _is_built(base_path()) and shutil.which("mmdebstrap") is None:
        return f"there is no base tree at {base_path()} and no mmdebstrap; run: apt-get install mmdebstrap"
    return None


def state_dir() -> Path:
    """Where the base trees and the running hosts' files are kept."""
    return Path(os.environ.get("LLMSTUDIO_TESTHOST_DIR") or "/var/tmp/llmstudiod-testhost")


def base_path() -> Path:
    """Where the base tree of this suite and package list belongs, built or not."""
    digest = hashlib.sha256(_fingerprint().encode()).hexdigest()[:8]
    return state_dir() / f"base-{_suite()}-{digest}"


def build_base() -> Path:
    """Make the base tree unless it is there, and return its path.

    Blocks for about a minute the first time, and needs a Debian mirror then.
    The name carries a digest of suite and packages, so a changed list makes a new tree beside the old one,
    which running hosts may still have mounted; `list` shows them, remove old ones with `rm -r`.

    Raises:
        HostError: mmdebstrap failed; the message has its command line and the end of its output.
    """
    base = base_path()
    with _locked("base") as lock:
        if _is_built(base):
            return base
        part = base.with_suffix(".part")
        _remove_tree(part)
        _say(f"building Debian {_suite()} in {base}, once, in about a minute")
        started = time.monotonic()
        # No mirror is named: mmdebstrap knows the right one and its key for each suite of Debian's.
        command = ["mmdebstrap", "--quiet", *MMDEBSTRAP_OPTIONS, f"--include={PACKAGES}", _suite(), str(part)]
        # It inherits the lock: should we be killed, nobody builds here until it has ended as well.
        done = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, pass_fds=(lock,)
        )
        if done.returncode != 0:
            _remove_tree(part)
            raise HostError(_failure(command, done.returncode, done.stdout + done.stderr))
        (part / FINGERPRINT).write_text(_fingerprint())
        part.rename(base)
        _say(f"built in {time.monotonic() - started:.0f} s")
        return base


class Host:
    """One booted host: a context manager, or `up()` and `down()`.

    It starts from the base tree with nothing written to it, has only loopback for a network,
    and shares with the machine only the kernel, its clock and what `bind` lends it.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name or f"test-{secrets.token_hex(3)}"
        if re.fullmatch(r"[a-z0-9][a-z0-9-]{0,40}", self.name) is None:
            raise HostError(f"{self.name!r} cannot name a host; use lower-case letters, digits and hyphens")
        self.directory = state_dir() / "hosts" / self.name
        # Our children for as long as the host is up: the guard, and unshare, the parent of the host's PID 1.
        self._children: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        return self.up()

    def __exit__(self, *_: object) -> None:
        self.down()

    def up(self, *, is_kept: bool = False) -> Self:
        """Boot, and return when systemd says `running` or `degraded`; about a second.

        Args:
            is_kept: the host outlives this process, until someone calls `down`.

        Raises:
            HostError: it did not boot; the message ends with what systemd said on the console.
        """
        base = build_base()
        with _locked("hosts"):
            _remove_stale()
            if self.directory.exists():
                raise HostError(f"a host named {self.name} is up; take it down first: down {self.name}")
            self.directory.mkdir(parents=True)
            (self.directory / "owner").write_text("kept" if is_kept else f"{os.getpid()} {_start_time(os.getpid())}")
        try:
            if not is_kept:
                # It reads until our end of the pipe is closed: by `down`, or by the kernel when we die.
                guard = _myself("_guard", self.name)
                self._children.append(subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True))
            self._boot(base)
        except BaseException:
            self.down()
            raise
        return self

    def down(self) -> None:
        """Kill the host and remove all it leaves on the machine; does nothing when it is down already."""
        with _locked("hosts"):
            _remove(self.name)
        while self._children:
            self._children.pop().communicate(timeout=KILL_TIMEOUT_S)

    @property
    def pid(self) -> int:
        """The pid of the host's PID 1, as the machine counts."""
        try:
            pid = int((self.directory / "pid").read_text())
            # A host that died by itself (`systemctl poweroff`) leaves a number that may be another process's by now.
            groups = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
            if any(_cgroup(self.name).name in line.split("/") for line in groups):
                return pid
        except (OSError, ValueError):
            pass
        raise HostError(f"no host named {self.name} is up")

    def command(self, *argv: str) -> list[str]:
        """The command line that runs `argv` inside, as root, in the host's own cgroup."""
        # nsenter itself stays outside the cgroup, so that it outlives the command and no zombie is left to the machine.
        # pdeathsig: a signal to nsenter is not passed on, so make the command end with it (on a timeout, say).
        return [
            *("nsenter", f"--target={self.pid}", "--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup"),
            *("--root", "--wd", "--", "setpriv", "--pdeathsig=KILL", "--"),
            *("sh", "-c", 'echo $$ >/sys/fs/cgroup/commands/cgroup.procs && exec "$@"', "sh", *argv),
        ]

    def run(
        self,
        *argv: str,
        check: bool = True,
        input: str | bytes = "",  # noqa: A002 - subprocess.run's word
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside as root and return its output; `env` is added to a clean environment.

        Raises:
            HostError: it failed and `check` is set; the message has its command line and output.
            subprocess.TimeoutExpired: it was killed after `timeout` seconds.
        """
        data = input.encode() if isinstance(input, str) else input
        whole = ENVIRONMENT | dict(env or {})
        done = subprocess.run(
            self.command(*argv), check=False, input=data, capture_output=True, timeout=timeout, cwd="/", env=whole
        )
        output, errors = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        if check and done.returncode != 0:
            raise HostError(f"inside {self.name}: {_failure(list(argv), done.returncode, output + errors)}")
        return subprocess.CompletedProcess(list(argv), done.returncode, output, errors)

    def popen(self, *argv: str, env: Mapping[str, str] | None = None, **options: Any) -> "subprocess.Popen[str]":
        """Start a command inside as root; `options` are those of `subprocess.Popen`, the streams are text.

        Any signal to this process kills the command outright; to send it another one, run `kill` inside.
        """
        return subprocess.Popen(self.command(*argv), text=True, cwd="/", env=ENVIRONMENT | dict(env or {}), **options)

    def put(self, src: Path, dst: str) -> None:
        """Copy a file or a directory's tree to the absolute path `dst`, owned by root; adds to what is there.

        Goes through memory: use `bind` for a model of several gigabytes.
        """
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            tar.add(src, arcname=dst.lstrip("/"), filter=_as_root)
        keep = ("--keep-directory-symlink", "--no-overwrite-dir")  # /lib stays a link, /tmp keeps its mode
        self.run("tar", "-C", "/", "-x", *keep, input=archive.getvalue())

    def write(self, dst: str, text: str, *, mode: int = 0o644) -> None:
        """Make or replace the file at the absolute path `dst`, and the directories it needs."""
        self.run("install", "-D", f"--mode={mode:o}", "/dev/stdin", dst, input=text)

    def bind(self, src: Path, dst: str) -> None:
        """Show a file or directory of the machine, read-only and without a copy, at the absolute path `dst`."""
        # A process with threads may not enter a mount namespace, and the test's process has threads.
        command = _myself("_bind", str(self.pid), str(src.resolve(strict=True)), dst)
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise HostError(_failure(command, done.returncode, done.stderr))

    def journal(self, unit: str) -> str:
        """The messages of a unit so far, one a line."""
        self.run("journalctl", "--sync")
        return self.run("journalctl", "--no-pager", "--quiet", "--output=cat", f"--unit={unit}").stdout

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """Let this thread live in the host's network: sockets it makes, and processes it starts, belong there.

        This is how a client in the test's own process talks to a port inside: aiohttp and openai make their sockets in
        the thread that runs the event loop. A socket stays in its network after the block; one made before stays
        outside. Ports and the Host header are the real ones, and no byte is copied on the way.
        """
        with Path("/proc/thread-self/ns/net").open() as outside, Path(f"/proc/{self.pid}/ns/net").open() as inside:
            _call(_libc().setns, inside.fileno(), CLONE_NEWNET)
            try:
                yield
            finally:
                _call(_libc().setns, outside.fileno(), CLONE_NEWNET)

    def connect(self, address: tuple[str, int], *, timeout: float = 10) -> socket.socket:
        """Open a TCP connection to a port inside, such as `("127.0.0.1", 8080)`."""
        with self.network():
            return socket.create_connection(address, timeout=timeout)

    def path(self, inside: str) -> Path:
        """The path by which the machine reaches a file or Unix socket of the host's.

        It holds no symbolic links: the kernel would follow an absolute one into the machine's own tree.
        """
        real = self.run("realpath", "--canonicalize-missing", inside).stdout.removesuffix("\n")
        return Path(f"/proc/{self.pid}/root{real}")

    def _boot(self, base: Path) -> None:
        group = _cgroup(self.name)
        (group / "commands").mkdir(parents=True)
        for name in ("upper", "work", "root"):
            (self.directory / name).mkdir()
        console = self.directory / "console.log"
        with console.open("w") as log:
            command = [*_unshare(), *_myself("_boot", str(self.directory), str(base), str(group))]
            launcher = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._children.append(launcher)
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while time.monotonic() < deadline and launcher.poll() is None:
            if self._is_booted(deadline - time.monotonic()):
                return
            time.sleep(0.02)
        raise HostError(f"{self.name} did not boot; its console said:\n{_tail(console.read_text(errors='replace'))}")

    def _is_booted(self, timeout: float) -> bool:
        try:
            # Until systemd has taken over, the process still sees the machine's root, with the machine's own systemd.
            is_systemd = Path(f"/proc/{self.pid}/comm").read_text() == "systemd\n"
            if not is_systemd or not Path(f"/proc/{self.pid}/root/run/systemd/private").exists():
                return False
            done = self.run("systemctl", "is-system-running", "--wait", check=False, timeout=max(timeout, 1))
        except (HostError, OSError, subprocess.TimeoutExpired):
            return False
        return done.stdout.strip() in {"running", "degraded"}


def hosts() -> list[Host]:
    """All hosts of this state directory that have not been cleared away, the stale ones too."""
    return [Host(directory.name) for directory in sorted((state_dir() / "hosts").glob("*"))]


def _remove_stale() -> None:
    for host in hosts():
        if _is_stale(host.directory):
            _remove(host.name)


def _is_stale(directory: Path) -> bool:
    owner = directory / "owner"
    match owner.read_text().split() if owner.exists() else []:
        case ["kept"]:
            return False
        case [pid, start_time]:
            return _start_time(int(pid)) != start_time
        case _:
            return True  # its maker writes this file under the lock that we hold, so it died before it could


def _remove(name: str) -> None:
    """Kill and remove a host; the directory goes last, so that an interrupted removal is found and finished."""
    group = _cgroup(name)
    if group.exists():
        (group / "cgroup.kill").write_text("1")
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while "populated 1" in (group / "cgroup.events").read_text():
            if time.monotonic() > deadline:
                raise HostError(f"the processes in {group} did not die within {KILL_TIMEOUT_S:.0f} s of SIGKILL")
            time.sleep(0.01)
        for directory, _, _ in os.walk(group, topdown=False):
            Path(directory).rmdir()
    _remove_tree(state_dir() / "hosts" / name)


def _start_time(pid: int) -> str | None:
    """When the process started, in clock ticks since boot (proc(5), field 22): tells a reused pid; None when gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return None


def _suite() -> str:
    return os.environ.get("LLMSTUDIO_TESTHOST_SUITE") or "forky"


def _fingerprint() -> str:
    return "\n".join((_suite(), PACKAGES, *MMDEBSTRAP_OPTIONS, ""))


def _is_built(base: Path) -> bool:
    return (base / FINGERPRINT).is_file() and (base / FINGERPRINT).read_text() == _fingerprint()


def _cgroup2() -> Path | None:
    """Where cgroup v2 is mounted: at /sys/fs/cgroup, or below it beside the v1 controllers."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, target, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(target)
    return None


def _cgroup(name: str) -> Path:
    root = _cgroup2()
    if root is None:
        raise HostError("no cgroup v2 is mounted")
    return root / f"llmstudiod-testhost-{name}"


def _has_overlayfs() -> bool:
    if shutil.which("modprobe"):
        subprocess.run(["modprobe", "--quiet", "overlay"], check=False, capture_output=True)
    return "\toverlay\n" in Path("/proc/filesystems").read_text()


def _file_system(directory: Path) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    command = ["stat", "--file-system", "--format=%T", str(directory)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def _locked(name: str) -> Iterator[int]:
    """Hold one of the state directory's two locks, and yield its descriptor.

    Waits without limit: a build may take minutes, and the kernel takes the lock from a holder that dies.
    """
    state_dir().mkdir(parents=True, exist_ok=True)
    with (state_dir() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def _remove_tree(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)


def _as_root(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if entry.name.endswith("/__pycache__"):
        return None
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry


def _myself(step: str, *arguments: str) -> list[str]:
    return [sys.executable, "-I", "-S", __file__, step, *arguments]


def _unshare() -> list[str]:
    return ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--ipc", "--uts", "--net", "--"]


def _failure(command: list[str], status: int, output: str) -> str:
    return f"{shlex.join(command)}\nended with status {status} and said:\n{_tail(output)}"


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-40:])


def _say(text: str) -> None:
    sys.stderr.write(f"testhost: {text}\n")
    sys.stderr.flush()


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(function: Callable[..., int], *arguments: object) -> int:
    """Call a function of libc's that returns -1 and sets errno when it fails."""
    result = function(*(os.fsencode(a) if isinstance(a, str | Path) else a for a in arguments))
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)}: {getattr(function, '__name__', function)}{arguments}")
    return result


# The steps that run as processes of their own.


def _become_systemd(directory: Path, base: Path, group: Path) -> None:
    """As PID 1 of the new namespaces: make the host's file tree, make it the root, and become systemd."""
    # Here and not before: unshare, our parent, has to outlive us to reap us. 0 is the writer itself.
    (group / "cgroup.procs").write_text("0")
    _call(_libc().unshare, CLONE_NEWCGROUP)
    # /proc is still the machine's, and so is the number that it gives us.
    (directory / "pid").write_text(str(Path("/proc/self").readlink()))
    root = directory / "root"
    layers = f"lowerdir={base},upperdir={directory}/upper,workdir={directory}/work"
    _mount("overlay", root, "overlay", 0, layers)
    _mount("proc", root / "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    # Most of /proc/sys is the machine's: a systemd-sysctl inside must not change it.
    _mount(root / "proc/sys", root / "proc/sys", "", MS_BIND)
    _mount("", root / "proc/sys", "", MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    _mount("sysfs", root / "sys", "sysfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    _mount("cgroup2", root / "sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    # Left to itself systemd mounts a devtmpfs, which is all the machine's devices.
    _mount("tmpfs", root / "dev", "tmpfs", MS_NOSUID, "mode=755")
    for device in ("null", "zero", "full", "random", "urandom", "tty"):
        (root / "dev" / device).touch()
        _mount(f"/dev/{device}", root / "dev" / device, "", MS_BIND)
    (root / "dev/pts").mkdir()
    _mount("devpts", root / "dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620")
    (root / "dev/ptmx").symlink_to("pts/ptmx")
    _mount("tmpfs", root / "run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    _mount("tmpfs", root / "tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    # systemd brings up loopback and sets the host name itself.
    (root / "etc/hostname").write_text(f"{directory.name}\n")
    (root / "etc/hosts").write_text(f"127.0.0.1 localhost {directory.name}\n::1 localhost\n")
    # pivot_root(2): given one directory twice, it leaves the old root on top of the new one, to be taken off there.
    os.chdir(root)
    _call(_libc().pivot_root, ".", ".")
    _call(_libc().umount2, ".", MNT_DETACH)
    # Python ignores these two, and a process passes that on to the program it becomes.
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_DFL)
    systemd = "/usr/lib/systemd/systemd"
    os.execve(systemd, [systemd, "--system"], {"container": "llmstudiod-testhost", "PATH": ENVIRONMENT["PATH"]})


def _mount(source: str | Path, target: Path, kind: str, flags: int, data: str = "") -> None:
    _call(_libc().mount, source, target, kind, ctypes.c_ulong(flags), data)


def _bind(pid: int, src: Path, dst: Path) -> None:
    """Take a detached, read-only copy of the mount at `src` and hang it up in the host's mount namespace."""
    libc = _libc()
    number = ctypes.c_long
    tree = _call(libc.syscall, number(SYS_OPEN_TREE), AT_FDCWD, src, OPEN_TREE_CLONE | AT_RECURSIVE)
    # struct mount_attr: attr_set, attr_clr, propagation, userns_fd. Private: later mounts must not travel either way.
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, MS_PRIVATE, 0)
    empty, size = AT_EMPTY_PATH | AT_RECURSIVE, ctypes.c_size_t(ctypes.sizeof(attributes))
    _call(libc.syscall, number(SYS_MOUNT_SETATTR), tree, "", empty, attributes, size)
    is_directory = src.is_dir()
    with Path(f"/proc/{pid}/ns/mnt").open() as namespace:
        _call(libc.setns, namespace.fileno(), CLONE_NEWNS)  # this changes our root and current directory, too
    if is_directory:
        dst.mkdir(parents=True, exist_ok=True)
    else:
        dst.parent.mkdir(parents=True, exist_ok=True)
        dst.touch()
    how = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_SYMLINKS
    _call(libc.syscall, number(SYS_MOVE_MOUNT), tree, "", AT_FDCWD, dst, how)


def main(argv: list[str]) -> int:
    """Run one of the steps above, or one command of a person's; returns the exit status."""
    match argv:
        case ["_boot", directory, base, group]:
            _become_systemd(Path(directory), Path(base), Path(group))
        case ["_bind", pid, src, dst]:
            _bind(int(pid), Path(src), Path(dst))
        case ["_guard", name]:
            sys.stdin.buffer.read()
            Host(name).down()
        case _:
            try:
                return _command(argv)
            except HostError as error:
                _say(str(error))
                return 1
    return 0


def _command(argv: list[str]) -> int:
    reason = missing()
    if reason is not None:
        raise HostError(reason)
    match argv:
        case ["build"]:
            sys.stdout.write(f"{build_base()}\n")
        case ["up", name]:
            sys.stdout.write(f"{Host(name).up(is_kept=True).pid}\n")
        case ["run", name, *command]:
            inside = Host(name).command(*(command or ["bash"]))
            terminal = {"TERM": os.environ.get("TERM", "dumb")}
            return subprocess.run(inside, check=False, cwd="/", env=ENVIRONMENT | terminal).returncode
        case ["put", name, src, dst]:
            Host(name).put(Path(src), dst)
        case ["down", name]:
            Host(name).down()
        case ["list"]:
            sys.stdout.writelines(f"{line}\n" for line in _listing())
        case _:
            raise HostError(
                "usage: python -m tests.system.host build|up NAME|run NAME CMD...|put NAME SRC DST|down NAME|list"
            )
    return 0


def _listing() -> Iterator[str]:
    for base in sorted(state_dir().glob("base-*")):
        if base.is_dir():
            yield f"{base.name}: a base tree{'' if base == base_path() else ' that nobody needs now'}"
    for host in hosts():
        try:
            state = f"up, PID 1 is {host.pid}"
        except HostError:
            state = "dead"
        yield f"{host.name}: {state}{', owner gone: the next start removes it' if _is_stale(host.directory) else ''}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
