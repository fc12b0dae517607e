"""What is fuzzed: one function for each target, which returns quietly or finds a bug."""

import json
import tempfile
from pathlib import Path

from llmstudiod.core.binary_answers import Answer
from llmstudiod.core.errors import LlmstudioError
from llmstudiod.core.launcher_protocol import parse_request
from llmstudiod.core.recipe_reader import parse_recipe_bytes
from llmstudiod.privileged import units
from llmstudiod.privileged.store import Store


class Launcher:
    """The launcher with an empty configuration, and systemd's programs replaced by a list of what was run."""

    def __init__(self, directory: Path) -> None:
        self.ran: list[tuple[str, ...]] = []
        (directory / "recipes.d").mkdir()
        (directory / "state").mkdir()
        config = directory / "llmstudiod.yaml"
        config.write_text(
            json.dumps({"recipes_dir": f"{directory}/recipes.d", "model_dirs": [], "keys_file": "/proc/x"})
        )
        self._units = units.Units(Store(str(config), directory / "state", owner=directory.stat().st_uid))
        units._run = self._run

    def _run(self, *argv: str) -> Answer:
        self.ran.append(argv)
        return 1, ""

    def take(self, line: bytes) -> None:
        """Do what a line asks; only a refusal may come of it, or the stop of a unit of ours."""
        self.ran.clear()
        try:
            request = parse_request(line)
            self._units.perform(request)
        except LlmstudioError:
            pass
        for argv in self.ran:
            assert not any(word.startswith("--unit=llmstudio-model-") for word in argv), argv
            assert argv[0] != "systemctl" or argv[-1].startswith("llmstudio-model-"), argv


def new_launcher() -> Launcher:
    """Return a launcher in a directory of its own."""
    return Launcher(Path(tempfile.mkdtemp(prefix="llmstudiod-fuzz-")))


def read_recipe(raw: bytes) -> None:
    """Read a recipe file; every fault is told, and a recipe that is good survives being kept."""
    for name in ("f.yaml", "f.json"):
        loaded = parse_recipe_bytes(raw, file=name)
        for fault in loaded.faults:
            assert str(fault)
        for entry in loaded.entries:
            kept = json.loads(json.dumps(entry.recipe.as_dict()))
            assert type(entry.recipe).from_dict(kept).as_dict() == entry.recipe.as_dict()
