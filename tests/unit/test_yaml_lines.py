"""YAML and JSON with lines: what is read, and each fault's place and words."""

import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmstudiod.adapters.documents import read_document
from llmstudiod.core.recipe import MAX_FILE_BYTES, Fault
from llmstudiod.core.yaml_lines import Document, parse_document

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(12)
)


def parsed(text: str, *, file: str = "x.yaml") -> Any:
    """Return the value of a text that must be readable."""
    document = parse_document(text, file=file)
    assert isinstance(document, Document), document
    return document.value


def fault(text: str, *, file: str = "x.yaml") -> Fault:
    """Return the fault of a text that must not be readable."""
    found = parse_document(text, file=file)
    assert isinstance(found, Fault)
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: [x, 2.5, true, null, ~]", {"a": 1, "b": ["x", 2.5, True, None, None]}),
        ("- a: 1\n- b", [{"a": 1}, "b"]),
        ("# only a comment", None),
        ("", None),
        ("a: &x {b: 1}\nc: *x", {"a": {"b": 1}, "c": {"b": 1}}),
        ("on: 1\nno: 2\n7: 3", {"on": 1, "no": 2, "7": 3}),
        (
            "a: 2026-01-31\nb: 2026-99-99\nc: 12:30\nd: =",
            {"a": "2026-01-31", "b": "2026-99-99", "c": "12:30", "d": "="},
        ),
        ("a: 0b_\nb: !!bool zzz\nc: !!int ''\nd: !!float ''", {"a": "0b_", "b": "zzz", "c": "", "d": ""}),
        (f"a: {'9' * 5000}\nb: 0x{'f' * 5000}", {"a": "9" * 5000, "b": "0x" + "f" * 5000}),
        ("a: !!str 5", {"a": "5"}),
        ("a: żółw 😀\r\nb: |\n  two\n  lines\n", {"a": "żółw 😀", "b": "two\nlines\n"}),
    ],
)
def test_text_is_read_as_people_mean_it(text: str, expected: object) -> None:
    """Dates, times of day and numbers of no use stay the text that was written."""
    assert parsed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{\n\t"a":\t1,\n\t"b": [true, null, -2.5]\n}', {"a": 1, "b": [True, None, -2.5]}),
        ('{"a":"\\ud83d\\ude00 \\u00e9 \\/ \\\\ud83d"}', {"a": "😀 é / \\ud83d"}),
        ('{"a":"\\\\\\ud83d\\ude00"}', {"a": "\\😀"}),
    ],
    ids=["tabs", "escapes", "escape after a backslash"],
)
def test_json_is_read(text: str, expected: object) -> None:
    """What JSON allows beyond YAML is read in files named .json: tabs, and emoji as json.dumps() escapes them."""
    assert parsed(text, file="x.json") == expected


@pytest.mark.parametrize(
    ("text", "line", "found", "hint"),
    [
        ("a: 1\nb: 2\na: 3", 3, "'a' is given twice, first in line 1", "keep one of them"),
        ("x:\n  a: 1\n  a: 2", 3, "'a' is given twice, first in line 2", "keep one of them"),
        ("a:\n\tb: 1", 2, "expected spaces, found a tab", "indent with spaces"),
        ("a: 1\nb: [1, 2\n\n", 2, "the file ends too early", "left open"),
        ('a: 1\nb: "half', 2, "the file ends too early", "left open"),
        ("a: 1\n---\nb: 1", 2, "expected one document, found a second", "as a list"),
        ("a: b: c", 1, "mapping values are not allowed", "quote a value"),
        ("a: 1\n b: 2", 2, "mapping values are not allowed", "indent all keys alike"),
        ("a: @x", 1, "found character that cannot start any token", "double quotes"),
        ("a: *x", 1, "found undefined alias", "needs quotes"),
        (
            "a: 1\nb: !!python/object/apply:os.system [id]",
            2,
            "found the tag '!!python/object/apply:os.system'",
            "leave",
        ),
        ("a: !foo bar", 1, "expected a plain value, found the tag '!foo'", "leave the tag out"),
        ("a: !!int {b: 1}", 1, "found the tag '!!int'", "leave the tag out"),
        ("a: !!set {b}", 1, "found the tag '!!set'", "leave the tag out"),
        ("a: !!binary aGk=", 1, "found the tag '!!binary'", "leave the tag out"),
        ("<<: {a: 1}", 1, "expected a key, found <<", None),
        ("? [a]\n: 1", 1, "expected a plain word as a key", None),
        ("null: 1", 1, "expected a plain word as a key", None),
        ("a: 1\nb: \0", 2, "found the control character U+0000", "right file"),
        ("a: 1\nb: \x1b[0m", 2, "found the control character U+001B", "right file"),
        ("a: \ud800", 1, "found the control character U+D800", "right file"),
        ("a: &a [*a]", 1, "expected at most 20000 values and 20 levels, found more", None),
        (BOMB, 1, "expected at most 20000 values and 20 levels, found more", None),
        ("[" * 500_000, 1, "20 levels", None),
        ("{a: " * 200_000, 1, "20 levels", None),
        ("- " * 200_000, 1, "20 levels", None),
        ("? " * 200_000, 1, "20 levels", None),
        ("\n".join(" " * n + "a:" for n in range(1000)), 21, "20 levels", None),
        ("[" + "1," * 30_000 + "1]", 1, "20000 values", None),
    ],
)
def test_fault_has_line_words_and_hint(text: str, line: int, found: str, hint: str | None) -> None:
    """Each fault names the line, says what was found, and what to do."""
    told = fault(text)
    assert (told.file, told.line) == ("x.yaml", line)
    assert found in told.message
    assert (hint or "") in (told.hint or "")
    assert told.message.isprintable()


