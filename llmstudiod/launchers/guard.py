"""Runs one command and sees to it that nothing of it outlives the daemon. Executed as a script, stdlib only.

    python -I -S guard.py FD COMMAND [ARG...]

FD is one end of a socket pair. The guard tells on it ``pid N``, then ``exit CODE SIGNAL`` or ``error ERRNO``, and
obeys one letter: ``T`` sends SIGTERM to the command's process group, ``K`` kills everything. When the other end
closes, the daemon is gone, however it died, and everything is killed too: that also holds for SIGKILL, which no
handler in the daemon could see. As a subreaper the guard inherits every grandchild, also one that left the group.
"""

import ctypes
import os
import select
import signal
import socket
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    """Run the command in ``sys.argv``; return the guard's own exit code, which means nothing."""
    link = socket.socket(fileno=int(sys.argv[1]))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)  # a terminal's Ctrl-C is the daemon's business
    wake_r, wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
    pid, error = _spawn(sys.argv[2:], libc)
    if error:
        link.sendall(b"error %d\n" % error)
        return 1
    _tell(link, b"pid %d\n" % pid)
    status = None
    while status is None:
        readable, _, _ = select.select([link.fileno(), wake_r], [], [])
        if wake_r in readable:
            os.read(wake_r, 512)
            status = _reap(pid)
        if link.fileno() in readable and status is None:
            order = _order(link)
            if order == b"T":
                _signal_group(pid, signal.SIGTERM)
            elif order in (b"", b"K"):
                _kill_all(pid)
    _kill_all(pid)
    _tell(link, b"exit %d %d\n" % (max(os.waitstatus_to_exitcode(status), 0), os.WTERMSIG(status)))
    return 0


def _spawn(argv: list[str], libc: ctypes.CDLL) -> tuple[int, int]:
    """Start the command in a session of its own; return its pid and the errno of a failed exec."""
    status_r, status_w = os.pipe2(os.O_CLOEXEC)
    guard = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            for default in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD):
                signal.signal(default, signal.SIG_DFL)
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() == guard:
                os.execvp(argv[0], argv)  # noqa: S606 - the daemon chose the command
        except OSError as error:
            os.write(status_w, b"%d" % (error.errno or 1))
        os._exit(127)
    os.close(status_w)
    error_text = os.read(status_r, 16)
    os.close(status_r)
    return pid, int(error_text or 0)


def _reap(pid: int) -> int | None:
    """Collect every child that has ended; return the command's wait status if it is among them."""
    status = None
    while True:
        try:
            ended, ended_status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if ended == 0:
            return status
        if ended == pid:
            status = ended_status


def _kill_all(pid: int) -> None:
    """Kill the group, and whatever left it, until no child is left; give up on one stuck in the kernel."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        _signal_group(pid, signal.SIGKILL)
        children = _children()
        for child in children:
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if not children:
            return
        time.sleep(0.005)
        # The command itself stays for the main loop to collect: its status is the answer.
        for child in children:
            if child != pid:
                try:
                    os.waitpid(child, os.WNOHANG)
                except ChildProcessError:
                    pass
        if children == [pid]:
            return


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:  # noqa: PTH123 - 3 ms of import
        return [int(word) for word in file.read().split()]


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def _order(link: socket.socket) -> bytes:
    try:
        return link.recv(1)
    except ConnectionError:
        return b""


def _tell(link: socket.socket, message: bytes) -> None:
    try:
        link.sendall(message)
    except OSError:
        pass  # the daemon is gone; the killing goes on


if __name__ == "__main__":
    sys.exit(main())
