"""What is read off a request's body, by parsing and by scanning."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmstudiod.core.errors import BadRequestError
from llmstudiod.http.body import (
    MAX_KEYS,
    MAX_NESTED,
    MAX_PARTS,
    MAX_WANTED_BYTES,
    TEMPLATE_TOKENS,
    RequestFacts,
    cost_tokens,
    read_json_facts,
    read_multipart_facts,
)

NEVER_PARSE = 0
FULL = 64 << 20
SECONDS = 5.0
"""What a body of 64 MiB may take in a thread on a busy machine; where each token costs a step it is a minute."""

_KEYS = st.sampled_from(["model", "stream", "max_tokens", "max_completion_tokens", "n_predict", "n", "messages", "é"])
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS | st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_SPACE = st.text(" \t\r\n", max_size=3)


@st.composite
def json_objects(draw: st.DrawFn) -> bytes:
    """Write a JSON object as clients do: any space, escapes or UTF-8, repeated keys."""
    members = draw(st.lists(st.tuples(_KEYS | st.text(max_size=5), _VALUES), max_size=6))
    is_ascii = draw(st.booleans())
    indent = draw(st.sampled_from([None, 1]))
    space = draw(_SPACE)
    texts = [
        f"{space}{json.dumps(key, ensure_ascii=is_ascii)}{space}:{space}"
        f"{json.dumps(value, ensure_ascii=is_ascii, indent=indent)}{space}"
        for key, value in members
    ]
    return f"{space}{{{','.join(texts) or space}}}{space}".encode("utf-8", "replace")


def outcome_of(body: bytes | bytearray, *, parse_up_to: int) -> RequestFacts | str:
    """Return the facts with those values that count, or the refusal of a value in them."""
    try:
        facts = read_json_facts(body, parse_up_to=parse_up_to)
    except BadRequestError as error:
        return error.message
    return facts._replace(values={"cost": cost_tokens(facts, body)})


@given(json_objects())
def test_scanning_agrees_with_parsing(body: bytes) -> None:
    """A body says the same whether it is small enough to be parsed or not."""
    parsed = outcome_of(body, parse_up_to=len(body))
    assert outcome_of(body, parse_up_to=NEVER_PARSE) == parsed
    assert outcome_of(bytearray(body), parse_up_to=NEVER_PARSE) == parsed  # as it comes from a client, in pieces


@given(st.binary(max_size=60) | st.text('{}[]":,\\truefalsn0123 model', max_size=60).map(str.encode))
def test_any_bytes_are_facts_or_a_bad_request(body: bytes) -> None:
    """Nothing but BadRequestError comes out of a body, and what can be parsed can be scanned."""
    scanned = outcome_of(body, parse_up_to=NEVER_PARSE)
    parsed = outcome_of(body, parse_up_to=len(body))
    if isinstance(parsed, RequestFacts) and b"NaN" not in body and b"Infinity" not in body:
        assert scanned == parsed or not _is_plain_utf8(body)


def _is_plain_utf8(body: bytes) -> bool:
    """json.loads also takes UTF-16, UTF-32 and a byte order mark; no client of ours sends them."""
    return not body.startswith(b"\xef\xbb\xbf") and b"\0" not in body


both = pytest.mark.parametrize("parse_up_to", [NEVER_PARSE, 1 << 20], ids=["scanned", "parsed"])


@both
@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b'{"model":"a"}', "a"),
        (b'{"model":"a","model":"b"}', "b"),
        (b'{"model":"a","x":{"model":"b"},"y":[{"model":"c"}]}', "a"),
        (b'{"x":{"model":"b"},"y":[{"model":"c"}]}', None),
        (b'{"x":"\\"model\\":\\"b\\"","model":"a"}', "a"),
        (b'{"x":"\\\\","model":"a"}', "a"),
        (b'{"x":"}]","model":"a"}', "a"),
        (b'{"x":["}","]",{"y":"]"}],"model":"a"}', "a"),
        (b'{"mod\\u0065l":"a"}', "a"),
        (b'{"model":"\\u00e4\\n\\ud83d\\ude00"}', "ä\n😀"),
        ('{"model":"ä"}'.encode(), "ä"),
        (b'{"Model":"a"}', None),
        (b'{"model":""}', None),
        (b'{"model":null}', None),
        (b"{}", None),
        (b" \r\n\t{ }\n", None),
    ],
)
def test_model(body: bytes, model: str | None, parse_up_to: int) -> None:
    """The model is the value of the last key "model" of the outermost object."""
    assert read_json_facts(body, parse_up_to=parse_up_to).model == model


@both
@pytest.mark.parametrize("value", [b"1", b"true", b"[]", b'{"a":1}', b"[[[[1]]]]", b"[" * 900 + b"]" * 900])
def test_model_that_is_no_text(value: bytes, parse_up_to: int) -> None:
    """A model that is no text is refused, with what was found."""
    with pytest.raises(BadRequestError, match=r"^model: expected the name of a model, found "):
        read_json_facts(b'{"model":' + value + b"}", parse_up_to=parse_up_to)


@both
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b'{"model"',
        b'{"model":',
        b'{"model":"a"',
        b'{"model":"a",',
        b'{"model":"a",}',
        b'{"model":"a"}}',
        b'{"model":"a"} x',
        b"{model:1}",
        b"{'model':'a'}",
        b'{"model":"a" "b":1}',
        b'{"model" "a"}',
        b'{"model":a}',
        b'{"model":01}',
        b'{"model":"a}',
        b'{"model":"\\x"}',
        b'{"model":[}',
        b'{"model":"\xff"}',
        b'{"x":[1,2}',
        b'{"stream":truee}',
        b'{"n":' + b"9" * 5000 + b"}",
        b'{"model":' + b"[" * 100_000,
    ],
)
def test_malformed_body(body: bytes, parse_up_to: int) -> None:
    """What is no JSON is refused before a model is started for it."""
    with pytest.raises(BadRequestError):
        read_json_facts(body, parse_up_to=parse_up_to)


@both
@pytest.mark.parametrize("body", [b"[]", b'"model"', b"1", b"null", b'[{"model":"a"}]', b"model=a"])
def test_body_that_is_no_object(body: bytes, parse_up_to: int) -> None:
    """Only an object can name a model."""
    with pytest.raises(BadRequestError):
        read_json_facts(body, parse_up_to=parse_up_to)


def test_position_of_a_fault_when_parsed() -> None:
    """A parsed body's fault is told by line and column."""
    with pytest.raises(BadRequestError, match="line 2, column 3"):
        read_json_facts(b'{"model":"a",\n  oops}')


