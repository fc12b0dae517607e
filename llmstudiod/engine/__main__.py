"""``python -m llmstudiod.engine -m MODEL --host /path/x.sock``: serve one model until SIGTERM or SIGINT.

The flags are llama-server's (``flags``), and so are the answers to ``--version``, ``--help``, ``--completion-bash``
and ``--list-devices``. The end of the parent is the caller's to watch.
"""

import os
import signal
import sys
import time
from types import ModuleType

from llmstudiod.engine.command_line import ArgumentError, accepted_flags, parse_command_line
from llmstudiod.engine.values import OVERRIDES, SAMPLING_BITS, EnumMember, Lora, Settings

_MISSING = "error: the embedded engine needs the package xllamacpp: pip install 'llmstudiod[engine]'"
_HELP = """\
usage: python -m llmstudiod.engine -m MODEL [FLAG ...]

Serves a GGUF model over HTTP with llama.cpp inside this process, as llama-server does.
--host takes addresses or paths of Unix sockets ending in .sock. Flags, described by `llama-server --help`:
"""


def main(arguments: list[str]) -> int:
    """Run the engine and return the exit status: 0 after a signal to stop, 1 where it could not start."""
    # Python's own handler would wait for the load, which holds the interpreter; like llama-server, die at once.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        command_line = parse_command_line(arguments)
    except ArgumentError as error:
        return _fail(str(error))
    match command_line.query:
        case None:
            return _serve(command_line.settings)
        case "--version":
            return _print_version()
        case "--list-devices":
            return _print("Available devices:\n  (none)")
        case "--completion-bash":
            return _print(f'    opts="{" ".join(accepted_flags())} "')
        case _:
            return _print(_HELP + "\n".join(f"  {name}" for name in accepted_flags()))


def _cannot_load(error: ImportError) -> str:
    """Return why the package is there and of no use; a minimal system lacks GCC's OpenMP library."""
    step = ": on Debian, apt install libgomp1" if "libgomp" in str(error) else ""
    return f"error: the package xllamacpp cannot be loaded: {error}{step}"


def _print_version() -> int:
    from importlib import metadata  # here, since it takes a third of the time of a start

    try:
        return _print(f"version: xllamacpp {metadata.version('xllamacpp')}")
    except metadata.PackageNotFoundError:
        return _fail(_MISSING)


def _serve(settings: Settings) -> int:
    model = settings.get("model.path")
    if not model:
        return _fail("error: no model: give its GGUF file with -m FILE")
    try:
        import xllamacpp  # here, since it is 100 MB and not needed to check a command line
    except ModuleNotFoundError:
        return _fail(_MISSING)
    except ImportError as error:
        return _fail(_cannot_load(error))
    # As llama-server: a key on the command line would be readable in /proc.
    if key := os.environ.get("LLAMA_API_KEY"):
        settings.setdefault("api_keys", key.split(","))
    try:
        params = make_params(xllamacpp, settings)
    except ValueError as error:
        return _fail(f"error: {error}")
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:
        # llama.cpp logs from a thread of its own, which cannot be flushed from here: let its reason come first.
        time.sleep(0.1)
        return _fail(f"error: cannot serve '{model}': the lines above say why")
    stop = _wait_for_stop()
    sys.stderr.write(f"engine: {stop.name}: no longer listening on {server.listening_address}\n")
    # Deleting the server waits for each request to end, with the interpreter held: for ever, if a client likes.
    # There is nothing to save, so leave the rest to the kernel.
    os._exit(0)


def _wait_for_stop() -> signal.Signals:
    # The signal may reach a thread of llama.cpp, which does not wake this one; the byte in the pipe does.
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return signal.Signals(os.read(read_end, 1)[0])


def make_params(xllamacpp: ModuleType, settings: Settings) -> object:
    """Return a ``CommonParams`` with the settings made.

    Raises:
        ValueError: xllamacpp refuses one, say because it is negative and must not be.
    """
    params = xllamacpp.CommonParams()
    for path, value in settings.items():
        *parents, name = path.split(".")
        owner = params
        for parent in parents:
            owner = getattr(owner, parent)
        try:
            setattr(owner, name, _native(xllamacpp, getattr(owner, name), path, value))
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"this xllamacpp cannot have {path} = {value!r}: {error}") from error
    return params


def _native(xllamacpp: ModuleType, default: object, path: str, value: object) -> object:
    """Return the value as xllamacpp's setter wants it; ``default`` is what is there now."""
    if isinstance(value, list):
        value = [_native(xllamacpp, None, "", item) for item in value]
    match value:
        case EnumMember():
            return getattr(getattr(xllamacpp, value.enum), value.member)
        case Lora():
            return xllamacpp.CommonAdapterLoraInfo(value.path, value.scale)
        case list() if path == SAMPLING_BITS:
            return sum(value)
        case list() if path.endswith(OVERRIDES):
            return ",".join(value)
        case list() if path == "tensor_split" and isinstance(default, list):  # a number for each device there could be
            return (value + [0.0] * len(default))[: len(default)]
        case [single] if path == "fit_params_target" and isinstance(default, list):  # holds for every device
            return [single] * len(default)
    return value


def _print(text: str) -> int:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    return 0


def _fail(text: str) -> int:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