def test_json_fault_says_json() -> None:
    """The language of the file's name is the language of the fault."""
    assert fault('{"a": 1', file="x.json").message.startswith("not valid JSON: the file ends too early")
    assert fault("{a: 1", file="x.yaml").message.startswith("not valid YAML: the file ends too early")


def test_lines_are_those_of_keys_and_items() -> None:
    """Every key and item has its line; what does not stand in the file has the line of what holds it."""
    document = parse_document("a: 1\nb:\n  - x\n  - c: 2\n    d:\n      e: 3\n", file="x.yaml")
    assert isinstance(document, Document)
    places = [("a",), ("b",), ("b", 0), ("b", 1, "c"), ("b", 1, "d", "e"), ("b", 1, "zzz"), ("zzz",), ()]
    assert [document.line(place) for place in places] == [1, 2, 3, 4, 6, 4, 1, 1]


@pytest.mark.parametrize(
    ("content", "line", "found"),
    [
        (b"a: 1\nb: caf\xe9\n", 2, "expected UTF-8, found the byte 0xe9"),
        (b"\xff\xfea\0", 1, "expected UTF-8, found the byte 0xff"),
        (b"#" * (MAX_FILE_BYTES + 1), None, "expected a file of at most 1 MiB, found a longer one"),
    ],
    ids=["latin-1", "utf-16", "too long"],
)
def test_file_that_is_not_text_is_told(content: bytes, line: int | None, found: str, tmp_path: Path) -> None:
    """A file in another encoding, or far too long, is a fault with a hint."""
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    told = read_document(path)
    assert isinstance(told, Fault)
    assert (told.file, told.line, told.message) == (str(path), line, found)
    assert told.hint


def test_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    """A file of a Windows editor is read."""
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\n")
    document = read_document(path)
    assert isinstance(document, Document)
    assert document.value == {"a": 1}


def test_what_is_no_file_is_told_without_waiting(tmp_path: Path) -> None:
    """Directories, FIFOs, dead links and missing files are faults; a FIFO without a writer holds nobody up."""
    (tmp_path / "d.yaml").mkdir()
    os.mkfifo(tmp_path / "f.yaml")
    (tmp_path / "l.yaml").symlink_to("nowhere")
    assert stat.S_ISFIFO((tmp_path / "f.yaml").stat().st_mode)
    told = [read_document(tmp_path / name) for name in ("d.yaml", "f.yaml", "l.yaml", "no.yaml")]
    messages = [entry.message for entry in told if isinstance(entry, Fault)]
    assert len(messages) == 4
    assert "directory" in messages[0]
    assert messages[1] == "expected a regular file, found a directory, pipe or device"
    assert messages[2:] == ["cannot read the file: No such file or directory"] * 2


@given(text=st.text(max_size=300) | st.text(alphabet="{}[]:,-?!&*|>'\"%@` \n\tab1.<~=", max_size=120))
@settings(max_examples=500, deadline=None)
def test_any_text_gives_a_document_or_a_fault(text: str) -> None:
    """Whatever the text, nothing is raised and a fault is one printable line."""
    for file in ("x.yaml", "x.json"):
        found = parse_document(text, file=file)
        if isinstance(found, Fault):
            assert re.fullmatch(r"[^\n\r]+", found.message)
