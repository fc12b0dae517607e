"""The manual pages are the contract: each setting, field, command, option, exit code, kind and state stands in its page."""
# ruff: noqa: E501 - a table reads best with one case a line

import argparse
import ast
import dataclasses
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest

from llmstudiod.adapters.recipe_schema import NAMES_OF_BINARIES
from llmstudiod.core import errors, reasons
from llmstudiod.core.errors import LlmstudioError
from llmstudiod.core.flags import find_flag
from llmstudiod.core.lifecycle import State
from llmstudiod.core.recipe import Limits, LoraAdapter, Recipe, Sandbox
from llmstudiod.core.recipe_names import ALIASES, DENIED_ENVIRONMENT, IGNORED
from llmstudiod.core.recipe_reader import parse_recipe_bytes
from llmstudiod.core.settings import DEFAULT_FILE, Settings
from llmstudiod.core.settings_reader import read_settings
from llmstudiod.core.unit import PREFIX, SLICE
from llmstudiod.core.yaml_lines import Document, parse_document
from llmstudiod.ctl import main as ctl
from llmstudiod.ctl.client import DEFAULT_SOCKET, EXIT_CODES, SOCKET_VARIABLE

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "llmstudiod"
MAN = ROOT / "docs" / "man"
PAGES = sorted(MAN.iterdir())
DAEMON, CTL = MAN / "llmstudiod.8", MAN / "llmstudioctl.1"
SETTINGS, RECIPE = MAN / "llmstudiod.yaml.5", MAN / "llmstudio-recipe.5"


@dataclasses.dataclass(frozen=True)
class Item:
    """An entry of a tagged list: the macros after ``.It``, and the lines below it, as they are written."""

    head: str
    raw: str

    @property
    def body(self) -> str:
        """The lines as they read."""
        return plain(self.raw)

    @property
    def words(self) -> list[str]:
        """The head's words without macros and punctuation."""
        return [
            word for word in self.head.split() if word not in {"Cm", "Ar", "Pq", "Sy", "Fl", ",", "Op", "Oo", "Oc", "|"}
        ]


