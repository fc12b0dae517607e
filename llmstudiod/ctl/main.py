"""llmstudioctl: what administrators type. A client of the admin socket, but ``check`` and ``estimate`` read files."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmstudiod import __version__
from llmstudiod.core.errors import DaemonUnreachableError, LlmstudioError
from llmstudiod.ctl import doctor, explain, gpus, recipes, show
from llmstudiod.ctl import estimate as estimates
from llmstudiod.ctl import keys as api_keys
from llmstudiod.ctl import top as top_view
from llmstudiod.ctl import web as web_page
from llmstudiod.ctl.client import DEFAULT_SOCKET, EXIT_CODES, AnswerError, Client
from llmstudiod.ctl.following import lasting_events, lasting_lines, tell_loss
from llmstudiod.ctl.progress import load_progress

Command = Callable[[Client, argparse.Namespace], int]


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code."""
    # Both options may stand before or after the command; a default in either place would undo the other.
    words = _with_end_of_options(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(words, argparse.Namespace(json=False, socket=None))
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # `| head` has seen enough
        return 0


def _with_end_of_options(words: list[str]) -> list[str]:
    """Return the words with a ``--`` before the command that from-command takes: its options are not ours.

    >>> _with_end_of_options(["recipe", "from-command", "--save", "-m", "a.gguf"])
    ['recipe', 'from-command', '--save', '--', '-m', 'a.gguf']
    """
    if "from-command" not in words or "recipe" not in words[: words.index("from-command")]:
        return words
    place = words.index("from-command") + 1
    while place < len(words):
        word = words[place]
        if word in {"--id", "--socket"}:
            place += 2
        elif word in {"--save", "--json", "-h", "--help"} or word.startswith(("--id=", "--socket=")):
            place += 1
        else:
            break
    return [*words[:place], *(["--"] if place < len(words) and words[place] != "--" else []), *words[place:]]


def _run(arguments: argparse.Namespace) -> int:
    try:
        command: Command = arguments.command
        return command(Client.from_environment(arguments.socket), arguments)
    except AnswerError as error:
        _complain(arguments, {"kind": error.answer_kind, **error.answer}, error.message, error.hint)
        return EXIT_CODES.get(error.answer_kind, 1)
    except LlmstudioError as error:
        _complain(
            arguments,
            {"detail": error.message, "kind": error.kind, "hint": error.hint, **error.details},
            error.message,
            error.hint,
        )
        return error.exit_code


def _complain(arguments: argparse.Namespace, answer: dict[str, Any], message: str, hint: str | None) -> None:
    if arguments.json:
        print(json.dumps(answer, ensure_ascii=False, indent=2))
    print(f"llmstudioctl: {message}", file=sys.stderr)
    for line in (answer.get("lines") or [])[-5:]:
        print(f"  | {line}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print the answer as JSON")
    common.add_argument("--socket", metavar="PATH", default=argparse.SUPPRESS, help=f"(default: {DEFAULT_SOCKET})")
    parser = argparse.ArgumentParser(
        prog="llmstudioctl",
        description="Look after the models that llmstudiod serves.",
        epilog="exit codes: 0 done, 1 failed, 2 wrong usage, 3 a faulty file or setting, 4 no such model, "
        "5 not allowed, 6 queue full, 7 the model cannot be loaded or has ended, 8 daemon not reachable",
        parents=[common],
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, parents=[common])
        added.set_defaults(command=command)
        return added

    add("list", _list, "list the models and their states")
    status = add("status", _status, "show the daemon, or one model with its story")
    status.add_argument("model", nargs="?")
    load = add("load", _load, "load a model and wait until it is ready")
    load.add_argument("model")
    load.add_argument("--no-wait", action="store_true", help="return at once")
    unload = add("unload", _unload, "unload a model when its requests are answered")
    unload.add_argument("model", nargs="?")
    unload.add_argument("--all", action="store_true", help="unload every model")
    unload.add_argument("--force", action="store_true", help="do not wait for requests in flight")
    restart = add("restart", _restart, "unload a model, and load it again")
    restart.add_argument("model")
    pin = add("pin", _pin, "keep a model loaded: it is never evicted nor unloaded for idleness")
    pin.add_argument("model")
    unpin = add("unpin", _unpin, "let a model that was pinned go again")
    unpin.add_argument("model")
    cancel = add("cancel", _cancel, "give the load of a model up")
    cancel.add_argument("model")
    reset = add("reset", _reset, "let a model that failed be started again")
    reset.add_argument("model")
    add("watch", _watch, "print what happens to the models, as it happens")
    logs = add("logs", _logs, "show a model's log")
    logs.add_argument("model")
    logs.add_argument("-f", "--follow", action="store_true", help="go on with new lines")
    logs.add_argument("-n", "--lines", type=int, default=100, metavar="N", help="how many lines (default: 100)")
    check = add("check", _check, "check recipe files, or everything that the daemon has loaded")
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
    add("reload", _reload, "have settings, recipes and keys read again, now")
    add("doctor", doctor.command, "examine the installation, and tell what to do")
    add("schema", _schema, "print the JSON schema of recipes, for editors")
    add("version", _version, "show the versions of this program, the daemon and llama-server")
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


def _print_json(value: object) -> int:
    print(json.dumps(value, ensure_ascii=False, indent=2))
    return 0


def _list(client: Client, arguments: argparse.Namespace) -> int:
    status = client.get("status")
    if arguments.json:
        return _print_json(status["instances"])
    if status["instances"]:
        header = ("MODEL", "STATE", "SINCE", "REQUESTS", "CONTEXT", "")
        print(show.table(header, show.model_rows(status["instances"]), state_column=1))
    else:
        settings = client.get("config")["settings"]
        places = f"a GGUF into {settings['model_dirs'][0]}" if settings["model_dirs"] else "a recipe there"
        print(f"no models yet: put {places}, or a recipe into {settings['recipes_dir']};")
        print("it is noticed within ten seconds")
    _tell_faults(status["faults"])
    return 0


def _tell_faults(faults: list[dict[str, Any]]) -> None:
    if faults:
        print(f"\n{len(faults)} faults or warnings; `llmstudioctl check` tells them", file=sys.stderr)


def _status(client: Client, arguments: argparse.Namespace) -> int:
    if arguments.model:
        item = client.get("instances", arguments.model)
        if arguments.json:
            return _print_json(item)
        print(show.status_text(item))
        return 0
    status = client.get("status")
    if arguments.json:
        return _print_json(status)
    binary = status["llama_server"]
    port = f"port {status['inference_port']}"
    if status["inference_port"] is None:
        port = "no endpoint (`systemctl status llmstudiod.socket` tells why)"
    print(f"llmstudiod {status['version']}, {port}, launcher {status['launcher']}")
    if "error" in binary:
        print(f"llama-server: {binary['error']}")
        if binary["hint"]:
            print(f"hint: {binary['hint']}")
    else:
        print(f"llama-server {binary['version']} ({shlex.join(binary['command'])}, from {binary['source']})")
        print(f"devices: {', '.join(binary['devices']) or 'CPU only'}")
    print()
    return _list(client, arguments)


def _load(client: Client, arguments: argparse.Namespace) -> int:
    if arguments.no_wait:
        answer = client.post("launch", arguments.model, query="wait=false")
    else:
        with load_progress(client, arguments.model):
            answer = client.post("launch", arguments.model)
    if arguments.json:
        return _print_json(answer)
    print(answer["message"])
    return 0


def _unload(client: Client, arguments: argparse.Namespace) -> int:
    if bool(arguments.model) == arguments.all:
        print("llmstudioctl unload: expected either a model or --all", file=sys.stderr)
        return 2
    query = "force=true" if arguments.force else ""
    answer = client.post(*(("evict",) if arguments.all else ("evict", arguments.model)), query=query)
    if arguments.json:
        return _print_json(answer)
    names = answer.get("evicted", [arguments.model]) if arguments.all else [arguments.model]
    if not arguments.all and answer["evicted_pid"] is None:
        names = []
    print(f"unloaded: {', '.join(names) or 'nothing was loaded'}")
    return 0


def _restart(client: Client, arguments: argparse.Namespace) -> int:
    with load_progress(client, arguments.model):
        answer = client.post("instances", arguments.model, "restart")
    return _told(answer, arguments)


def _pin(client: Client, arguments: argparse.Namespace) -> int:
    return _told(client.post("instances", arguments.model, "pin"), arguments)


def _unpin(client: Client, arguments: argparse.Namespace) -> int:
    return _told(client.post("instances", arguments.model, "unpin"), arguments)


def _reload(client: Client, arguments: argparse.Namespace) -> int:
    answer = client.post("reload")
    if arguments.json:
        return _print_json(answer)
    print(answer["message"])
    _tell_faults(answer["faults"])
    return 3 if any(fault["severity"] == "fault" for fault in answer["faults"]) else 0


def _cancel(client: Client, arguments: argparse.Namespace) -> int:
    return _told(client.post("launch", arguments.model, "cancel"), arguments)


def _reset(client: Client, arguments: argparse.Namespace) -> int:
    return _told(client.post("instances", arguments.model, "reset"), arguments)


def _told(answer: dict[str, Any], arguments: argparse.Namespace) -> int:
    if arguments.json:
        return _print_json(answer)
    print(answer["message"])
    return 0


def _watch(client: Client, arguments: argparse.Namespace) -> int:
    for event in lasting_events(client, on_loss=tell_loss):
        if arguments.json:
            print(json.dumps(event, ensure_ascii=False), flush=True)
        elif line := show.event_line(event):
            print(line, flush=True)
    return 0


def _logs(client: Client, arguments: argparse.Namespace) -> int:
    if not arguments.follow:
        answer = client.get("logs", arguments.model)
        lines = answer["logs"][-arguments.lines :] if arguments.lines > 0 else []
        if arguments.json:
            return _print_json({**answer, "logs": lines, "content": "\n".join(lines)})
        for line in lines:
            print(line)
        return 0
    for event in lasting_lines(client, arguments.model, limit=max(0, arguments.lines), on_loss=tell_loss):
        line = json.dumps(event, ensure_ascii=False) if arguments.json else event["data"]["line"]
        print(line, flush=True)
    return 0


def _check(client: Client, arguments: argparse.Namespace) -> int:
    faults = _check_files(arguments.file) if arguments.file else _check_daemon(client)
    is_faulty = any(fault["severity"] == "fault" for fault in faults)
    if arguments.json:
        _print_json(faults)
    else:
        for fault in faults:
            place = ":".join(str(part) for part in (fault["file"], fault["line"]) if part)
            word = "warning: " if fault["severity"] == "warning" else ""
            key = f"{fault['key']}: " if fault["key"] else ""
            print(f"{place}: {word}{key}{fault['message']}" if place else f"{word}{key}{fault['message']}")
            if fault["hint"]:
                print(f"    hint: {fault['hint']}")
        print("faults were found" if is_faulty else "no faults", file=sys.stderr)
    return 3 if is_faulty else 0


def _check_files(files: list[Path]) -> list[dict[str, Any]]:
    """Check files as the one who asks, with or without a daemon."""
    from llmstudiod.ctl.check import check_files  # slow to import, and needed here alone

    return [
        {name: getattr(note, name) for name in ("file", "line", "key", "message", "hint")}
        | {"severity": str(note.severity)}
        for note in check_files(files)
    ]


def _check_daemon(client: Client) -> list[dict[str, Any]]:
    """Return the faults of what is loaded, and whatever keeps each model from being started."""
    faults = list(client.get("status")["faults"])
    for recipe in client.get("recipes"):
        faults += recipe["warnings"]
        try:
            client.get("explain", recipe["id"])
        except DaemonUnreachableError:
            raise
        except AnswerError as error:
            place = {"file": recipe["file"] or recipe["model_path"], "line": None, "key": recipe["id"]}
            faults.append({**place, "message": error.message, "hint": error.hint, "severity": "fault"})
    return faults


def _no_command(_: Client, __: argparse.Namespace) -> int:
    raise AssertionError("the parser wants a command")


def _schema(_: Client, __: argparse.Namespace) -> int:
    from llmstudiod.adapters.recipe_schema import recipe_schema  # slow to import, and needed here alone

    return _print_json(recipe_schema())


def _version(client: Client, arguments: argparse.Namespace) -> int:
    versions: dict[str, Any] = {"llmstudioctl": __version__, "llmstudiod": None, "llama_server": None}
    try:
        status = client.get("status")
        versions |= {"llmstudiod": status["version"], "llama_server": status["llama_server"].get("version")}
    except LlmstudioError:
        pass  # the version of this program can be told without a daemon
    if arguments.json:
        return _print_json(versions)
    for name, version in versions.items():
        print(f"{name} {version or 'not reachable'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
