"""The daemon's settings: files, drop-ins, environment, each fault's place, and the file that is installed."""
# ruff: noqa: E501 - a table reads best with one case a line

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llmstudiod.adapters.settings_file import load_settings
from llmstudiod.core.model_spec import LifecycleDefaults, lifecycle_defaults
from llmstudiod.core.recipe import Fault, Severity
from llmstudiod.core.settings import LoadedSettings, Settings
from tests.unit.test_yaml_lines import BOMB

INSTALLED = Path(__file__).parents[2] / "etc" / "llmstudiod.yaml"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the settings file belongs."""
    return tmp_path / "llmstudiod.yaml"


def load(file: Path, text: str, environment: dict[str, str] | None = None) -> LoadedSettings:
    """Write the settings file and load it."""
    file.write_text(text)
    return load_settings(file, environment)


def test_no_file_means_defaults(file: Path) -> None:
    """Nothing has to be configured."""
    for text in (None, "", "# nothing\n"):
        if text is not None:
            file.write_text(text)
        assert load_settings(file) == LoadedSettings(Settings(), {}, ())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("idle_timeout: 1h 30m", {"idle_timeout": 5400.0}),
        ("idle_timeout: 0", {"idle_timeout": 0.0}),
        ("idle_timeout: off", {"idle_timeout": 0.0}),
        ("max_body: 1GiB", {"max_body": 1 << 30}),
        ("max_body: 4096", {"max_body": 4096}),
        ("model_dirs: [/a, /b]", {"model_dirs": ("/a", "/b")}),
        ("model_dirs: /a, /b", {"model_dirs": ("/a", "/b")}),
        ("listen: []", {"listen": ()}),
        ("llama_server: /usr/bin/llama-server", {"llama_server": "/usr/bin/llama-server"}),
        ("llama_server:", {}),
        ("auto_recipes: no", {"auto_recipes": False}),
        ("launcher: subprocess", {"launcher": "subprocess"}),
        ("log_level: debug", {"log_level": "debug"}),
        ("reserved_memory: 1GiB", {"reserved_memory": {"gpu": 1 << 30, "ram": 1 << 30}}),
        ("reserved_memory: 0", {"reserved_memory": {"gpu": 0, "ram": 1 << 30}}),
        (
            "reserved_memory: {ram: 2GiB, 1: 3GiB, GPU-ab-1: 0}",
            {"reserved_memory": {"gpu": 512 << 20, "ram": 2 << 30, "1": 3 << 30, "GPU-ab-1": 0}},
        ),
        (
            "groups: {x: {members: [a, b.c], together: never}}",
            {"groups": {"x": {"together": "never", "members": ["a", "b.c"]}}},
        ),
    ],
)
def test_value_is_read_as_people_write_it(line: str, expected: dict[str, Any], file: Path) -> None:
    """Durations and sizes have units, lists may be texts."""
    loaded = load(file, line)
    assert loaded.faults == ()
    assert loaded.settings == dataclasses.replace(Settings(), **expected)


@pytest.mark.parametrize(
    ("line", "key", "words", "hint"),
    [
        ("idle_timeout: soon", "idle_timeout", "expected a duration such as 90s, 10m or 1h 30m, found 'soon'", "600s is used"),
        ("idle_timeout: true", "idle_timeout", "expected a duration such as 90s or 10m, found true", "600s is used"),
        ("idle_timeout: [1]", "idle_timeout", "expected a duration such as 90s or 10m, found [1]", "600s is used"),
        ("idle_timeout:", "idle_timeout", "expected a value, found nothing", "600s is used"),
        ("runtime_dir: rt", "runtime_dir", "expected an absolute path, found 'rt'", "/run/llmstudio-models is used"),
        ("model_dirs: /a,models", "model_dirs", "expected an absolute path, found 'models'", "/srv/models"),
        ("drain_timeout: 9999999d", "drain_timeout", "expected a duration of at most 3650d, found '9999999d'", "60s is used"),
        ("load_stall_timeout: 0", "load_stall_timeout", "expected a duration of 1s or more, found the number 0", "120s is used"),
        ("reserved_memory: lots", "reserved_memory", "gpu: expected a size such as 512MiB or 2G, found 'lots'", "gpu: 512.0 MiB, ram: 1.0 GiB is used"),
        ("reserved_memory: {vram: 1G}", "reserved_memory", "expected a size for each GPU, or sizes by `ram`, `gpu`, a GPU's index or its UUID, found 'vram'", "is used"),
        ("groups: [a, b]", "groups", "expected groups by their names, each with `members: [ids of models]`", "no group is used"),
        ("groups: {x: [a, b]}", "groups", "x: expected `members: [ids of models]` and `together: never` or `together: always`, found ['a', 'b']", "is used"),
        ("groups: {x: {members: [a, b], together: maybe}}", "groups", "x: together: expected never or always, found 'maybe'", "is used"),
        ("groups: {x: {members: [a], together: never}}", "groups", "x: members: expected a list of two or more ids of models, found", "is used"),
        ("groups: {x: {members: [a, B!], together: never}}", "groups", "x: members: expected a list of two or more ids", "is used"),
        ("groups: {x: {members: [a, b], together: never}, y: {members: [b, a], together: always}}", "groups", "are in a group that says never and in one that says always", "is used"),
        ("max_body: lots", "max_body", "expected a size such as 512MiB or 2G, found 'lots'", "64.0 MiB is used"),
        ("max_body: 10", "max_body", "expected a size from 1KiB to 4GiB, found the number 10", "64.0 MiB is used"),
        ("max_queue: -1", "max_queue", "expected a whole number from 0 to 100000, found the number -1", "64 is used"),
        ("max_queue: yes", "max_queue", "expected a whole number from 0 to 100000, found true", "64 is used"),
        ("launcher: docker", "launcher", "expected 'auto', 'systemd' or 'subprocess', found 'docker'", "auto is used"),
        ("auto_recipes: maybe", "auto_recipes", "expected true or false, found 'maybe'", "true is used"),
        ("model_dirs: 5", "model_dirs", "expected a list, each item text, found the number 5", "/srv/models"),
        ("model_dirs: [/a, 5]", "model_dirs.1", "expected text, found the number 5", "/srv/models"),
        ("recipes_dir: [a]", "recipes_dir", 'expected text, found ["a"]', "/etc/llmstudio/recipes.d is used"),
        ("idle-timeout: 5", "idle-timeout", "there is no such setting, it has no effect", "did you mean idle_timeout?"),
        ("zzz: 5", "zzz", "there is no such setting, it has no effect", "the comments in the installed llmstudiod.yaml list the settings"),
    ],
)  # fmt: skip
def test_faulty_setting_keeps_its_default_and_is_told(line: str, key: str, words: str, hint: str, file: Path) -> None:
    """The daemon always comes up: file, line, key, what was found, what was expected, what is used instead."""
    loaded = load(file, f"# first line\n{line}\nlog_level: debug\n")
    assert loaded.settings == Settings(log_level="debug")
    (fault,) = loaded.faults
    assert (fault.file, fault.line, fault.key, fault.severity) == (str(file), 2, key, Severity.FAULT)
    assert words in fault.message
    assert hint in str(fault.hint)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("- a", 1, 'expected settings as `name: value`, found ["a"]'),
        ("# x\nhello", 2, "expected settings as `name: value`, found 'hello'"),
        ("idle_timeout: 5\nidle_timeout: 6", 2, "'idle_timeout' is given twice, first in line 1"),
        ("model_dirs: [/a", 1, "the file ends too early"),
        (BOMB, 1, "found more"),
    ],
)
def test_unreadable_file_means_defaults_and_is_told(text: str, line: int, words: str, file: Path) -> None:
    """A file that is no list of settings changes nothing."""
    loaded = load(file, text)
    assert loaded.settings == Settings()
    assert (loaded.faults[0].line, words in loaded.faults[0].message) == (line, True)


def test_dead_link_is_told(file: Path) -> None:
    """A settings file that leads nowhere is not the same as none."""
    file.symlink_to("nowhere")
    assert load_settings(file).faults == (Fault("cannot read the file: No such file or directory", str(file)),)


def test_usage_is_kept_for_as_long_as_is_set(file: Path) -> None:
    """Thirty days, or another time; less than an hour is a slip of the pen."""
    assert load(file, "").settings.usage_keep == 30 * 86400.0
    assert load(file, "usage_keep: 90d").settings.usage_keep == 90 * 86400.0
    loaded = load(file, "usage_keep: 5m")
    assert "1h or more" in loaded.faults[0].message
    assert loaded.settings.usage_keep == 30 * 86400.0


def test_later_files_win_and_are_named(file: Path) -> None:
    """Drop-ins come after the file, in the order of their names; each value's source is known."""
    directory = file.with_name("llmstudiod.yaml.d")
    directory.mkdir()
    file.write_text("max_queue: 1\nmax_instances: 1\nlog_level: debug")
    (directory / "20.yaml").write_text("max_queue: 3")
    (directory / "10.yaml").write_text("max_queue: 2\nmax_instances: 2")
    (directory / "30.yml").write_text("max_queue: 4")
    loaded = load_settings(file)
    assert (loaded.settings.max_queue, loaded.settings.max_instances, loaded.settings.log_level) == (3, 2, "debug")
    assert loaded.sources == {
        "max_queue": str(directory / "20.yaml"),
        "max_instances": str(directory / "10.yaml"),
        "log_level": str(file),
    }
    file.unlink()
    assert load_settings(file).settings.max_queue == 3, "drop-ins count without the file too"


