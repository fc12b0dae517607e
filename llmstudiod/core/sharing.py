"""What the settings say of how models share the machine: memory that is left to others, and groups of models."""

import re
from collections.abc import Container, Mapping
from typing import Any

from llmstudiod.core.recipe import ID_PATTERN
from llmstudiod.core.units import parse_size_bytes

RESERVED: Mapping[str, int] = {"gpu": 512 << 20, "ram": 1 << 30}
"""Bytes that are left free on each GPU and of RAM: for the desktop, and for what the estimate does not know."""

NEVER, ALWAYS = "never", "always"

_DEVICE = re.compile(r"gpu|ram|\d{1,3}|(GPU|MIG)-[0-9A-Za-z/-]{1,80}")
_ID = re.compile(ID_PATTERN)
_RESERVED = "a size for each GPU, or sizes by `ram`, `gpu`, a GPU's index or its UUID"
_GROUP = "`members: [ids of models]` and `together: never` or `together: always`"


def reserved_memory(raw: Any) -> dict[str, int]:  # noqa: ANN401 - a value of YAML
    """Return bytes by ``ram``, ``gpu``, an index or a UUID; a bare size counts for each GPU.

    >>> reserved_memory({"ram": "2GiB", 0: "1GiB"}) == {"gpu": 512 << 20, "ram": 2 << 30, "0": 1 << 30}
    True

    Raises:
        ValueError: It is neither.
    """
    values = raw if isinstance(raw, Mapping) else {"gpu": raw}
    found = dict(RESERVED)
    for key, value in values.items():
        name = str(key)
        if isinstance(key, bool) or not _DEVICE.fullmatch(name):
            raise ValueError(f"expected {_RESERVED}, found '{name[:80]}'")
        try:
            found[name] = parse_size_bytes(value)
        except (ValueError, OverflowError):
            raise ValueError(f"{name}: expected a size such as 512MiB or 2G, found {str(value)[:80]!r}") from None
    return found


def reserved_on(reserved: Mapping[str, int], *, index: int, uuid: str) -> int:
    """Return the bytes that are left free on a GPU; what names it counts before what is said of all."""
    return reserved.get(uuid, reserved.get(str(index), reserved["gpu"]))


def groups(raw: Any) -> dict[str, dict[str, Any]]:  # noqa: ANN401 - a value of YAML
    """Return groups of models by their names, each as ``{"together": "never" | "always", "members": […]}``.

    >>> groups({"big": {"members": ["a", "b"], "together": "never"}})
    {'big': {'together': 'never', 'members': ['a', 'b']}}

    Raises:
        ValueError: It says something else; or of two models both that they never and that they always are together.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f"expected groups by their names, each with {_GROUP}, found {str(raw)[:80]!r}")
    found: dict[str, dict[str, Any]] = {}
    for name, group in raw.items():
        if not isinstance(group, Mapping) or group.keys() != {"members", "together"}:
            keys = ", ".join(map(str, group)) if isinstance(group, Mapping) else repr(group)
            raise ValueError(f"{name}: expected {_GROUP}, found {keys[:80]}")
        members, together = group["members"], group["together"]
        if together not in (NEVER, ALWAYS):
            raise ValueError(f"{name}: together: expected never or always, found {str(together)[:80]!r}")
        is_list = isinstance(members, list) and all(isinstance(each, str) and _ID.fullmatch(each) for each in members)
        if not is_list or len(set(members)) < 2:
            raise ValueError(
                f"{name}: members: expected a list of two or more ids of models, found {str(members)[:80]!r}"
            )
        found[str(name)] = {"together": together, "members": list(members)}
    for model in {each for group in found.values() for each in group["members"]}:
        excludes, companions = relations(found, model)
        if both := excludes & companions:
            raise ValueError(f"'{model}' and '{min(both)}' are in a group that says never and in one that says always")
    return found


def strangers(groups: Mapping[str, Mapping[str, Any]], models: Container[str]) -> list[tuple[str, str]]:
    """Return group and member for each member that is no model."""
    return [(name, each) for name, group in groups.items() for each in group["members"] if each not in models]


def relations(groups: Mapping[str, Mapping[str, Any]], model: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the models that may never be loaded beside one, and those that always are."""
    beside: dict[str, set[str]] = {NEVER: set(), ALWAYS: set()}
    for group in groups.values():
        if model in group["members"]:
            beside[group["together"]] |= {each for each in group["members"] if each != model}
    return frozenset(beside[NEVER]), frozenset(beside[ALWAYS])
