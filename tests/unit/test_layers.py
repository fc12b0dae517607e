"""The layers: who may import whom, read from the source. The order is the one of the architecture note."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "llmstudiod"
MAX_LINES = 600

# Pure modules take time, files and numbers as arguments, so that a test can choose them.
CORE_MAY_NOT = {
    "asyncio", "concurrent", "http", "io", "logging", "multiprocessing", "os", "pathlib", "random", "secrets", "select",
    "shutil", "signal", "socket", "ssl", "subprocess", "tempfile", "threading", "time", "urllib",
}  # fmt: skip
# Text in, values out: pure as well, but slow to import, so nobody who only wants the values may depend on them.
READERS = {"core.yaml_lines": {"yaml"}, "core.validation": {"pydantic"}}
USERS_OF_READERS = {"core.recipe_reader", "core.settings_reader"}

# What the modules of a layer may import from the package, by the longest prefix that fits; a name stands for itself
# and everything below it. `llmstudiod` alone is the package's __init__, with the version.
ALLOWED: dict[str, set[str]] = {
    "core": {"core"},
    "launchers": {"launchers", "core", "adapters.binary", "adapters.proc"},
    "adapters": {"adapters", "core", ""},
    "adapters.planner": {"adapters", "core", "launchers.base"},
    "runs": {"runs", "adapters", "core", "launchers.base"},
    "supervisor": {"supervisor", "runs", "adapters", "core", "launchers.base"},
    "http": {"http", "supervisor", "adapters", "core", "launchers", ""},
    "daemon": {"daemon", "http", "supervisor", "adapters", "core", "launchers", ""},
    # Programs of their own beside the daemon.
    "privileged": {"privileged", "core"},
    "ctl": {"ctl", "adapters", "launchers.subprocess", "core", ""},
    "demo": {"demo", "core"},
    "demo.__main__": {"demo", "ctl.client", "core"},
    "engine": {"engine", "core"},
}


def modules() -> dict[str, Path]:
    """Return the files of the package by the names of their modules, without the package's own name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def imported(path: Path) -> set[str]:
    """Return the full names of what a file imports, wherever in the file it does so."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            base = node.module or ""
            names |= {f"{base}.{alias.name}" if _is_module(f"{base}.{alias.name}") else base for alias in node.names}
    return names


def _is_module(name: str) -> bool:
    return name.startswith(f"{PACKAGE}.") and name.removeprefix(f"{PACKAGE}.") in MODULES


def own_imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports; the empty name is the package's __init__."""
    names = {name for name in imported(path) if name.split(".")[0] == PACKAGE}
    return {name.removeprefix(PACKAGE).removeprefix(".") for name in names}


def is_below(name: str, layer: str) -> bool:
    """Return whether a module is the layer or stands below it."""
    return name == layer or (layer != "" and name.startswith(f"{layer}."))


GRAPH = {name: own_imports(path) for name, path in MODULES.items()}


def test_package_was_found() -> None:
    """The tests below read something."""
    assert {"core.scheduler", "supervisor", "daemon.main", "http.proxy", "launchers.base", ""} <= MODULES.keys()
    assert "core.events" in GRAPH["core.scheduler"]


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_module_imports_its_own_layer_and_lower_ones(module: str) -> None:
    """Each module belongs to a layer, and imports nothing above it."""
    layer = max((layer for layer in ALLOWED if is_below(module, layer)), key=len, default=None)
    assert layer is not None, f"{module} belongs to no layer: add it to ALLOWED"
    upward = {name for name in GRAPH[module] if not any(is_below(name, allowed) for allowed in ALLOWED[layer])}
    assert upward == set()


@pytest.mark.parametrize("program", ["daemon", "ctl", "demo", "engine", "privileged"])
def test_nobody_imports_a_program(program: str) -> None:
    """What is built at the top is not reached for from below; only the demonstration talks as llmstudioctl does."""
    users = {name for name, targets in GRAPH.items() if any(is_below(target, program) for target in targets)}
    assert {name for name in users if not is_below(name, program)} <= {"demo.__main__"}


@pytest.mark.parametrize("module", [name for name in MODULES if is_below(name, "core")])
def test_core_is_pure(module: str) -> None:
    """The core does no input or output, knows no clock, and needs nothing but the standard library."""
    roots = {name.split(".")[0] for name in imported(MODULES[module])} - {PACKAGE}
    assert roots & CORE_MAY_NOT == set()
    assert roots - sys.stdlib_module_names == READERS.get(module, set())


def test_core_is_quick_to_import_without_the_readers() -> None:
    """A launch needs no pydantic and no YAML, which take longer to import than everything else together."""
    core = {name for name in MODULES if is_below(name, "core")}
    users = {name for name in core if GRAPH[name] & (READERS.keys() | USERS_OF_READERS)}
    assert users <= READERS.keys() | USERS_OF_READERS


def test_core_opens_no_file() -> None:
    """Nor does it call the built-in functions that need no import."""
    for module, path in MODULES.items():
        if is_below(module, "core"):
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            named = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
            assert named & {"open", "print", "input", "exec", "eval", "__import__"} == set(), module


def test_privileged_part_can_be_read_in_ten_minutes() -> None:
    """All that runs as root, beside the pure core, which cannot do anything: at most 500 lines."""
    used = {name for name in MODULES if is_below(name, "privileged")}
    while more := {target for name in used for target in GRAPH[name] if target and not is_below(target, "core")} - used:
        used |= more
    assert sum(len(MODULES[name].read_text().splitlines()) for name in used) <= 500, sorted(used)


def test_there_is_no_cycle() -> None:
    """No module imports itself by way of others."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in GRAPH.get(module, set()):
                visit(target, (*path, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_module_can_be_read_in_one_go(module: str) -> None:
    """A file that is longer than this does more than one job."""
    assert len(MODULES[module].read_text().splitlines()) <= MAX_LINES