def test_position_of_a_fault_when_scanned() -> None:
    """A scanned body's fault is told by byte."""
    with pytest.raises(BadRequestError, match="at byte 16"):
        read_json_facts(b'{"model":"a",\n  oops}', parse_up_to=NEVER_PARSE)


@both
def test_deep_nesting_is_answered(parse_up_to: int) -> None:
    """A million brackets are facts or a bad request, never a crash."""
    body = b'{"model":"a","x":' + b"[" * 500_000 + b"]" * 500_000 + b"}"
    found = outcome_of(body, parse_up_to=parse_up_to * 2)
    if parse_up_to == NEVER_PARSE:
        assert isinstance(found, RequestFacts)
        assert found[:2] == ("a", False)
    else:
        assert "not valid JSON" in str(found)


@pytest.mark.parametrize(
    "value",
    [
        b'"data:image/png;base64,' + b"iVBORw0K" * (20 << 17) + b'"',
        b'"' + rb"\n" * (10 << 20) + b'"',
        b'"' + rb"a\"" * (7 << 20) + b'"',
        b'[{"content":"' + b"iVBORw0K" * (20 << 17) + b'"}]',
    ],
    ids=["base64", "escapes", "quotes", "nested"],
)
def test_large_body_is_scanned_fast(value: bytes) -> None:
    """20 MB of image or text hold other requests up for less than a second."""
    body = b'{"messages":' + value + b',"stream":true,"model":"a"}'
    began = time.perf_counter()
    assert read_json_facts(body)[:2] == ("a", True)
    assert time.perf_counter() - began < 1.0


