"""API keys: what their file may hold, whose a secret is, and what a key may do."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmstudiod.adapters.key_file import read_keys
from llmstudiod.core.errors import ConfigError
from llmstudiod.core.keys import Key, hash_of, holder, parse_keys, write_keys

HASH = "sha256:" + "a" * 64
GOOD = {"name": "laptop", "hash": HASH}


def test_keys_are_read_as_they_were_written() -> None:
    """Names, rights and times; of a secret the hash alone."""
    keys = (
        Key("laptop", hash_of("one"), created=1.5),
        Key("ci", hash_of("two"), admin=True, metrics=True, models=("a", "b"), expires=9.0),
    )
    text = write_keys(keys)
    assert parse_keys(text) == keys
    assert "one" not in text


def test_file_that_another_could_have_written_is_refused(tmp_path: Path) -> None:
    """Whoever can write it could let anybody in."""
    path = tmp_path / "keys"
    path.write_text("[]")
    assert read_keys(path) == ()
    path.chmod(0o660)
    with pytest.raises(ConfigError, match="expected root alone to write it") as caught:
        read_keys(path)
    assert "chmod 640" in str(caught.value.hint)
    path.chmod(0o640)
    if os.getuid() == 0:  # only root can give files away
        os.chown(path, 12345, 12345)
        with pytest.raises(ConfigError, match="found uid 12345"):
            read_keys(path)


@pytest.mark.parametrize("text", ["[]", " [] \n"])
def test_empty_file_holds_no_keys(text: str) -> None:
    """Then the endpoint is open to this machine."""
    assert parse_keys(text) == ()


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ("", "not valid JSON"),  # a file that was cut off must not open the endpoint
        (" \n", "not valid JSON"),
        ("{", "not valid JSON"),
        ("{}", "expected a list"),
        ("[" * 100_000, "not valid JSON"),
        ([5], "key 1: expected admin"),
        ([{"name": "a"}], "key 1: expected admin"),
        ([GOOD, {**GOOD, "secret": "x"}], "key 2: expected admin"),
        ([{**GOOD, "name": "a b"}], "key 1 has a value that does not fit"),
        ([{**GOOD, "name": 5}], "does not fit"),
        ([{**GOOD, "hash": "secret"}], "does not fit"),
        ([{**GOOD, "hash": HASH + "\n"}], "does not fit"),
        ([{**GOOD, "admin": "yes"}], "does not fit"),
        ([{**GOOD, "admin": 1}], "does not fit"),
        ([{**GOOD, "models": "a"}], "does not fit"),
        ([{**GOOD, "models": [5]}], "does not fit"),
        ([{**GOOD, "expires": -1}], "does not fit"),
        ([{**GOOD, "expires": True}], "does not fit"),
        ([{**GOOD, "expires": "never"}], "does not fit"),
        ([GOOD, {**GOOD, "hash": "sha256:" + "b" * 64}], "two keys have one name"),
        ([GOOD, {**GOOD, "name": "other"}], "two keys have one hash"),
        ([GOOD] * 1001, "at most 1000"),
    ],
)
def test_faulty_file_is_refused_as_a_whole(raw: object, says: str) -> None:
    """Half of the keys would be as wrong as none."""
    with pytest.raises(ConfigError, match=says):
        parse_keys(raw if isinstance(raw, str) else json.dumps(raw))


@given(st.text(max_size=60) | st.recursive(st.none() | st.text(), st.lists).map(json.dumps))
def test_any_text_is_keys_or_is_refused(text: str) -> None:
    """Nothing else is raised."""
    try:
        parse_keys(text)
    except ConfigError:
        pass


def test_secret_tells_its_holder() -> None:
    """The whole secret and nothing else, whatever bytes it holds."""
    keys = (Key("a", hash_of("one")), Key("b", hash_of("two")))
    found = holder(keys, "two")
    assert found is not None
    assert found.name == "b"
    for wrong in ("", "tw", "two ", "TWO", "\udcff", HASH, hash_of("two")):
        assert holder(keys, wrong) is None


def test_key_may_be_for_some_models_and_some_time() -> None:
    """By any of a model's names; without a list by all."""
    key = Key("a", HASH, models=("gpt-4o",), expires=100.0)
    assert key.may_use(("tiny", "gpt-4o"))
    assert not key.may_use(("tiny",))
    assert Key("a", HASH).may_use(("tiny",))
    assert not key.is_expired(99.9)
    assert key.is_expired(100.0)
    assert not Key("a", HASH).is_expired(1e11)


@pytest.mark.parametrize(
    "keys",
    [
        (Key("a", HASH, expires=1e14),),
        (Key("a", HASH, models=("m",) * 1001),),
        tuple(Key(f"k{n}", hash_of(str(n))) for n in range(1001)),
        (Key("a", HASH), Key("a", hash_of("b"))),
        (Key("not a name", HASH),),
    ],
    ids=["far end", "models", "keys", "two of one name", "name"],
)
def test_what_could_not_be_read_is_not_written(keys: tuple[Key, ...]) -> None:
    """A file that is refused lets nobody in."""
    with pytest.raises(ConfigError):
        write_keys(keys)


def test_secret_may_hold_anything() -> None:
    """Half of a surrogate pair comes from JSON, or stands for a byte of a header that is no UTF-8."""
    for secret in ("\ud800", "\udcff"):
        assert holder((Key("a", HASH),), secret) is None
