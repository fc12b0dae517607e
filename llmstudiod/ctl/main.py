"""llmstudioctl: what administrators type. A client of the admin socket, but ``check`` and ``estimate`` read files."""

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmstudiod import __version__
from llmstudiod.core.errors import LlmstudioError
from llmstudiod.ctl import doctor, explain, gpus, look, models, recipes, show
from llmstudiod.ctl import estimate as estimates
from llmstudiod.ctl import keys as api_keys
from llmstudiod.ctl import top as top_view
from llmstudiod.ctl import web as web_page
from llmstudiod.ctl.client import DEFAULT_SOCKET, EXIT_CODES, AnswerError, Client, reason_of
from llmstudiod.ctl.command_line import Parser, UsageError, words_of

Command = Callable[[Client, argparse.Namespace], int]


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in a pipe, too, answers and complaints come in their order
    words = words_of(sys.argv[1:] if argv is None else argv)
    try:
        # Both options may stand before or after the command; a default in either place would undo the other.
        arguments = _parser().parse_args(words, argparse.Namespace(json=False, socket=None))
    except UsageError as error:
        sys.stderr.write(error.usage)
        answer = {"detail": error.message, "kind": "bad_request", "hint": error.hint}
        _complain(answer, as_json="--json" in words)
        raise
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # `| head` has seen enough
        return 0
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EDQUOT}:
            raise
        _give_up_output()
        print(f"llmstudioctl: the output cannot be written: {reason_of(error)}", file=sys.stderr)
        return 1