def sections(page: Path) -> dict[str, str]:
    """Return the page's text by the titles of its sections."""
    parts = re.split(r"^\.Sh (.+)\n", page.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def items(text: str, macro: str) -> Iterator[Item]:
    """Yield the entries that begin with a macro; one with nothing below it shares what the next one has."""
    parts = re.split(r"^\.It ", text, flags=re.MULTILINE)[1:]
    body = ""
    for part in reversed(parts):
        head, _, below = part.partition("\n")
        body = below.strip() or body
        if head.startswith(macro):
            yield Item(head, body)


def plain(text: str) -> str:
    """Return a page's text as it reads, more or less."""
    words = re.sub(r"^\.\w+ ?|\\[e&]", "", text, flags=re.MULTILINE).replace(r"\-", "-")
    return re.sub(r"\s+", " ", words)


def by_name(page: Path, section: str, macro: str = "Cm") -> dict[str, Item]:
    """Return the entries of a section by their first word."""
    return {item.words[0]: item for item in items(sections(page)[section], macro)}


def default_of(item: Item) -> str | None:
    """Return what is told to be the default, where it is a value."""
    found = re.match(r"Default:\n\.Ql (.+) \.$", item.raw, re.MULTILINE)
    return found[1] if found else None


def bounds(kind: Any) -> tuple[int, int] | None:
    """Return the least and the most that an annotation allows."""
    for part in (kind, *get_args(kind)):
        if get_origin(part) is Annotated:
            for constraint in get_args(part)[1:]:
                if hasattr(constraint, "ge") and hasattr(constraint, "le"):
                    return int(constraint.ge), int(constraint.le)
    return None


def words_of(kind: Any) -> set[str]:
    """Return the words that an annotation allows."""
    if get_origin(kind) is Literal:
        return {word for word in get_args(kind) if isinstance(word, str)}
    return {word for part in get_args(kind) if not isinstance(part, str | int) for word in words_of(part)}


def examples(page: Path) -> list[str]:
    """Return the literal blocks under EXAMPLES."""
    blocks = re.findall(r"^\.Bd -literal.*\n((?:.*\n)*?)\.Ed$", sections(page)["EXAMPLES"], re.MULTILINE)
    return [block.replace(r"\e", "\\") for block in blocks]


# The page llmstudiod.yaml(5)


def test_every_setting_is_told_and_no_other() -> None:
    """A setting that is added must be written about."""
    assert by_name(SETTINGS, "SETTINGS").keys() == {field.name for field in dataclasses.fields(Settings)}


@pytest.mark.parametrize("field", dataclasses.fields(Settings), ids=lambda field: field.name)
def test_setting_has_the_default_the_words_and_the_bounds_of_the_code(field: "dataclasses.Field[Any]") -> None:
    """What the page tells, read as a file would be, is the default; each allowed word and bound is there."""
    item = by_name(SETTINGS, "SETTINGS")[field.name]
    kind = get_type_hints(Settings, include_extras=True)[field.name]
    told = default_of(item)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if default is None:
        assert item.body.startswith("Default: found.")
    else:
        assert told is not None
        document = parse_document(f"{field.name}: {told}", file="x.yaml")
        loaded = read_settings([document])
        assert loaded.faults == ()
        assert getattr(loaded.settings, field.name) == default
    assert {word for word in words_of(kind) if word not in item.body} == set()
    if found := bounds(kind):
        told_bounds = {"max_body": "1KiB to 4GiB"}.get(field.name, f"{found[0]} to {found[1]}")
        assert told_bounds in item.body


def test_examples_of_settings_are_good() -> None:
    """Whoever copies one has no faults."""
    for text in examples(SETTINGS):
        document = parse_document(text, file="x.yaml")
        assert isinstance(document, Document)
        loaded = read_settings([document])
        assert (loaded.faults, bool(loaded.sources)) == ((), True)


# The page llmstudio-recipe(5)

KINDS: Mapping[str, Any] = {"RECIPE FIELDS": Recipe, "LIMITS": Limits, "SANDBOX": Sandbox}
FIELDS = [(section, field) for section, kind in KINDS.items() for field in dataclasses.fields(kind)]


@pytest.mark.parametrize("section", KINDS)
def test_every_field_of_a_recipe_is_told_and_no_other(section: str) -> None:
    """A field, limit or relaxation that is added must be written about."""
    assert by_name(RECIPE, section).keys() == {field.name for field in dataclasses.fields(KINDS[section])}


@pytest.mark.parametrize(("section", "field"), FIELDS, ids=lambda part: getattr(part, "name", part))
def test_field_has_the_default_the_words_and_the_bounds_of_the_code(section: str, field: Any) -> None:
    """The same for recipes; None as the default means that the daemon decides, which is said in words or not at all."""
    item = by_name(RECIPE, section)[field.name]
    kind = get_type_hints(KINDS[section], include_extras=True)[field.name]
    if isinstance(field.default, bool | int | str):
        assert default_of(item) == (
            str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
        )
    else:
        assert default_of(item) is None
    assert {word for word in words_of(kind) if word not in item.body} == set()
    if found := bounds(kind):
        assert f"{found[0]} to {found[1]}" in item.body


@pytest.mark.parametrize("field", dataclasses.fields(Recipe), ids=lambda field: field.name)
def test_field_has_its_other_spellings(field: "dataclasses.Field[Any]") -> None:
    """Each alias stands beside its field, and nothing else does."""
    head = by_name(RECIPE, "RECIPE FIELDS")[field.name].head
    told = head.partition(" Pq Cm ")[2].replace(",", " ").split()
    assert set(told) == {alias for alias, name in ALIASES.items() if name == field.name}


def test_lora_adapters_are_told() -> None:
    """Their two keys, with the bounds of the scale."""
    body = by_name(RECIPE, "RECIPE FIELDS")["lora"].body
    assert {field.name for field in dataclasses.fields(LoraAdapter) if field.name not in body} == set()
    assert "-1000 to 1000, default 1.0" in body


def test_what_no_recipe_may_say_is_told() -> None:
    """Names of programs, variables of the environment, and flags."""
    fields, told = sections(RECIPE)["RECIPE FIELDS"], plain(sections(RECIPE)["ENVIRONMENT"])
    assert {key for key in (*NAMES_OF_BINARIES, *IGNORED) if not re.search(rf"\b{key}\b", fields)} == set()
    named = re.findall(r"[A-Z][A-Z_]+", told.partition("names that begin")[2].partition("Everybody")[0])
    assert named == [start for start, _ in DENIED_ENVIRONMENT]
    flags = plain(sections(RECIPE)["FLAGS"].partition("Among them are")[2].partition(".It")[0])
    refused = re.findall(r"[a-z][a-z-]+", flags.replace(" and ", " "))
    assert len(refused) > 8
    assert all((found := find_flag(flag)) and found.flag.denied for flag in refused), refused


def test_examples_of_recipes_are_good() -> None:
    """Whoever copies one has no faults and no warnings."""
    texts = examples(RECIPE)
    assert len(texts) >= 4
    for text in texts:
        loaded = parse_recipe_bytes(text.encode(), file="x.json" if text.startswith("{") else "x.yaml")
        assert loaded.faults == ()
        assert [entry.warnings for entry in loaded.entries] == [()] * len(loaded.entries)


# The page llmstudioctl(1)


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of the commands; in place of one that has commands of its own those, by both words."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                below = {f"{name} {word}": each for word, each in commands(inner).items()}
                found |= below or {name: inner}
    return found


PARSER = ctl._parser()
COMMANDS = commands(PARSER)


def spelled(option: str) -> str:
    """Return an option as mdoc has it: the first dash is the macro's."""
    return option.removeprefix("-")


def command_parts() -> dict[str, str]:
    """Return what the page says of each command, its options included."""
    parts = re.split(r"^\.It Cm ([a-z]+(?: [a-z-]+)?)", sections(CTL)["COMMANDS"], flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_command_is_told_and_no_other() -> None:
    """In the order of the parser."""
    assert list(command_parts()) == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_told_and_no_other(name: str) -> None:
    """Each spelling of each option below its command; those of all commands stand in the description."""
    common = {option for action in PARSER._actions for option in action.option_strings}
    own = {option for action in COMMANDS[name]._actions for option in action.option_strings} - common
    heads = re.findall(r"^\.It Fl (.*)$", command_parts()[name], re.MULTILINE)
    told = {word for head in heads for word in re.sub(r" Ar \S+", "", head).replace(",", " ").split()}
    assert told == {spelled(option) for option in own}


def test_options_of_all_commands_are_told() -> None:
    """With the socket's default and the variable that names another."""
    heads = re.findall(r"^\.It Fl (.*)$", sections(CTL)["DESCRIPTION"], re.MULTILINE)
    told = {word for head in heads for word in re.sub(r" Ar \S+", "", head).replace(",", " ").split()}
    assert told == {spelled(option) for action in PARSER._actions for option in action.option_strings}
    assert {DEFAULT_SOCKET, SOCKET_VARIABLE} <= set(sections(CTL)["DESCRIPTION"].split())


def test_operands_are_told() -> None:
    """A command that takes a model, a name or files says so, and no other does."""
    for name, parser in COMMANDS.items():
        operands = {action.dest for action in parser._actions if not action.option_strings}
        head = command_parts()[name].partition("\n")[0]
        told = ("Ar model" in head, head.endswith("Ar name"), head.endswith(("Op Ar", "Ar file")))
        assert told == ("model" in operands, "name" in operands, "file" in operands), name


def kinds() -> dict[str, type[LlmstudioError]]:
    """Return every kind of error that anybody can be told."""
    classes = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, LlmstudioError)]
    return {kind.kind: kind for kind in classes}


