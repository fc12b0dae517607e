"""How the command line is taken apart: words of other programs are understood, and what is wrong says what is right."""

import argparse
import difflib
import re
from collections.abc import Collection, Sequence
from typing import NoReturn

_MEANT = {
    "start": "load",
    "run": "load",
    "up": "load",
    "stop": "unload",
    "down": "unload",
    "kill": "unload --force",
    "evict": "unload",
    "ps": "list",
    "ls": "list",
    "models": "list",
    "log": "logs",
    "events": "watch",
    "info": "status",
    "plan": "explain",
    "add": "recipe new",
    "create": "recipe new",
    "new": "recipe new",
    "edit": "recipe edit",
    "rm": "recipe delete",
    "remove": "recipe delete",
    "delete": "recipe delete",
    "keys": "key list",
    "recipes": "recipe show",
    "page": "web",
    "ui": "web",
}
"""What is meant by the words of ollama, docker, systemctl and the page."""
_CHOICE = re.compile(r"argument COMMAND: invalid choice: '(.*?)' \(choose from")


class UsageError(SystemExit):
    """The command line is wrong. Ends the program with 2, as argparse does, if nobody catches it."""

    def __init__(self, message: str, hint: str, usage: str) -> None:
        super().__init__(2)
        self.message, self.hint, self.usage = message, hint, usage


class Parser(argparse.ArgumentParser):
    """Raises what it would print."""

    def error(self, message: str) -> NoReturn:
        """Raise a UsageError."""
        wrong, hint = _CHOICE.match(message), f"`{self.prog} --help`"
        if wrong is not None:
            message = f"there is no command '{wrong[1]}'"
            if meant := self._meant(wrong[1]):
                hint = f"did you mean {meant}? {hint} lists the commands"
        raise UsageError(message, hint, self.format_usage())

    def _meant(self, word: str) -> str | None:
        if " " not in self.prog and word in _MEANT:
            return _MEANT[word]
        known = [name for action in self._actions for name in (action.choices or ())]
        return next(iter(difflib.get_close_matches(word, known, n=1)), None)


def words_of(given: Sequence[str]) -> list[str]:
    """Return the words as the parser takes them.

    ``help COMMAND`` is COMMAND's help; what from-command takes has a ``--`` before it, for its options are not ours.

    >>> words_of(["help", "load"]), words_of(["--json", "help"])
    (['load', '--help'], ['--json', '--help'])
    >>> words_of(["recipe", "from-command", "--save", "-m", "a.gguf"])
    ['recipe', 'from-command', '--save', '--', '-m', 'a.gguf']
    """
    words = list(given)
    first = _after_options(words, 0, alone={"--json"}, valued={"--socket"})
    if words[first : first + 1] == ["help"]:
        return [*words[:first], *words[first + 1 :], "--help"]
    if "from-command" not in words or "recipe" not in words[: words.index("from-command")]:
        return words
    place = _after_options(
        words,
        words.index("from-command") + 1,
        alone={"--save", "--json", "-h", "--help"},
        valued={"--id", "--socket"},
    )
    return [*words[:place], *(["--"] if place < len(words) and words[place] != "--" else []), *words[place:]]


def _after_options(words: Sequence[str], place: int, *, alone: Collection[str], valued: Collection[str]) -> int:
    """Return the place of the first word from ``place`` on that is none of our options, nor the value of one."""
    while place < len(words):
        word = words[place]
        if word in valued:
            place += 2
        elif word in alone or word.partition("=")[0] in valued:
            place += 1
        else:
            break
    return place
