"""What parsed settings files mean: ``llmstudiod.yaml``, then its drop-ins, each later value winning.

A faulty setting never stops the daemon: it keeps its default, and the fault is told.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from llmstudiod.core import sharing
from llmstudiod.core.recipe import Fault
from llmstudiod.core.settings import LoadedSettings, Settings
from llmstudiod.core.units import format_bytes, parse_duration_s, parse_size_bytes
from llmstudiod.core.validation import shorten, validate
from llmstudiod.core.yaml_lines import Document

ENVIRONMENT_PREFIX = "LLMSTUDIO_"

_DURATIONS = frozenset(
    {
        "idle_timeout",
        "load_stall_timeout",
        "drain_timeout",
        "restart_window",
        "exit_idle",
        "wait_comment_interval",
        "usage_keep",
    }
)
_SIZES = frozenset({"max_body"})
_LISTS = frozenset({"model_dirs", "listen", "allowed_hosts", "cors_origins"})
_PATHS = frozenset({"recipes_dir", "model_dirs", "runtime_dir", "admin_socket", "launcher_socket", "keys_file"})
_WORDS: Mapping[str, str] = {
    "max_body": "a size from 1KiB to 4GiB",
    "load_stall_timeout": "a duration of 1s or more",
    "restart_window": "a duration of 1s or more",
    "wait_comment_interval": "a duration of 50ms or more",
    "usage_keep": "a duration of 1h or more",
}
_MAX_DURATION_S = 10 * 365 * 86400.0
_NAMES = tuple(field.name for field in dataclasses.fields(Settings))

# How each is read, and how it is shown.
_SHARING: Mapping[str, tuple[Callable[[Any], Any], Callable[[Any], str]]] = {
    "reserved_memory": (
        sharing.reserved_memory,
        lambda value: ", ".join(f"{name}: {format_bytes(size)}" for name, size in value.items()),
    ),
    "groups": (sharing.groups, lambda value: ", ".join(value) or "no group"),
}


def read_settings(
    documents: Iterable[Document | Fault], environment: Mapping[str, str] | None = None
) -> LoadedSettings:
    """Return the settings of the documents, in the order in which they count, and of ``LLMSTUDIO_<SETTING>``.

    ``environment`` is None in the installed service.
    """
    faults: list[Fault] = []
    settings, sources = Settings(), dict[str, str]()
    for document in documents:
        if isinstance(document, Fault):
            faults.append(document)
        else:
            settings = _apply(settings, document, sources, faults)
    if environment is not None:
        values = {
            key.removeprefix(ENVIRONMENT_PREFIX).lower(): value
            for key, value in sorted(environment.items())
            if key.startswith(ENVIRONMENT_PREFIX) and key.removeprefix(ENVIRONMENT_PREFIX).lower() in _NAMES
        }
        settings = _apply(settings, Document("the environment", values), sources, faults)
    return LoadedSettings(settings, sources, tuple(faults))


def _apply(settings: Settings, document: Document, sources: dict[str, str], faults: list[Fault]) -> Settings:
    if document.value is None:
        return settings
    if not isinstance(document.value, dict):
        found = f"expected settings as `name: value`, found {shorten(document.value)}"
        faults.append(Fault(found, document.file, document.line(())))
        return settings
    for name, raw in document.value.items():
        if name not in _NAMES:
            faults.append(_unknown(name, document))
            continue
        try:
            value = _converted(name, raw)
        except (ValueError, OverflowError) as error:
            faults.append(_kept(Fault(str(error), document.file, document.line((name,)), key=name), settings))
            continue
        result = validate(Settings, {name: value}, document=document, origins={}, words=_WORDS)
        if isinstance(result, list):
            faults += [_kept(fault, settings, name) for fault in result]
        else:
            settings = dataclasses.replace(settings, **{name: getattr(result, name)})
            sources[name] = document.file
    return settings


def _kept(fault: Fault, settings: Settings, name: str | None = None) -> Fault:
    name = name or str(fault.key)
    value = getattr(settings, name)
    if name in _DURATIONS:
        shown = f"{value:g}s"
    elif name in _SIZES:
        shown = format_bytes(value)
    elif name in _SHARING:
        shown = _SHARING[name][1](value)
    elif isinstance(value, bool):
        shown = shorten(value)
    else:
        shown = ", ".join(value) if isinstance(value, tuple) else str(value)
    return dataclasses.replace(fault, hint=f"until it is corrected, {shown} is used")


def _converted(name: str, raw: Any) -> Any:  # noqa: ANN401 - a value of YAML
    convert: Callable[[Any], Any]
    if raw is None and name != "llama_server":
        raise ValueError("expected a value, found nothing")
    if name in _DURATIONS:
        convert = duration
    elif name in _SIZES:
        convert = size
    elif name in _SHARING:
        convert = _SHARING[name][0]
    else:
        value = [part.strip() for part in raw.split(",") if part.strip()] if _is_list_text(name, raw) else raw
        return _absolute(name, value) if name in _PATHS else value
    return convert(raw)


def _is_list_text(name: str, raw: Any) -> bool:  # noqa: ANN401 - a value of YAML
    return name in _LISTS and isinstance(raw, str)


def _absolute(name: str, value: Any) -> Any:  # noqa: ANN401 - a value of YAML
    """Refuse a relative path: the daemon, systemd and the models' servers run in different directories."""
    for path in value if isinstance(value, list) and name in _LISTS else [value]:
        if isinstance(path, str) and not path.startswith("/"):
            raise ValueError(f"expected an absolute path, found {shorten(path)}")
    return value


def duration(raw: Any) -> float:  # noqa: ANN401 - a value of YAML
    """Return seconds; YAML reads a bare ``off`` as false, which is what people mean by it."""
    if not isinstance(raw, str | int | float) or raw is True:
        raise ValueError(f"expected a duration such as 90s or 10m, found {shorten(raw)}")
    seconds = 0.0 if raw is False else parse_duration_s(raw)
    if seconds > _MAX_DURATION_S:
        raise ValueError(f"expected a duration of at most 3650d, found {shorten(raw)}")
    return seconds


def size(raw: Any) -> int:  # noqa: ANN401 - a value of YAML
    """Return bytes."""
    try:
        return parse_size_bytes(raw)
    except (ValueError, OverflowError):
        raise ValueError(f"expected a size such as 512MiB or 2G, found {shorten(raw)}") from None


def _unknown(name: str, document: Document) -> Fault:
    close = difflib.get_close_matches(name, _NAMES, n=1)
    hint = f"did you mean {close[0]}?" if close else "the comments in the installed llmstudiod.yaml list the settings"
    return Fault(
        "there is no such setting, it has no effect", document.file, document.line((name,)), key=name, hint=hint
    )