def kinds_of_http() -> dict[str, int]:
    """Return the kinds that the HTTP layer adds, with their status, from its source."""
    text = "\n".join(path.read_text() for path in sorted((PACKAGE / "http").glob("*.py")))
    found = re.findall(r"^    kind, status\b.* = \"(\w+)\", (\d+)", text, re.MULTILINE)
    return {kind: int(status) for kind, status in found}


def test_every_exit_code_is_told_with_its_kinds() -> None:
    """What a script can branch on."""
    told: dict[int, set[str]] = {}
    for item in re.split(r"^\.It ", sections(CTL)["EXIT STATUS"], flags=re.MULTILINE)[1:]:
        number, _, body = item.partition("\n")
        named = re.findall(r"^\.Pq Sy ([\w ,]+)", body, re.MULTILINE)
        told[int(number)] = {word for part in named for word in re.findall(r"\w+", part)}
    expected: dict[int, set[str]] = {0: set(), 130: set()}
    for kind in [*kinds(), *kinds_of_http()]:
        expected.setdefault(EXIT_CODES.get(kind, 1), set()).add(kind)
    assert told == expected
    assert {kind: EXIT_CODES.get(kind, 1) for kind in kinds()} == {
        kind: error.exit_code for kind, error in kinds().items()
    }


def test_every_state_is_told() -> None:
    """In the order in which a healthy model passes them."""
    assert re.findall(r"^\.It Sy (\w+)", sections(CTL)["STATES"], re.MULTILINE) == [str(state) for state in State]


def test_every_reason_is_told() -> None:
    """What a failed model's ``kind`` can be: found in logs, by exit codes, or before the start."""
    told = set(re.findall(r"^\.It Sy (\w+)", sections(CTL)["REASONS"], re.MULTILINE))
    source = (PACKAGE / "core" / "reasons.py").read_text()
    planned = (PACKAGE / "adapters" / "planner.py").read_text()
    expected = {kind for kind, *_ in reasons._RULES} | set(re.findall(r'Failure\("(\w+)"', source))
    expected |= set(re.findall(r'"failure": "(\w+)"', planned)) | {"bad_model_file"}
    assert told == expected


