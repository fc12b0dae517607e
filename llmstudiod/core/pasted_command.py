"""What people paste when they are asked for a llama-server command: the words after it, and what stood around them.

Pure; `llmstudiod.core.from_command` makes the recipe. A shell's syntax is read as far as such commands have it: quotes,
lines that go on, redirections, several commands; also units of systemd, llama-swap's files, docker and Windows.
"""

import re
import shlex
from dataclasses import dataclass, field
from itertools import pairwise

from llmstudiod.core.errors import BadRequestError

_SERVER = re.compile(r"(^|[/\\])(llama-server|server)(\.exe)?$", re.IGNORECASE)
_ASSIGNMENT = re.compile(r"(?:\$env:)?([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_LINE_GOES_ON = re.compile(r"[\\^`][ \t]*\r?\n")
_DRIVE = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]:\\")
_OTHER_SIGNS = str.maketrans({"“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "\u2010": "-", "\u2011": "-", "−": "-"})  # noqa: RUF001
_LONG_DASH = re.compile(r"(?<!\S)[–—](?=[A-Za-z])")  # noqa: RUF001 - what editors make of two hyphens
_EXEC_START = re.compile(r"^\s*ExecStart=[-@:+!|]*", re.MULTILINE)
_CMD = re.compile(r"^(?P<indent>[ \t]*)(?:- )?cmd:[ \t]*(?P<rest>[^\n]*)\n?", re.MULTILINE)
_OPERATOR = re.compile(r"&>>?|\d?>>?(?:&\d)?|<|&&|\|\||[|&;]")
_FILE = re.compile(r"[ \t]*[^\s|&;<>]+")

_OTHER_FLAGS = "its flags have other names: begin with `llama-server -m FILE.gguf`"
_NOT_OURS = (
    # program, word after it, what it is, what to do
    (r"vllm", "serve", "vLLM", "write a recipe for a GGUF of the same model"),
    (r"vllm\.entrypoints\S*", None, "vLLM", "write a recipe for a GGUF of the same model"),
    (r"vllm-openai", None, "vLLM", "write a recipe for a GGUF of the same model"),
    (r"ollama", None, "Ollama", "`ollama show --modelfile MODEL` names its GGUF after FROM: make a recipe for that"),
    (r"llama-(cli|run|simple|bench|mtmd-cli)(\.exe)?", None, "llama.cpp, but not of its server",
     "write llama-server instead, and leave out the prompt"),
    (r"llama_cpp\.server", None, "llama-cpp-python", _OTHER_FLAGS),
    (r"llama-swap(\.exe)?", None, "llama-swap", "paste the `cmd` of one of its models"),
    (r"koboldcpp(\.py|\.exe|-\S+)?", None, "KoboldCpp", _OTHER_FLAGS),
)  # fmt: skip
_OUTPUT = "where its output goes is left out: `llmstudioctl logs` shows it"
_IN_FRONT = {
    "taskset": "limits: {allowed_cpus: …} says it in a recipe",
    "numactl": "limits: {allowed_cpus: …} says it in a recipe",
    "nice": "limits: {nice: …} says it in a recipe",
    "ionice": "limits: {io_weight: …} says it in a recipe",
}
# Those of `docker run` and `podman run` after which no value comes.
_DOCKER_SWITCHES = frozenset({
    "--detach", "--interactive", "--tty", "--rm", "--init", "--privileged", "--publish-all", "--read-only", "--quiet",
    "--no-healthcheck", "--oom-kill-disable", "--sig-proxy", "--disable-content-trust", "--replace", "--no-hosts",
})  # fmt: skip


@dataclass(slots=True)
class Pasted:
    """The words after llama-server, the variables that were set for it, and what is to be told."""

    words: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_pasted(text: str) -> Pasted:
    """Return what a command says.

    >>> read_pasted("CUDA_VISIBLE_DEVICES=0 nohup ./llama-server -m a.gguf > log 2>&1 &").words
    ['-m', 'a.gguf']

    Raises:
        BadRequestError: It cannot be read, or starts another program.
    """
    made = Pasted()
    text, has_shell = _command_of(_plain(text, made), made)
    has_drive = _DRIVE.search(text) is not None
    parts = [_split(part, has_drive=has_drive) for part in (_commands(text, made) if has_shell else [text])]
    chosen = next((number for number, part in enumerate(parts) if any(map(_SERVER.search, part))), None)
    if chosen is None:
        for part in parts:
            _refuse_others(part)
        chosen = next((number for number, part in enumerate(parts) if any(word[:1] == "-" for word in part)), 0)
    for part in parts[:chosen]:
        made.variables |= _assignments(part)
    left_out = [part for number, part in enumerate(parts) if number != chosen and not _only_sets(part)]
    if left_out:
        told = ", ".join(f"'{shlex.join(part)[:60]}'" for part in left_out)
        made.notes.append(f"{told} beside the command is left out")
    _take(parts[chosen], made)
    return made


# What it is written in


def _plain(text: str, made: Pasted) -> str:
    """Return the text with the signs that a shell knows, one command a line."""
    plain = text.translate(_OTHER_SIGNS)
    if plain != text:
        made.notes.append("quotes and dashes that an editor had put there are read as plain ones")
    joined = _LINE_GOES_ON.sub(" ", plain)
    dashed = _LONG_DASH.sub("--", joined)
    if dashed != joined:
        made.notes.append("a long dash (–) in front of a flag is read as --")  # noqa: RUF001
    return dashed


def _command_of(text: str, made: Pasted) -> tuple[str, bool]:
    """Return the command in a unit of systemd or in llama-swap's file; and whether it is for a shell."""
    if unit := _EXEC_START.search(text):
        made.notes.append("of the unit only ExecStart= is read")
        return text[unit.end() :].split("\n", 1)[0], False
    found = list(_CMD.finditer(text))
    if not found:
        return text, True
    if len(found) > 1:
        raise BadRequestError(
            f"this file of llama-swap has {len(found)} commands", hint="paste the `cmd` of one model at a time"
        )
    made.notes.append("of llama-swap's file only `cmd` is read")
    return _block(text, found[0]), False


def _block(text: str, found: re.Match[str]) -> str:
    """Return a text of YAML: behind the key, or in the lines below that are further in."""
    rest = found["rest"].strip()
    if rest and not re.fullmatch(r"[|>][-+0-9]*", rest):
        return rest
    lines = []
    for line in text[found.end() :].splitlines():
        if line.strip() and not line.startswith(found["indent"] + " "):
            break
        lines.append("" if line.lstrip().startswith("#") else line.strip())
    return " ".join(lines)


def _commands(text: str, made: Pasted) -> list[str]:
    """Return the commands that a shell would run one after the other, without where their output goes."""
    commands, start, place, kept = [], 0, 0, ""
    while place < len(text):
        sign = text[place]
        if sign in "'\"":
            place = _after_quote(text, place)
        elif sign == "\\":
            place += 2
        elif sign == "#" and (place == 0 or text[place - 1].isspace()):
            end = text.find("\n", place)
            place = len(text) if end < 0 else end
        elif operator := _operator(text, place):
            kept += text[start:place]
            place += len(operator)
            if ">" in operator or operator == "<":
                name = None if operator[-1].isdigit() else _FILE.match(text, place)
                place = name.end() if name else place
                made.notes += [_OUTPUT] if _OUTPUT not in made.notes else []
            else:
                commands.append(kept)
                kept = ""
            start = place
        else:
            place += 1
    return [part for part in (*commands, kept + text[start:]) if part.strip()] or [""]


def _operator(text: str, place: int) -> str | None:
    found = _OPERATOR.match(text, place)
    if found is None:
        return None
    is_in_a_word = place > 0 and not text[place - 1].isspace()
    return None if found[0][0].isdigit() and is_in_a_word else found[0]


def _after_quote(text: str, place: int) -> int:
    quote, place = text[place], place + 1
    while place < len(text) and text[place] != quote:
        place += 2 if text[place] == "\\" and quote == '"' else 1
    return place + 1


def _split(text: str, *, has_drive: bool) -> list[str]:
    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace_split = True
    if has_drive:  # a backslash is a part of paths there
        lexer.escape = ""
    try:
        return list(lexer)
    except ValueError as error:
        raise BadRequestError(
            f"the command cannot be read: {error}", hint="look for a quote that is not closed"
        ) from None


# What stands around it


def _refuse_others(words: list[str]) -> None:
    for number, word in enumerate(words):
        name = re.split(r"[/\\]", word)[-1].partition(":")[0]
        for program, follower, whose, hint in _NOT_OURS:
            if re.fullmatch(program, name, re.IGNORECASE) and follower in {None, *words[number + 1 : number + 2]}:
                raise BadRequestError(f"expected a command of llama-server, found one of {whose}", hint=hint)


def _assignments(words: list[str]) -> dict[str, str]:
    return {found[1]: found[2] for word in words if (found := _ASSIGNMENT.fullmatch(word))}


def _only_sets(words: list[str]) -> bool:
    """Whether a command does nothing but set variables, or change the directory."""
    return words[:1] == ["cd"] or all(word in {"export", "set"} or _ASSIGNMENT.fullmatch(word) for word in words)


def _take(words: list[str], made: Pasted) -> None:
    """Find the program, and what was put in front of it."""
    run = _docker_run(words)
    if run is not None:
        made.variables |= _assignments(words[: run - 1])
        _take_docker(words[run:], made, words[run - 2])
        return
    program = next((number for number, word in enumerate(words) if _SERVER.search(word)), None)
    if program is None:
        _refuse_others(words)
        program = next((number for number, word in enumerate(words) if word.startswith("-")), len(words)) - 1
    before = words[: max(program, 0)]
    made.variables |= _assignments(before)
    made.notes += [f"{name} in front is left out: {_IN_FRONT[name]}" for name in before if name in _IN_FRONT]
    made.words = words[program + 1 :]


def _docker_run(words: list[str]) -> int | None:
    """Return the place after ``docker run``."""
    for number, (program, verb) in enumerate(pairwise(words)):
        if re.fullmatch(r"(.*/)?(docker|podman)", program) and verb == "run":
            return number + 2
    return None


def _take_docker(words: list[str], made: Pasted, program: str) -> None:
    """Take what comes after the image; paths as they are on this machine."""
    mounts: dict[str, str] = {}
    number = 0
    while number < len(words) and words[number].startswith("-"):
        name, equals, value = words[number].partition("=")
        number += 1
        if not equals and not (name in _DOCKER_SWITCHES or re.fullmatch(r"-[ditPq]+", name)):
            value = words[number] if number < len(words) else ""
            number += 1
        if name in {"-v", "--volume"}:
            host, _, inside = value.partition(":")
            mounts[inside.partition(":")[0].rstrip("/")] = host.rstrip("/")
        elif name == "--mount":
            parts = dict(part.partition("=")[::2] for part in value.split(","))
            inside = parts.get("target") or parts.get("dst") or parts.get("destination") or ""
            mounts[inside.rstrip("/")] = (parts.get("source") or parts.get("src") or "").rstrip("/")
        elif name in {"-e", "--env"}:
            made.variables |= _assignments([value])
        elif name == "--gpus" and (chosen := re.search(r"device=([0-9A-Za-z,-]+)", value)):
            made.variables["CUDA_VISIBLE_DEVICES"] = chosen[1]
    _refuse_others(words[number:])
    made.notes.append(f"of what {program} does only volumes, variables and GPUs are read")
    inner = words[number + 1 :]
    if inner[:1] == ["--server"] or (inner and not inner[0].startswith("-")):  # the image's own choice of program
        inner = inner[1:]
    made.words = [_outside(word, mounts, made) for word in inner]


def _outside(word: str, mounts: dict[str, str], made: Pasted) -> str:
    flag, equals, path = word.partition("=") if word.startswith("-") else ("", "", word)
    for inside, host in mounts.items():
        if inside and (path == inside or path.startswith(f"{inside}/")):
            if "/" not in host:
                made.notes.append(f"'{host}' is a volume of its own: name where '{path}' lies on this machine")
                return word
            made.notes.append(f"'{path}' is '{host}{path[len(inside) :]}' on this machine")
            return f"{flag}{equals}{host}{path[len(inside) :]}"
    return word
