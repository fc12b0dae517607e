"""Prometheus' text format. Source: prometheus.io/docs/instrumenting/exposition_formats, version 0.0.4."""

from collections.abc import Iterable, Mapping

Values = Iterable[tuple[Mapping[str, str], float]]


class Exposition:
    """Collects metrics; those without a value are left out."""

    KIND = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._lines: list[str] = []

    def gauge(self, name: str, text: str, values: Values) -> None:
        """Add a metric that goes up and down."""
        self._add(name, text, "gauge", values)

    def counter(self, name: str, text: str, values: Values) -> None:
        """Add a metric that only grows."""
        self._add(name, text, "counter", values)

    def text(self) -> str:
        """Return all of it."""
        return "\n".join(self._lines) + "\n"

    def _add(self, name: str, text: str, kind: str, values: Values) -> None:
        full = f"{self._prefix}_{name}"
        lines = [f"{full}{_labels(labels)} {value:.17g}" for labels, value in values]
        if lines:
            self._lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}", *lines]


def _labels(labels: Mapping[str, str]) -> str:
    r"""Return labels as the format wants them.

    >>> _labels({"model": 'a "b"\\n'})
    '{model="a \\"b\\"\\\\n"}'
    """
    pairs = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{pairs}}}" if pairs else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
