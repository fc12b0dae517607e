"""What llama-server says when it is asked about itself, and what that means. Whoever asks it runs it elsewhere."""

import posixpath
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import replace

from llmstudiod.core.command import ServerBinary
from llmstudiod.core.errors import BinaryError
from llmstudiod.core.flags import parse_help_flags, parse_known_flags

INSTALL_HINT = (
    "install llama.cpp's llama-server (Debian forky: `apt install llama.cpp-tools`), or set llama_server in "
    "llmstudiod.yaml; in a virtual environment the embedded engine will do (`pip install 'llmstudiod[engine]'`)"
)
QUESTIONS = ("--version", "--completion-bash", "--help", "--list-devices")

Answer = tuple[int, str]
"""Exit code (negative: the signal) and everything that was printed."""

_LIBRARY = re.compile(r"(?:=> )?(/\S+) \(0x")
_DEVICE = re.compile(r"(?P<label>.*) \((?P<mib>\d+) MiB, \d+ MiB free\)")
_SIGNALS: Mapping[int, str] = {  # signal(7), x86 and ARM
    4: "SIGILL", 6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE", 9: "SIGKILL", 11: "SIGSEGV", 15: "SIGTERM", 31: "SIGSYS",
}  # fmt: skip
_SYSTEM = ("/usr/lib", "/usr/lib64", "/lib", "/lib64")


def chosen_binary(
    *, setting: str | None, variable: str | None, on_path: str | None, engine: tuple[str, ...] | None
) -> ServerBinary:
    """Return the program to run, not yet asked anything: the first that is given.

    Raises:
        BinaryError: There is none, or it is not named by its whole path.
    """
    for source, path in (("llama_server", setting), ("LLAMA_SERVER_PATH", variable), ("PATH", on_path)):
        if path and not path.startswith("/"):
            hint = "write it from the root on, such as /usr/bin/llama-server"
            raise BinaryError(f"{source}: expected an absolute path, found '{path}'", hint=hint)
        if path:
            return ServerBinary((path,), source)
    if engine:
        return ServerBinary(engine, "the embedded engine", is_engine=True)
    raise BinaryError("there is no llama-server on this machine", hint=INSTALL_HINT)


def refuse_program(found: ServerBinary, mode: int | None, start: bytes, *, is_sandboxed: bool) -> None:
    """Refuse what cannot be run. ``mode`` is the file's st_mode, None where there is none; ``start`` its first bytes.

    Raises:
        BinaryError: It is no program; or a script, which cannot start another program in the sandbox.
    """
    path, place = found.argv[0], f"{found.source}: expected a program, found"
    if mode is None:
        raise BinaryError(f"{place} no file '{path}'", hint=INSTALL_HINT)
    if not mode & 0o111:
        raise BinaryError(f"{place} '{path}', which is not executable", hint=f"chmod +x {shlex.quote(path)}")
    if start.startswith(b"#!") and is_sandboxed and not found.is_engine:
        hint = "name the program that it starts; flags go into recipes (extra_args), variables into env_vars"
        raise BinaryError(f"{place} the script '{path}', which may start nothing in the sandbox", hint=hint)


def described(binary: ServerBinary, answers: Mapping[str, Answer]) -> ServerBinary:
    """Return ``binary`` with its version, flags and devices.

    Raises:
        BinaryError: It did not even tell its version.
    """
    code, text = answers["--version"]
    if code != 0:
        command = shlex.join([*binary.argv, "--version"])
        raise BinaryError(
            f"`{command}` {ended(code)}: {last_line(text) or 'it printed nothing'}",
            hint="run it by hand: libraries may be missing, or it is built for another machine",
        )
    devices = _devices(answers["--list-devices"][1])
    return replace(
        binary,
        version=next((line for line in text.splitlines() if "version" in line), "").removeprefix("version: "),
        known_flags=parse_known_flags(answers["--completion-bash"][1]) | parse_help_flags(answers["--help"][1]),
        devices=tuple(name for name, _, _ in devices),
        device_labels=tuple(label for _, label, _ in devices),
        device_bytes=tuple(size for _, _, size in devices),
    )


def complaint(answer: Answer) -> str | None:
    """Return what the binary's parser has against a command line, from its answer to it with ``--version``."""
    code, output = answer
    if code == 0:
        return None
    telling = [line for line in output.splitlines() if line.startswith(("error", "error while"))]
    return telling[0] if telling else last_line(output) or f"it {ended(code)}"


def executables(binary: str, ldd_output: str) -> tuple[str, ...]:
    """Return the paths from which a server must be able to execute: itself and its libraries.

    ``binary`` is its real place. Backends of ggml are loaded from beside the binary or beside its libraries, so
    outside the system's own directories the whole directories count. Source of the format: ldd(1).

    >>> executables("/opt/llama/bin/llama-server", "  libllama.so => /opt/llama/lib/libllama.so (0x00007f)")
    ('/opt/llama/bin/llama-server', '/usr/lib', '/usr/lib64', '/opt/llama/bin', '/opt/llama/lib')
    """
    libraries = [posixpath.dirname(path) for path in _LIBRARY.findall(ldd_output)]
    own = [] if posixpath.dirname(binary) in {"/usr/bin", "/usr/local/bin", "/bin"} else [posixpath.dirname(binary)]
    extra = [path for path in [*own, *libraries] if not _is_below(path, _SYSTEM)]
    return tuple(dict.fromkeys([binary, "/usr/lib", "/usr/lib64", *extra]))


def ended(code: int) -> str:
    """Return how a command ended, as the end of a sentence."""
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by {_SIGNALS.get(-code, f'signal {-code}')}"


def last_line(text: str) -> str:
    """Return the last line that says something."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else ""


def _is_below(path: str, directories: Iterable[str]) -> bool:
    return any(path == directory or path.startswith(f"{directory}/") for directory in directories)


def _devices(text: str) -> list[tuple[str, str, int]]:
    """Return name, label and size of each line such as ``  Vulkan0: llvmpipe (LLVM 21, 256 bits) (24105 MiB, …)``."""
    found = []
    for line in text.splitlines():
        name, colon, rest = line.strip().partition(": ")
        if line.startswith("  ") and colon:
            told = _DEVICE.fullmatch(rest)
            found.append((name, told["label"], int(told["mib"]) << 20) if told else (name, rest, 0))
    return found
