"""The daemon in a booted host, as its administrators and its clients see it. For the tests of this directory."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import openai

# Relative: without tests/__init__.py the absolute name differs between pytest and python -m.
from .host import Host  # noqa: TID252

T = TypeVar("T")

SERVICE = "llmstudiod.service"
SOCKETS = ("llmstudiod.socket", "llmstudiod-admin.socket", "llmstudio-launcher.socket")
BASE_URL = "http://127.0.0.1:8080"
RECIPES = "/etc/llmstudio/recipes.d"
MODELS = "/var/lib/llmstudio/models"
SETTINGS = "/etc/llmstudio/llmstudiod.yaml"


def unit_of(model: str) -> str:
    """The unit's name as people type it; not taken from the package, so that a change there is noticed."""
    return f"llmstudio-model-{model}.service"


def wait_until(condition: Callable[[], T | None], *, timeout_s: float = 15) -> T:
    """Poll until it holds, and return what it returned: what systemd does is not ours to await."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.03)
    return value


class Daemon:
    """llmstudiod in a host: its files, its units, its endpoint."""

    def __init__(self, host: Host) -> None:
        self.host = host

    # Files

    def use_settings(self, **settings: object) -> None:
        """Replace the settings file; JSON is YAML."""
        self.host.write(SETTINGS, json.dumps(settings))

    def put_recipe(self, recipe: Mapping[str, object] | str, *, file: str | None = None) -> str:
        """Write a recipe and return its path; a string is written as it is."""
        text = recipe if isinstance(recipe, str) else json.dumps(recipe)
        name = file or (f"{recipe['id']}.yaml" if not isinstance(recipe, str) else "recipe.yaml")
        self.host.write(f"{RECIPES}/{name}", text)
        return f"{RECIPES}/{name}"

    # Units

    def systemctl(self, *words: str, check: bool = True) -> str:
        """Run systemctl and return what it printed."""
        return self.host.run("systemctl", *words, check=check).stdout

    def listen(self) -> None:
        """Start the sockets alone."""
        self.systemctl("start", *SOCKETS)

    def show(self, unit: str, *names: str) -> dict[str, str]:
        """Return properties of a unit."""
        lines = self.systemctl("show", unit, *(f"--property={name}" for name in names)).splitlines()
        return {key: value for key, _, value in (line.partition("=") for line in lines)}

    def state(self, unit: str) -> str:
        """Return ActiveState."""
        return self.show(unit, "ActiveState")["ActiveState"]

    def pid(self, unit: str = SERVICE) -> int:
        """Return the unit's main pid as the host counts; 0 when it does not run."""
        return int(self.show(unit, "MainPID")["MainPID"])

    def model_units(self) -> list[str]:
        """Return the models' units that systemd knows of, running or failed."""
        output = self.systemctl("list-units", "--all", "--plain", "--no-legend", "llmstudio-model-*.service")
        return [" ".join(line.split()[:4]) for line in output.splitlines()]

    def starts_of(self, model: str) -> int:
        """Return how often the model's unit was started since boot, by the journal."""
        self.host.run("journalctl", "--sync")
        # MESSAGE_ID of "Started"; source: systemd's sd-messages.h, SD_MESSAGE_UNIT_STARTED.
        match = ("MESSAGE_ID=39f53479d3a045ac8e11786248231fbf", f"UNIT={unit_of(model)}")
        return len(self.host.run("journalctl", "--quiet", "--output=cat", *match).stdout.splitlines())

    def reset(self) -> None:
        """Stop everything, and forget recipes, settings, and what a daemon knows of before: pins, say."""
        self.systemctl("stop", *SOCKETS, SERVICE)
        self.systemctl("stop", "llmstudio-models.slice")
        self.systemctl("reset-failed")
        self.host.run("sh", "-c", f"rm -rf {RECIPES}/* {SETTINGS} /var/lib/llmstudio/state.db*")

    # Administration

    def ctl(self, *words: str, check: bool = True) -> str:
        """Run llmstudioctl and return what it printed."""
        done = self.host.run("llmstudioctl", *words, check=check)
        return done.stdout + done.stderr

    def status(self, model: str) -> dict[str, Any]:
        """Return one model's status."""
        shown: dict[str, Any] = json.loads(self.host.run("llmstudioctl", "status", "--json", model).stdout)
        return shown

    # The endpoint

    @contextlib.contextmanager
    def client(self) -> Iterator[openai.OpenAI]:
        """An ordinary client, in the host's network for as long as the block lasts."""
        with (
            self.host.network(),
            openai.OpenAI(base_url=f"{BASE_URL}/v1", api_key="none", max_retries=0, timeout=30) as client,
        ):
            yield client

    def chat(self, model: str = "tiny", *, max_tokens: int = 4) -> str:
        """Ask a model something and return its answer, which is never empty."""
        with self.client() as client:
            answer = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "a bird"}], max_tokens=max_tokens, seed=1
            )
        text = answer.choices[0].message.content
        assert text
        return text