def test_environment_wins_in_development_only(file: Path) -> None:
    """``LLMSTUDIO_<SETTING>`` overrides where it is asked for; other variables are not ours."""
    environment = {"LLMSTUDIO_MAX_QUEUE": "5", "LLMSTUDIO_MODEL_DIRS": "/a,/b", "LLMSTUDIO_X": "1", "MAX_QUEUE": "7"}
    loaded = load(file, "max_queue: 1", environment)
    assert (loaded.settings.max_queue, loaded.settings.model_dirs, loaded.faults) == (5, ("/a", "/b"), ())
    assert loaded.sources["max_queue"] == "the environment"
    assert load_settings(file).settings.max_queue == 1
    (fault,) = load(file, "", {"LLMSTUDIO_IDLE_TIMEOUT": "soon"}).faults
    assert (fault.file, fault.key) == ("the environment", "idle_timeout")


def test_recipes_inherit_the_life_cycle_settings() -> None:
    """The defaults stand in one place: those of the settings are those of the life cycle."""
    assert lifecycle_defaults(Settings()) == LifecycleDefaults()
    assert lifecycle_defaults(Settings(idle_timeout=5, max_queue=3)) == LifecycleDefaults(idle_timeout_s=5, max_queue=3)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    values=st.dictionaries(
        st.sampled_from([field.name for field in dataclasses.fields(Settings)]) | st.text(max_size=5),
        VALUES,
        max_size=5,
    )
)
@hypothesis_settings(max_examples=200, deadline=None)
def test_any_values_give_settings(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever a settings file holds, there are settings."""
    path = tmp_path_factory.getbasetemp() / "any-settings.yaml"
    path.write_text(yaml.safe_dump(values))
    assert isinstance(load_settings(path).settings, Settings)


# The file that is installed


def commented_settings() -> dict[str, str]:
    """Return name and value of each setting that the installed file shows, commented out."""
    return dict(re.findall(r"^#([a-z_]+):(.*)$", INSTALLED.read_text(), re.MULTILINE))


def test_installed_file_names_every_setting_and_no_other() -> None:
    """The file is the list of settings, in the order of the code."""
    assert list(commented_settings()) == [field.name for field in dataclasses.fields(Settings)]


def test_installed_file_changes_nothing_and_shows_the_defaults(file: Path) -> None:
    """As installed it sets nothing; with every comment sign taken away it sets each setting to its default."""
    text = INSTALLED.read_text()
    assert load(file, text) == LoadedSettings(Settings(), {}, ())
    loaded = load(file, "\n".join(f"{name}:{value}" for name, value in commented_settings().items()))
    assert (loaded.settings, loaded.faults) == (Settings(), ())
    assert set(loaded.sources) == set(commented_settings())


def test_installed_file_explains_every_setting() -> None:
    """One line above each setting says what it is for."""
    lines = INSTALLED.read_text().splitlines()
    for name in commented_settings():
        at = next(index for index, line in enumerate(lines) if line.startswith(f"#{name}:"))
        assert re.match(r"# [A-Z].*\.$", lines[at - 1]), name