def filled(before: bytes, piece: bytes, after: bytes) -> bytes:
    """Return a body of 64 MiB, most of it the same piece again and again."""
    return before + piece * ((FULL - len(before) - len(after)) // len(piece)) + after


@pytest.mark.parametrize(
    "body",
    [
        filled(b"{", b'"":1,', b'"model":"a"}'),
        filled(b'{"x":[', b"[],", b'[]],"model":"a"}'),
        filled(b'{"x":', b"[", b""),
        filled(b'{"x":[', b'{"":0},', b'0],"model":"a"}'),
        filled(b'{"model":[', b'"",', b'""]}'),
        filled(b'{"model":"', b"x", b'"}'),
        filled(b'{"x":["', rb"\n", b""),
        filled(b'{"x":[', b'"",', b""),
    ],
    ids=["keys", "lists", "depth", "objects", "list as model", "long model", "open text", "open list"],
)
def test_hostile_body_is_refused_fast(body: bytes) -> None:
    """Nobody keeps us busy for a minute with a body that only looks like a request."""
    began = time.perf_counter()
    with pytest.raises(BadRequestError):
        read_json_facts(body)
    assert time.perf_counter() - began < SECONDS


@pytest.mark.parametrize(
    "body",
    [
        filled(b'{"x":[', b'"",', b'""],"model":"a"}'),
        filled(b'{"x":[', b'"a b",', b'""],"model":"a"}'),
        filled(b'{"x":[', rb'"\n",', b'""],"model":"a"}'),
        filled(b'{"x":["', rb"\na", b'"],"model":"a"}'),
        filled(b'{"x":["', rb"\n" * 65 + b'","', b'"],"model":"a"}'),
        filled(b'{"prompt":[', b"15339, 22, ", b'1],"model":"a"}'),
        filled(b'{"x":[{"url":"data:', b"iVBORw0K", b'"}],"model":"a"}'),
        filled(b'{"', b"k", b'":1,"model":"a"}'),
        filled(b'{"x":1', b" ", b',"model":"a"}'),
    ],
    ids=["empty", "short", "escape", "escapes", "many escapes", "token ids", "image", "key", "space"],
)
def test_odd_body_is_read_fast(body: bytes) -> None:
    """A body at the limit of what is taken by default is read in seconds, whatever it is filled with."""
    began = time.perf_counter()
    assert read_json_facts(body).model == "a"
    assert time.perf_counter() - began < SECONDS


def test_number_of_keys_is_limited() -> None:
    """Far more top-level keys than any request has are refused; the limit itself is allowed."""
    members = [b'"k":1'] * (MAX_KEYS - 1) + [b'"model":"a"']
    assert read_json_facts(b"{" + b",".join(members) + b"}", parse_up_to=NEVER_PARSE).model == "a"
    with pytest.raises(BadRequestError, match=f"more than {MAX_KEYS} keys"):
        read_json_facts(b"{" + b",".join([*members, b'"k":1']) + b"}", parse_up_to=NEVER_PARSE)


def test_number_of_lists_is_limited() -> None:
    """The lists and objects of all values count together; the limit itself is allowed."""
    lists = b'{"x":[' + b"[1]," * (MAX_NESTED - 2) + b'1],"model":"a","y":%s}'
    assert read_json_facts(lists % b"[]", parse_up_to=NEVER_PARSE).model == "a"
    with pytest.raises(BadRequestError, match=f"more than {MAX_NESTED} lists and objects"):
        read_json_facts(lists % b"[{}]", parse_up_to=NEVER_PARSE)


@given(
    st.integers(0, 300), st.sampled_from([b"a", rb"\n", rb"\"", rb"\\\\", b"[", rb"a\u00e4"]), st.integers(8000, 9000)
)
def test_texts_of_any_length_are_skipped(count: int, piece: bytes, plain: int) -> None:
    """Where a text is cut into pieces, and which of the patterns takes it, makes no difference."""
    text = b'"' + piece * count + b"x" * plain + piece + b'"'
    body = b'{%s:1,"x":[%s,{%s:%s}],"y":%s,"model":"a"}' % (text, text, text, text, text)
    assert read_json_facts(body, parse_up_to=NEVER_PARSE).model == "a"


@both
@pytest.mark.parametrize(
    ("body", "is_stream"),
    [(b'{"stream":true}', True), (b'{"stream":false}', False), (b'{"stream":1}', False), (b'{"stream":"true"}', False)],
)
def test_stream(body: bytes, is_stream: bool, parse_up_to: int) -> None:
    """A client streams when it says so with a boolean."""
    assert read_json_facts(body, parse_up_to=parse_up_to).is_stream is is_stream


@both
@pytest.mark.parametrize(
    ("members", "generated"),
    [
        ({}, None),
        ({"max_tokens": 10}, 10),
        ({"max_completion_tokens": 10}, 10),
        ({"n_predict": 10}, 10),
        ({"max_tokens": 10, "n_predict": 30}, 30),
        ({"max_tokens": 30, "max_completion_tokens": 10}, 30),
        ({"max_tokens": None, "max_completion_tokens": 10}, 10),
        ({"max_tokens": 0}, 0),
        ({"max_tokens": -1}, None),
        ({"max_tokens": 10, "n_predict": -1}, None),
        ({"max_tokens": 10.5}, None),
        ({"max_tokens": "10"}, None),
        ({"max_tokens": 10, "n": 1}, 10),
        ({"max_tokens": 10, "n": None}, 10),
        ({"max_tokens": 10, "n": 2}, None),
        ({"max_tokens": 10, "n_cmpl": 2}, None),
    ],
)
def test_cost_is_an_upper_bound(members: dict[str, Any], generated: int | None, parse_up_to: int) -> None:
    """A request costs at most its bytes and what it lets be generated; without a limit, all that there is."""
    body = json.dumps(members | {"prompt": "hello"}).encode()
    expected = None if generated is None else len(body) + generated + TEMPLATE_TOKENS
    assert cost_tokens(read_json_facts(body, parse_up_to=parse_up_to), body) == expected


@both
def test_media_have_no_bound(parse_up_to: int) -> None:
    """How many tokens an image becomes is not to be read off its bytes."""
    body = b'{"max_tokens": 5, "messages": [{"content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}'
    assert cost_tokens(read_json_facts(body, parse_up_to=parse_up_to), body) is None


def form(*fields: tuple[str, bytes]) -> bytes:
    """Return a multipart body."""
    parts = [b"--x\r\nContent-Disposition: " + head.encode() + b"\r\n\r\n" + value for head, value in fields]
    return b"\r\n".join(parts) + b"\r\n--x--\r\n"


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (form(('form-data; name="model"', b"whisper")), "whisper"),
        (form(("form-data; name=model", b"whisper")), "whisper"),
        (form(('form-data; NAME="model"', b"whisper")), "whisper"),
        (form(('form-data; name="file"; filename="a.wav"', b"\0\xff" * 99), ('form-data; name="model"', b"w")), "w"),
        (form(('form-data; name="model"; x=y\r\nContent-Type: text/plain', b" w\n")), "w"),
        (form(('form-data; name="models"', b"whisper")), None),
        (form(('form-data; name="submodel"', b"whisper")), None),
        (form(('form-data; xname="model"', b"whisper")), None),
        (form(('form-data; name="model"', b"")), None),
        (form(), None),
        (b"", None),
    ],
)
def test_model_of_a_multipart_body(body: bytes, model: str | None) -> None:
    """The field "model" of a form is found wherever it stands."""
    assert read_multipart_facts(body).model == model


