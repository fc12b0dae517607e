"""How models are named on disk: shards of a set, and the id of a model that has no recipe."""

import posixpath
import re

from llmstudiod.core.recipe import ID_PATTERN

SHARD_NAME = re.compile(r"(?P<base>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)
MAX_SHARDS = 1000

_SHARD_STEM_END = re.compile(r"-[0-9]{5}-of-[0-9]{5}\Z")


def shard_name(base: str, number: int, count: int) -> str:
    """Return the name of one part of a model.

    >>> shard_name("big", 1, 2)
    'big-00001-of-00002.gguf'
    """
    return f"{base}-{number:05d}-of-{count:05d}.gguf"


def all_shards(path: str) -> list[str]:
    """Return the paths of all parts of the model of which ``path`` is one, or ``path`` itself when it is whole."""
    name = SHARD_NAME.fullmatch(posixpath.basename(path))
    if name is None:
        return [path]
    count = int(name["count"])
    directory = posixpath.dirname(path)
    numbers = range(1, min(count, MAX_SHARDS) + 1)
    return [posixpath.join(directory, shard_name(name["base"], number, count)) for number in numbers]


def id_from_stem(stem: str) -> str | None:
    """Return the id of a model without a recipe, from its file's name; None when no letter or digit is in it.

    >>> id_from_stem("Qwen3 8B (new)-Q4_K_M-00001-of-00002")
    'qwen3-8b-new-q4_k_m'
    """
    name = re.sub(r"(?:[^a-z0-9._]|-)+", "-", _SHARD_STEM_END.sub("", stem).lower())
    model_id = name.lstrip("._-")[:63].rstrip("._-")
    return model_id if re.fullmatch(ID_PATTERN, model_id) else None