def _give_up_output() -> None:
    """Let what could not be written go: Python would try once more at the end, and complain in words of its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: argparse.Namespace) -> int:
    try:
        command: Command = arguments.command
        return command(Client.from_environment(arguments.socket), arguments)
    except AnswerError as error:
        _complain({"kind": error.answer_kind, **error.answer, "detail": error.message}, as_json=arguments.json)
        return EXIT_CODES.get(error.answer_kind, 1)
    except LlmstudioError as error:
        answer = {"detail": error.message, "kind": error.kind, "hint": error.hint, **error.details}
        _complain(answer, as_json=arguments.json)
        return error.exit_code


def _complain(answer: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        show.print_json(answer)
    print(f"llmstudioctl: {answer['detail']}", file=sys.stderr)
    for line in (answer.get("lines") or [])[-5:]:
        print(f"  | {line}", file=sys.stderr)
    if answer.get("hint"):
        print(f"hint: {answer['hint']}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print the answer as JSON")
    common.add_argument("--socket", metavar="PATH", default=argparse.SUPPRESS, help=f"(default: {DEFAULT_SOCKET})")
    parser = Parser(
        prog="llmstudioctl",
        description="Look after the models that llmstudiod serves.",
        epilog="exit codes: 0 done, 1 failed, 2 wrong usage, 3 a faulty file or setting, 4 no such model, "
        "5 not allowed, 6 queue full, 7 the model cannot be loaded or has ended, 8 daemon not reachable",
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"llmstudioctl {__version__}", help="show its version")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, parents=[common])
        added.set_defaults(command=command)
        return added

    add("list", look.listing, "list the models and their states")
    status = add("status", look.status, "show the daemon, or one model with its story")
    status.add_argument("model", nargs="?")
    load = add("load", models.load, "load a model and wait until it is ready")
    load.add_argument("model")
    load.add_argument("--no-wait", action="store_true", help="return at once")
    unload = add("unload", models.unload, "unload a model when its requests are answered")
    unload.add_argument("model", nargs="?")
    unload.add_argument("--all", action="store_true", help="unload every model")
    unload.add_argument("--force", action="store_true", help="do not wait for requests in flight")
    restart = add("restart", models.restart, "unload a model, and load it again")
    restart.add_argument("model")
    pin = add("pin", models.pin, "keep a model loaded: it is never evicted nor unloaded for idleness")
    pin.add_argument("model")
    unpin = add("unpin", models.unpin, "let a model that was pinned go again")
    unpin.add_argument("model")
    cancel = add("cancel", models.cancel, "give the load of a model up")
    cancel.add_argument("model")
    reset = add("reset", models.reset, "let a model that failed be started again")
    reset.add_argument("model")
    add("watch", look.watch, "print what happens to the models, as it happens")
    logs = add("logs", look.logs, "show a model's log")
    logs.add_argument("model")
    logs.add_argument("-f", "--follow", action="store_true", help="go on with new lines")
    logs.add_argument("-n", "--lines", type=int, default=100, metavar="N", help="how many lines (default: 100)")
    check = add("check", look.check, "check recipe files, or everything that the daemon has loaded")
    check.add_argument("file", nargs="*", type=Path)
    explain.add_arguments(add("explain", explain.command, "show where a model would go, and how it would be started"))
    estimates.add_arguments(add("estimate", estimates.command, "tell what a GGUF file needs in memory"))
    add("gpus", gpus.command, "show the GPUs, who uses them, and RAM")
    key = add("key", _no_command, "make, list or revoke the endpoint's API keys")
    keys = key.add_subparsers(required=True, metavar="COMMAND")

    def add_key(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        added = keys.add_parser(name, help=text, description=text, parents=[common])
        added.set_defaults(command=command)
        return added

    new = add_key("add", api_keys.add, "make a key and print it, once")
    new.add_argument("name", help="letters, digits and ._@-")
    new.add_argument("--admin", action="store_true", help="it may administer over TCP, and sign in at the page")
    new.add_argument("--metrics", action="store_true", help="it may read the metrics over TCP")
    new.add_argument("--models", action="append", metavar="NAME[,NAME…]", help="it may use these models alone")
    new.add_argument("--expires", metavar="TIME", help="how long it is valid, such as 30d (default: for ever)")
    add_key("list", api_keys.listing, "list the keys, without their secrets")
    add_key("revoke", api_keys.revoke, "take a key away").add_argument("name")
    _add_recipe_commands(add("recipe", _no_command, "make, edit, show or delete recipes"), common)
    web = add("web", web_page.command, "print the address of the page, with a code that signs in")
    web.add_argument("--no-open", action="store_true", help="do not open it on the desktop")
    web.add_argument("--sign-out", action="store_true", help="end every session of the page instead")
    top = add("top", top_view.command, "show what the models do, as they do it")
    top.add_argument("--once", action="store_true", help="print it once")
    add("reload", models.reload, "have settings, recipes and keys read again, now")
    add("doctor", doctor.command, "examine the installation, and tell what to do")
    add("schema", _schema, "print the JSON schema of recipes, for editors")
    add("version", look.version, "show the versions of this program, the daemon and llama-server")
    return parser


def _add_recipe_commands(recipe: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    commands = recipe.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, parents=[common])
        added.set_defaults(command=command)
        return added

    new = add("new", recipes.new, "make a recipe for a GGUF")
    new.add_argument("file", help="the GGUF, or the first of its shards")
    new.add_argument("--id", metavar="ID", help="its id (default: made of the file's name)")
    new.add_argument("--set", action="append", metavar="NAME=VALUE", help="a field of the recipe")
    new.add_argument("--edit", action="store_true", help="open it in an editor first")
    new.add_argument("--force", action="store_true", help="store it even if the file is not there or damaged")
    add("edit", recipes.edit, "open a recipe in an editor").add_argument("model")
    add("show", recipes.show, "print a recipe's file").add_argument("model")
    add("delete", recipes.delete, "remove a recipe; the model's file stays").add_argument("model")
    made = add("from-command", recipes.from_command, "make a recipe of a llama-server command")
    made.add_argument("--save", action="store_true", help="store it (default: print it)")
    made.add_argument("--id", metavar="ID", help="its id (default: made of the model's name)")
    made.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="WORD", help="the command with its options (default: standard input)"
    )


def _no_command(_: Client, __: argparse.Namespace) -> int:
    raise AssertionError("the parser wants a command")


def _schema(_: Client, __: argparse.Namespace) -> int:
    from llmstudiod.adapters.recipe_schema import recipe_schema  # slow to import, and needed here alone

    return show.print_json(recipe_schema())


if __name__ == "__main__":
    sys.exit(main())