@pytest.mark.parametrize("end", [b"", b"\r\n", b"\r\n\r\n", b"\r\n\r\nwhisper"])
def test_multipart_body_that_ends_too_early(end: bytes) -> None:
    """A form cut off inside the field is refused, not guessed."""
    with pytest.raises(BadRequestError):
        read_multipart_facts(b'--x\r\nContent-Disposition: form-data; name="model"\r\n' + end)


@pytest.mark.parametrize("before", [b"", b";name=models" * 300])
def test_number_of_parts_is_limited(before: bytes) -> None:
    """64 MiB of parts are refused in no time."""
    part = b"\r\nContent-Disposition:" + before + b"\r\n"
    began = time.perf_counter()
    with pytest.raises(BadRequestError, match=f"more than {MAX_PARTS} parts"):
        read_multipart_facts(part * (FULL // len(part)))
    assert time.perf_counter() - began < 1.0


def test_long_name_in_a_form() -> None:
    """A name that is none is not carried through the catalogue."""
    with pytest.raises(BadRequestError, match=r"^model: expected the name of a model, found "):
        read_multipart_facts(form(('form-data; name="model"', b"m" * MAX_WANTED_BYTES * 2)))


@pytest.mark.parametrize(
    "body",
    [
        b"RIFF" * (5 << 20),
        b"\r\nContent-Disposition: " + b";name=model" * 100_000 + b"\n",
        b"\r\nContent-Disposition: " + b"; " * 500_000 + b"\n",
        b"\r\n" * (5 << 20),
    ],
    ids=["binary", "names", "semicolons", "lines"],
)
def test_multipart_body_is_searched_fast(body: bytes) -> None:
    """No form, however odd, holds other requests up for a second."""
    began = time.perf_counter()
    assert read_multipart_facts(body).model is None
    assert time.perf_counter() - began < 1.0
