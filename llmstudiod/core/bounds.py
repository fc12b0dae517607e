"""Bounds in annotations, by the names of the package annotated_types, which takes 14 ms to import: too long here.

pydantic asks each for its schema; `llmstudiod.core.validation` puts them into words.
"""

from collections.abc import Callable
from typing import Any


class _Bounds:
    def __init__(self, **bounds: float) -> None:
        self.bounds = bounds

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:  # noqa: ANN401
        """Return the schema of the type with its bounds. Source: pydantic, "Custom types"."""
        return {**handler(source), **self.bounds}


class Ge(_Bounds):
    """A number of ``ge`` or more."""

    def __init__(self, ge: float) -> None:
        super().__init__(ge=ge)
        self.ge = ge


class Interval(_Bounds):
    """A number from ``ge`` to ``le``."""

    def __init__(self, *, ge: float, le: float) -> None:
        super().__init__(ge=ge, le=le)
        self.ge, self.le = ge, le


class Len(_Bounds):
    """A text or list of ``min_length`` to ``max_length``."""

    def __init__(self, min_length: int, max_length: int) -> None:
        super().__init__(min_length=min_length, max_length=max_length)
        self.min_length, self.max_length = min_length, max_length


class MaxLen(_Bounds):
    """A text or list of at most ``max_length``."""

    def __init__(self, max_length: int) -> None:
        super().__init__(max_length=max_length)
        self.max_length = max_length
