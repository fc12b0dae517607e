"""The generated OpenAPI document: every route is in it, and thousands of requests made from it are answered as told."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from llmstudiod.demo.tiny_gguf import write_tiny_gguf
from llmstudiod.http.spec import OPERATIONS, openapi
from tests.integration.running_daemon import RunningDaemon, running_daemon

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
# Streams have no end, and these wait or compute for as long as they are told.
ENDLESS = {"/events", "/logs/{id}/stream", "/instances/{id}/live", "/wait-ready", "/benchmark"}
N_EXAMPLES = int(os.environ.get("LLMSTUDIO_SPEC_EXAMPLES", "60"))
HTTP = Path(__file__).parents[2] / "llmstudiod" / "http"
DOCUMENT = openapi()
KNOWN = ["tiny", "other", "nobody", "Tiny", "..", "a/b", "%00", "ä"]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    """A daemon with two models, and an admin key."""
    home = tmp_path_factory.mktemp("spec")
    (home / "models").mkdir()
    for name in ("tiny", "other"):
        write_tiny_gguf(home / "models" / f"{name}.gguf")
    with running_daemon(home, keys_file=str(home / "keys"), restart_limit=0) as running:
        yield running


@pytest.fixture(scope="module")
def secret(daemon: RunningDaemon) -> str:
    """The key."""
    return str(daemon.admin.post("keys", body={"name": "fuzz", "admin": True})["secret"])


def test_every_route_is_described(daemon: RunningDaemon) -> None:
    """And nothing else is; routes are told where they are made, as ``web.get("/path", …)``."""
    made = r'web\.(get|post|put|delete)\(\s*"([^"]+)"'
    routes = {found for file in HTTP.glob("*.py") for found in re.findall(made, file.read_text())}
    assert routes == {(each.method, each.path) for each in OPERATIONS}
    told = {(method.upper(), path) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert told == {(each.method.upper(), each.path) for each in OPERATIONS}
    assert daemon.admin.get("api", "spec") == DOCUMENT


def _with_known_names(document: dict[str, Any]) -> dict[str, Any]:
    """Half of the ids that are asked for are those of models that there are."""
    for path, methods in document["paths"].items():
        for operation in methods.values():
            for parameter in operation["parameters"]:
                if parameter["in"] == "path":
                    parameter["schema"] = {"anyOf": [{"enum": KNOWN[:3]}, {"type": "string", "minLength": 1}]}
        assert path.startswith("/")
    return document


SCHEMA = schemathesis.openapi.from_dict(_with_known_names(openapi()))


@pytest.mark.engine
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "operation", [each for each in OPERATIONS if each.path not in ENDLESS], ids=lambda o: f"{o.method} {o.path}"
)
def test_answers_are_as_described(daemon: RunningDaemon, secret: str, operation: Any) -> None:
    """No 500, no status and no field that the document does not tell, whatever is sent."""
    api = SCHEMA[operation.path][operation.method.upper()]
    base, headers = f"http://127.0.0.1:{daemon.port}", {"Authorization": f"Bearer {secret}"}

    @settings(
        max_examples=N_EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def attempt(case: Any) -> None:
        if operation.path == "/keys/{name}" and case.path_parameters.get("name") == "fuzz":
            return
        response = case.call(base_url=base, headers=headers, timeout=60)
        case.validate_response(response, checks=CHECKS)

    given(case=api.as_strategy())(attempt)()