# The page llmstudiod(8)


def test_every_kind_of_error_is_told_with_its_status() -> None:
    """What a client can branch on."""
    rows = re.findall(r"^\.It (\w+) Ta (\d+) Ta ", sections(DAEMON)["ERROR KINDS"], re.MULTILINE)
    expected = {kind: error.status for kind, error in kinds().items()} | kinds_of_http()
    assert {kind: int(status) for kind, status in rows} == expected
    assert [int(status) for _, status in rows] == sorted(int(status) for _, status in rows)


def test_every_unit_is_told() -> None:
    """Those that are installed, with their addresses, and those that are made."""
    text = sections(DAEMON)["UNITS"]
    named = set(re.findall(r"^\.It Pa (\S+)(?: Ns Ar \w+ Ns Pa (\S+))?$", text, re.MULTILINE))
    installed = {
        (path.name, "") for path in (ROOT / "systemd").iterdir() if path.suffix in {".service", ".socket", ".slice"}
    }
    drop_ins = {
        (f"/etc/systemd/system/{PREFIX}.service.d/*.conf", ""),
        (f"/etc/systemd/system/{PREFIX}", ".service.d/*.conf"),
    }
    assert named == installed | drop_ins | {(PREFIX, ".service"), ("llmstudio-question-", ".service")}
    assert (SLICE, "") in named
    for path in (ROOT / "systemd").glob("*.socket"):
        for address in re.findall(r"^ListenStream=(.+)$", path.read_text(), re.MULTILINE):
            assert address in plain(text), address


def test_options_of_the_daemon_are_told() -> None:
    """From its source: the parser is made inside the program."""
    tree = ast.parse((PACKAGE / "daemon" / "main.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    options = {
        str(argument.value)
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"
        for argument in call.args
        if isinstance(argument, ast.Constant)
    }
    heads = re.findall(r"^\.It Fl (.*)$", sections(DAEMON)["DESCRIPTION"], re.MULTILINE)
    told = {word for head in heads for word in re.sub(r" Ar \S+", "", head).replace(",", " ").split()}
    assert told == {spelled(option) for option in options | {"-h", "--help"}}
    assert f".Pa {DEFAULT_FILE} ." in sections(DAEMON)["DESCRIPTION"].splitlines()


def test_variables_of_the_environment_are_told() -> None:
    """Each one that the programs look at, in the page of the program."""
    pattern = re.compile(r"environ(?:ment)?(?:\.get|\.pop)?[\[(]\"([A-Z_]+)\"|_VARIABLE = \"([A-Z_]+)\"")
    for page, parts in ((DAEMON, ("daemon", "privileged")), (CTL, ("ctl",))):
        files = [path for part in parts for path in sorted((PACKAGE / part).glob("*.py"))]
        names = {name for path in files for match in pattern.findall(path.read_text()) for name in match if name}
        assert names
        assert {name for name in names if name not in sections(page)["ENVIRONMENT"]} == set()


def test_exit_codes_of_the_daemon_are_told() -> None:
    """A unit's status shows them."""
    told = re.findall(r"^\.It (\d+)$", sections(DAEMON)["EXIT STATUS"], re.MULTILINE)
    assert told == ["0", "1", "2", str(errors.ConfigError.exit_code)]


# All pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_has_one_sentence_a_line(page: Path) -> None:
    """So that a change shows what it changes."""
    prose = [line for line in page.read_text().splitlines() if not line.startswith(".")]
    assert [line for line in prose if re.search(r"[a-z)]\. [A-Z]", line)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_refers_to_pages_that_exist(page: Path) -> None:
    """Our own pages by their names; systemd's are systemd's."""
    own = {(path.stem, path.suffix[1:]) for path in PAGES}
    named = set(re.findall(r"^\.Xr (\S+) (\d)", page.read_text(), re.MULTILINE))
    assert {name for name in named if name[0].startswith("llmstudio")} <= own
    assert own - {(page.stem, page.suffix[1:])} <= named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_man_has_nothing_to_complain_of(page: Path) -> None:
    """As lintian asks it."""
    if shutil.which("man") is None or shutil.which("groff") is None:
        pytest.skip("man or groff is not installed")
    argv = ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", str(page)]
    environment = {"LC_ALL": "C.UTF-8", "MANWIDTH": "80", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(argv, env=environment, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_mandoc_has_nothing_to_complain_of(page: Path) -> None:
    """The other program that shows manual pages; its rules of style are another house's."""
    program = shutil.which("mandoc")
    if program is None:
        pytest.skip("mandoc is not installed")
    done = subprocess.run(
        [program, "-T", "lint", "-W", "warning", page], check=False, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "")
