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

from llmstudiod.ctl.client import AnswerError
from llmstudiod.demo.tiny_gguf import write_tiny_gguf
from llmstudiod.http.spec import OPERATIONS, openapi
from llmstudiod.http.tcp_admin import SIGN_IN, SIGN_OUT
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
    routes |= {("post", path) for path in (SIGN_IN, SIGN_OUT)}  # of the endpoint's port, not of the application
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


NESTED = {
    "deep": b"[" * 4000,
    "deep object": b'{"a":' * 3000,
    "deep and whole": b'{"a":' + b"[" * 500 + b"]" * 500 + b"}",
}
SURROGATES = {"half a pair": "\\ud800", "the other half": "\\udc80", "within": "a\\udfffb"}
TAKING = [each for each in OPERATIONS if each.body is not None]


def _explicit(operation: Any) -> Iterator[bytes]:
    """Yield bodies that no generator comes upon: nested without end, and halves of surrogate pairs in each text."""
    yield from NESTED.values()
    schema = DOCUMENT["components"]["schemas"]
    name = "RecipeFile" if isinstance(operation.body, str) else operation.body.__name__
    for field in schema[name]["properties"]:
        for text in SURROGATES.values():
            yield f'{{"name": "a", "model": "tiny.gguf", "command": "x -m y", "{field}": "{text}"}}'.encode()
            yield f'{{"{text}": 1, "{field}": ["{text}"]}}'.encode()


@pytest.mark.parametrize("operation", TAKING, ids=lambda o: f"{o.method} {o.path}")
def test_bodies_that_nobody_thinks_of(daemon: RunningDaemon, secret: str, operation: Any) -> None:
    """They are refused as described, whoever sends them, and nothing is logged as a bug."""
    api = SCHEMA[operation.path][operation.method.upper()]
    headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
    for body in _explicit(operation):
        case = api.Case(path_parameters={"id": "tiny"} if "{id}" in operation.path else {})
        answer = case.call(
            base_url=f"http://127.0.0.1:{daemon.port}", headers=headers, timeout=60, data=body, json=None
        )
        case.validate_response(answer, checks=CHECKS)
        assert answer.status_code == 400, (body[:100], answer.text)
    assert "Traceback" not in daemon.log()


def test_calculation_beyond_all_bounds_is_the_askers_mistake(daemon: RunningDaemon) -> None:
    """The largest values that are described are refused with their product."""
    question = {"model": "tiny.gguf", "context_length": 1 << 24, "max_num_seqs": 256}
    with pytest.raises(AnswerError, match="256 slots of 16777216 tokens") as caught:
        daemon.admin.post("vram-calculator", body=question)
    assert (caught.value.answer_kind, "estimate" in caught.value.message) == ("bad_request", False)


def test_refusals_are_described() -> None:
    """Each with the envelope that it has, wherever it can come."""
    problem = {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    for path, methods in DOCUMENT["paths"].items():
        for operation in methods.values():
            expected = {"400", "403"} | (set() if path == SIGN_OUT else {"401"})
            expected |= {"413"} if "requestBody" in operation and path != SIGN_IN else set()
            for status in expected:
                assert operation["responses"][status]["content"] == problem, (path, status)
    assert DOCUMENT["paths"][SIGN_IN]["post"]["security"] == []
    assert "Allow" in DOCUMENT["components"]["responses"]["MethodNotAllowed"]["headers"]
