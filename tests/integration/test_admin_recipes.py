"""Recipes over HTTP: made, read, changed, checked and removed; what people wrote by hand is never touched."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from llmstudiod.demo.tiny_gguf import write_tiny_gguf
from tests.integration.running_daemon import RunningDaemon, running_daemon, wait_until

pytestmark = pytest.mark.engine


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    """A daemon with one GGUF and no recipe."""
    (tmp_path / "models").mkdir()
    write_tiny_gguf(tmp_path / "models" / "tiny.gguf")
    with running_daemon(tmp_path, auto_recipes=False) as running:
        yield running


@pytest.fixture
async def admin(daemon: RunningDaemon) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of the admin socket."""
    connector = aiohttp.UnixConnector(daemon.admin.socket_path)
    async with aiohttp.ClientSession("http://admin", connector=connector) as session:
        yield session


def recipe(daemon: RunningDaemon, model: str = "one", **changes: Any) -> dict[str, Any]:
    """Return a recipe of the small model."""
    path = str(daemon.home / "models" / "tiny.gguf")
    return {"id": model, "name": model.title(), "model_path": path, "max_model_len": 512} | changes


async def ask(admin: aiohttp.ClientSession, method: str, path: str, body: Any = None, **more: Any) -> tuple[int, Any]:
    """Send a request and return status and answer."""
    options = {"data": body} if isinstance(body, str) else {"json": body} if body is not None else {}
    async with admin.request(method, path, **options, **more) as answer:
        return answer.status, await answer.json()


YAML = {"headers": {"Content-Type": "application/yaml"}}


async def test_recipe_is_made_read_changed_and_removed(daemon: RunningDaemon, admin: aiohttp.ClientSession) -> None:
    """As vllm-studio's clients do it; each step is in force when its answer comes."""
    assert await ask(admin, "POST", "/recipes", recipe(daemon)) == (200, {"success": True, "id": "one"})
    status, shown = await ask(admin, "GET", "/recipes/one")
    assert (status, shown["max_model_len"], shown["status"], shown["name"]) == (200, 512, "stopped", "One")
    assert [item["id"] for item in (await ask(admin, "GET", "/recipes"))[1]] == ["one"]
    # A client that sends back what it got, with one thing changed.
    assert await ask(admin, "PUT", "/recipes/one", shown | {"max_model_len": 256}) == (
        200,
        {"success": True, "id": "one"},
    )
    shown = (await ask(admin, "GET", "/recipes/one"))[1]
    assert (shown["max_model_len"], "max_num_seqs" in shown["old"]) == (256, True)
    assert (await ask(admin, "POST", "/launch/one"))[1]["success"] is True
    assert await ask(admin, "DELETE", "/recipes/one") == (200, {"success": True})
    assert (await ask(admin, "GET", "/recipes/one"))[0] == 404
    assert list((daemon.home / "recipes.d").iterdir()) == []
    wait_until(lambda: daemon.admin.get("status")["instances"] == [])


async def test_put_creates_and_the_path_decides(daemon: RunningDaemon, admin: aiohttp.ClientSession) -> None:
    """The id of the body counts for POST alone."""
    assert await ask(admin, "PUT", "/recipes/two", recipe(daemon)) == (200, {"success": True, "id": "two"})
    assert (daemon.home / "recipes.d" / "two.yaml").exists()


def stored(daemon: RunningDaemon, model: str = "one") -> dict[str, Any]:
    """Return what the file of a recipe holds."""
    values: dict[str, Any] = yaml.safe_load((daemon.home / "recipes.d" / f"{model}.yaml").read_text())
    return values


async def test_what_a_client_changes_is_stored(daemon: RunningDaemon, admin: aiohttp.ClientSession) -> None:
    """Also a field that the recipe had not set; what the client left as it was read is not."""
    assert (await ask(admin, "POST", "/recipes", recipe(daemon)))[0] == 200
    shown = (await ask(admin, "GET", "/recipes/one"))[1]
    changes = {"max_num_seqs": 3, "kv_cache_dtype": "q8_0", "tensor_parallel_size": 2, "served_model_name": "uno"}
    assert (await ask(admin, "PUT", "/recipes/one", shown | changes))[0] == 200
    assert stored(daemon) == recipe(daemon) | changes
    shown = (await ask(admin, "GET", "/recipes/one"))[1]
    assert {name: shown[name] for name in changes} == changes
    assert (await ask(admin, "PUT", "/recipes/one", shown | {"kv_cache_dtype": "q4_0"}))[0] == 200
    assert (await ask(admin, "GET", "/recipes/one"))[1]["cache_type_k"] == "q4_0"


async def test_what_a_recipe_does_not_set_is_not_stored(daemon: RunningDaemon, admin: aiohttp.ClientSession) -> None:
    """A client that knows vllm-studio's fields alone sends back what it was shown in their place."""
    path = str(daemon.home / "models" / "tiny.gguf")
    assert (await ask(admin, "POST", "/recipes", {"id": "one", "model_path": path}))[0] == 200
    shown = (await ask(admin, "GET", "/recipes/one"))[1]
    assert (shown["max_model_len"], shown["max_num_seqs"]) == (32768, 256)
    ours = {"old", "state", "file", "warnings"}
    known = {name: value for name, value in shown.items() if name not in ours}
    assert (await ask(admin, "PUT", "/recipes/one", known | {"max_num_seqs": 3}))[0] == 200
    assert stored(daemon) == {"id": "one", "model_path": path, "max_num_seqs": 3}
    # Whoever has not been shown anything means what it says.
    assert (await ask(admin, "PUT", "/recipes/one", {"model_path": path, "max_model_len": 32768}))[0] == 200
    assert stored(daemon) == {"id": "one", "model_path": path, "max_model_len": 32768}


async def test_yaml_is_kept_as_it_is(daemon: RunningDaemon, admin: aiohttp.ClientSession) -> None:
    """Comments and order are its author's."""
    text = f"# mine\nid: one\nmodel_path: {daemon.home}/models/tiny.gguf  # small\nmax_model_len: 512\n"
    assert (await ask(admin, "PUT", "/recipes/one", text, **YAML))[0] == 200
    assert (daemon.home / "recipes.d" / "one.yaml").read_text().endswith(text)
    status, answer = await ask(admin, "PUT", "/recipes/other", text, **YAML)
    assert (status, "expected 'other'" in answer["detail"]) == (400, True)


@pytest.mark.parametrize(("method", "body"), [("PUT", {"max_model_len": 256}), ("DELETE", None)])
async def test_what_a_person_wrote_is_left_alone(
    daemon: RunningDaemon, admin: aiohttp.ClientSession, method: str, body: dict[str, Any] | None
) -> None:
    """A file by hand, and one of ours that was edited since."""
    assert (await ask(admin, "POST", "/recipes", recipe(daemon, "ours")))[0] == 200
    ours = daemon.home / "recipes.d" / "ours.yaml"
    ours.write_text(ours.read_text() + "# a note\n")
    theirs = daemon.home / "recipes.d" / "theirs.yaml"
    theirs.write_text("# by hand\n" + json.dumps(recipe(daemon, "theirs")))
    daemon.reload()
    before = {path: path.read_bytes() for path in (ours, theirs)}
    for model in ("ours", "theirs"):
        sent = None if body is None else recipe(daemon, model, **body)
        status, answer = await ask(admin, method, f"/recipes/{model}", sent)
        assert (status, "was written by hand" in answer["detail"]) == (403, True), answer
        assert answer["hint"]
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"id": "Not An Id"}, "id"),
        ({"model_path": 5}, "model_path"),
        ({"max_model_len": "many"}, "max_model_len"),
        ({"id": "../../etc/passwd"}, "id"),
        ({"env_vars": {"LD_PRELOAD": "/x"}}, "env_vars"),
        ({"env_vars": {"HARMLESS": "1"}}, "no environment variables over HTTP"),
        ({"sandbox": {"network": "host"}}, "no relaxation over HTTP"),
        ({"extra_args": {"log_file": "/x"}}, "log_file"),
        ({"model_path": "/etc/passwd"}, "model directories"),
        ({"extra_args": {"llama_bin": "/bin/sh"}}, "llama_bin"),
    ],
)
async def test_bad_recipe_is_refused(
    daemon: RunningDaemon, admin: aiohttp.ClientSession, changes: dict[str, Any], says: str
) -> None:
    """With every fault and where it is; nothing is written."""
    status, answer = await ask(admin, "POST", "/recipes", recipe(daemon, **changes))
    assert status in {400, 403}, answer
    assert says in answer["detail"] or says in json.dumps(answer.get("faults", [])), answer
    assert list((daemon.home / "recipes.d").iterdir()) == []
    status, answer = await ask(admin, "POST", "/recipes/check", recipe(daemon, **changes))
    assert (status, answer["ok"]) == (200, False)
    assert says in json.dumps(answer["faults"])


async def test_all_that_may_not_come_over_http_is_told(daemon: RunningDaemon, admin: aiohttp.ClientSession) -> None:
    """One answer names each of them by its key, as it does for any other fault."""
    changes: dict[str, Any] = {
        "env_vars": {"HARMLESS": "1"},
        "sandbox": {"network": "host"},
        "model_path": "/etc/passwd",
        "chat_template_file": "/etc/hosts",
    }
    for method, path in (("POST", "/recipes"), ("PUT", "/recipes/one")):
        status, answer = await ask(admin, method, path, recipe(daemon, **changes))
        assert (status, answer["kind"]) == (400, "config")
        assert {fault["key"] for fault in answer["faults"]} == changes.keys()
        assert answer["hint"]


@pytest.mark.parametrize("body", ["{", "[1]", '"x"', "5", ""])
async def test_what_is_no_recipe_is_refused(admin: aiohttp.ClientSession, body: str) -> None:
    """Neither JSON nor an object."""
    for path in ("/recipes", "/recipes/check"):
        status, answer = await ask(admin, "POST", path, body, headers={"Content-Type": "application/json"})
        assert (status, bool(answer["detail"])) == (400, True)


async def test_two_recipes_in_one_file_are_refused(daemon: RunningDaemon, admin: aiohttp.ClientSession) -> None:
    """One path is one recipe."""
    text = json.dumps([recipe(daemon, "one"), recipe(daemon, "two")])
    status, answer = await ask(admin, "POST", "/recipes", text, **YAML)
    assert (status, "expected one recipe, found 2" in answer["detail"]) == (400, True)


async def test_recipe_that_takes_anothers_name_is_refused(daemon: RunningDaemon, admin: aiohttp.ClientSession) -> None:
    """Names are unique over all files; it is a conflict, which no right of root's would mend."""
    assert (await ask(admin, "POST", "/recipes", recipe(daemon, "one", aliases=["gpt-4o"])))[0] == 200
    for method, path in (("POST", "/recipes"), ("PUT", "/recipes/two")):
        status, answer = await ask(admin, method, path, recipe(daemon, "two", aliases=["gpt-4o"]))
        assert (status, answer["kind"], "gpt-4o" in answer["detail"]) == (409, "conflict", True)
        assert answer["hint"] == "give one of them another name, or remove it"
        assert [(fault["key"], fault["severity"]) for fault in answer["faults"]] == [("aliases", "fault")]
    assert (await ask(admin, "PUT", "/recipes/one", recipe(daemon, "one", aliases=["gpt-4o", "mine"])))[0] == 200


async def test_new_recipe_never_takes_anothers_place(daemon: RunningDaemon, admin: aiohttp.ClientSession) -> None:
    """With ``If-None-Match: *`` of many at once one is stored; without it POST stores as old clients expect."""
    only_new = {"headers": {"If-None-Match": "*"}}
    posts = (
        ask(admin, "POST", "/recipes", recipe(daemon, "one", max_model_len=256 * n), **only_new) for n in (1, 2, 3)
    )
    answers = await asyncio.gather(*posts)
    assert sorted(status for status, _ in answers) == [200, 409, 409]
    refused = next(answer for status, answer in answers if status == 409)
    assert (refused["detail"], refused["kind"]) == ("there is a recipe 'one' already", "conflict")
    assert (await ask(admin, "POST", "/recipes", recipe(daemon, "one", max_model_len=1024)))[0] == 200
    assert (await ask(admin, "GET", "/recipes/one"))[1]["max_model_len"] == 1024


async def tagged(admin: aiohttp.ClientSession, model: str) -> str:
    """Return the tag of a recipe's text."""
    async with admin.get(f"/recipes/{model}/file") as answer:
        return answer.headers["ETag"]


async def test_recipe_that_was_changed_meanwhile_is_not_overwritten(
    daemon: RunningDaemon, admin: aiohttp.ClientSession
) -> None:
    """With ``If-Match`` of many at once one is stored, whose answer has the next tag; a removed one does not match."""
    async with admin.post("/recipes", json=recipe(daemon, "one")) as made:
        tag = made.headers["ETag"]
    assert tag == await tagged(admin, "one")
    text = f"# mine\r\nid: one\r\nmodel_path: {daemon.home}/models/tiny.gguf\r\n"
    seen = {"If-Match": tag}
    puts = (ask(admin, "PUT", "/recipes/one", f"{text}# {n}\n", headers=YAML["headers"] | seen) for n in (1, 2, 3))
    answers = await asyncio.gather(*puts)
    assert sorted(status for status, _ in answers) == [200, 412, 412]
    refused = next(answer for status, answer in answers if status == 412)
    assert (refused["detail"], refused["kind"]) == ("the recipe 'one' was changed meanwhile", "stale")
    for match in ("{}", '"other", W/{}', "*"):
        seen = {"If-Match": match.format(await tagged(admin, "one"))}
        async with admin.put("/recipes/one", data=text, headers=YAML["headers"] | seen) as put:
            assert (put.status, put.headers["ETag"]) == (200, await tagged(admin, "one"))
    assert (await ask(admin, "DELETE", "/recipes/one"))[0] == 200
    for match in (tag, "*"):
        status, answer = await ask(admin, "PUT", "/recipes/one", recipe(daemon), headers={"If-Match": match})
        assert (status, answer["detail"]) == (412, "the recipe 'one' was removed meanwhile")
    assert (await ask(admin, "PUT", "/recipes/one", recipe(daemon)))[0] == 200


@pytest.mark.parametrize(
    ("query", "changes", "key"),
    [
        ("", {"id": "one"}, None),
        ("?new=true", {"id": "one"}, "id"),
        ("?id=one", {"id": "one", "aliases": ["gpt-4o"]}, None),
        ("?id=one", {"id": "two"}, None),  # the path of a PUT decides
        ("", {"id": "two", "aliases": ["gpt-4o"]}, "aliases"),
        ("?new=true", {"id": "two", "aliases": ["mine", "one"]}, "aliases"),
        ("", {"id": "two", "served_model_name": "first"}, "served_model_name"),
        ("?new=true", {"id": "gpt-4o"}, "id"),
        ("?new=true", {"id": "broken"}, "id"),
        ("?id=broken", {"id": "broken"}, None),
        ("?new=true", {"id": "tiny"}, None),  # a GGUF without a recipe owns no name
    ],
)
async def test_name_that_is_taken_is_told_by_the_check(
    daemon: RunningDaemon, admin: aiohttp.ClientSession, query: str, changes: dict[str, Any], key: str | None
) -> None:
    """At its field, before anybody saves; a recipe does not stand in its own way."""
    taken = recipe(daemon, "one", aliases=["gpt-4o"], served_model_name="first")
    assert (await ask(admin, "POST", "/recipes", taken))[0] == 200
    (daemon.home / "recipes.d" / "broken.yaml").write_text("id: broken\nmax_model_len: 5\n")
    daemon.reload()
    status, answer = await ask(admin, "POST", f"/recipes/check{query}", recipe(daemon) | changes)
    assert (status, answer["ok"]) == (200, key is None), answer
    assert [fault["key"] for fault in answer["faults"]] == [key] * (key is not None)


async def test_another_id_in_the_yaml_of_a_recipe_is_told(daemon: RunningDaemon, admin: aiohttp.ClientSession) -> None:
    """Since the path of the PUT decides."""
    text = f"id: other\nmodel_path: {daemon.home}/models/tiny.gguf\n"
    answer = (await ask(admin, "POST", "/recipes/check?id=one", text, **YAML))[1]
    assert [(fault["key"], fault["message"]) for fault in answer["faults"]] == [
        ("id", "expected 'one', as in the path, found 'other'")
    ]


@pytest.mark.parametrize("model", [None, ""])
async def test_recipe_without_an_id_is_refused(
    daemon: RunningDaemon, admin: aiohttp.ClientSession, model: str | None
) -> None:
    """Nothing would tell the next such recipe from it."""
    body = recipe(daemon) | {"id": model}
    status, answer = await ask(admin, "POST", "/recipes", body)
    assert (status, "id: expected an id" in answer["detail"]) == (400, True)
    answer = (await ask(admin, "POST", "/recipes/check", body))[1]
    assert [(fault["key"], fault["severity"]) for fault in answer["faults"]] == [("id", "fault")]
    assert "max_model_len: 512" in answer["yaml"]  # to be mended as such
    text = f"model_path: {daemon.home}/models/tiny.gguf\n"
    assert (await ask(admin, "POST", "/recipes", text, **YAML))[0] == 400
    assert (await ask(admin, "PUT", "/recipes/one", text, **YAML))[0] == 200


async def test_check_tells_whose_file_it_is(daemon: RunningDaemon, admin: aiohttp.ClientSession) -> None:
    """So that nobody edits for nothing; the question changes nothing."""
    assert (await ask(admin, "POST", "/recipes", recipe(daemon, "ours")))[0] == 200
    theirs = daemon.home / "recipes.d" / "theirs.yaml"
    theirs.write_text("# by hand\n" + json.dumps(recipe(daemon, "theirs")))
    daemon.reload()
    before = [path.read_bytes() for path in sorted(theirs.parent.iterdir())]
    told = {}
    for model in ("ours", "theirs", "none"):
        answer = (await ask(admin, "POST", f"/recipes/check?id={model}", recipe(daemon, model)))[1]
        told[model] = (answer["by_hand"], answer["ok"], [fault["message"] for fault in answer["faults"]])
    assert told["ours"] == told["none"] == (False, True, [])
    assert told["theirs"] == (True, False, [f"'{theirs}' was written by hand"])
    assert [path.read_bytes() for path in sorted(theirs.parent.iterdir())] == before
    trusted = await ask(admin, "POST", "/recipes/check?id=theirs&trusted=true", recipe(daemon, "theirs"))
    assert (trusted[1]["ok"], trusted[1]["by_hand"]) == (True, False)


async def test_check_tells_what_would_become_of_it(daemon: RunningDaemon, admin: aiohttp.ClientSession) -> None:
    """Command line and context of a recipe that is not stored; a model that is running is not disturbed."""
    status, answer = await ask(admin, "POST", "/recipes/check", recipe(daemon, max_num_seqs=2, port=8000))
    assert (status, answer["ok"], answer["error"]) == (200, True, None)
    assert (answer["plan"]["n_ctx"], answer["plan"]["n_parallel"]) == (512, 2)
    assert "--alias" in answer["plan"]["argv"]
    assert any(fault["severity"] == "warning" and "port" in fault["key"] for fault in answer["faults"])
    assert (await ask(admin, "GET", "/recipes"))[1] == []
    status, answer = await ask(
        admin, "POST", "/recipes/check", recipe(daemon, model_path=f"{daemon.home}/models/no.gguf")
    )
    assert (status, "does not exist" in answer["error"]["detail"]) == (200, True)


@pytest.mark.parametrize(("length", "is_odd"), [(512, False), (100_000, True), (None, False)])
async def test_context_beyond_training_is_told_at_its_field(
    daemon: RunningDaemon, admin: aiohttp.ClientSession, length: int | None, is_odd: bool
) -> None:
    """A default is a note that worries nobody."""
    answer = (await ask(admin, "POST", "/recipes/check", recipe(daemon, max_model_len=length)))[1]
    assert [(fault["key"], fault["severity"]) for fault in answer["faults"]] == [("max_model_len", "warning")] * is_odd
    assert answer["ok"] is True
    assert [note.startswith("max_model_len is not set") for note in answer["plan"]["defaults"]] == [True] * (not length)


async def test_check_names_the_line_of_yaml(daemon: RunningDaemon, admin: aiohttp.ClientSession) -> None:
    """An editor can mark it."""
    status, answer = await ask(
        admin, "POST", "/recipes/check", "id: a\nmodel_path: /m.gguf\nmax_model_len: no\n", **YAML
    )
    assert (status, answer["ok"]) == (200, False)
    assert [(fault["line"], fault["key"]) for fault in answer["faults"]] == [(3, "max_model_len")]


async def test_recipes_that_come_at_once_are_all_kept(daemon: RunningDaemon, admin: aiohttp.ClientSession) -> None:
    """Each answer tells the truth."""
    answers = await asyncio.gather(*(ask(admin, "POST", "/recipes", recipe(daemon, f"m{n}")) for n in range(8)))
    assert [status for status, _ in answers] == [200] * 8
    assert len((await ask(admin, "GET", "/recipes"))[1]) == 8


async def test_file_has_a_recipe_only_where_somebody_wrote_one(tmp_path: Path) -> None:
    """A GGUF that is served without one can still be given its own id."""
    (tmp_path / "models").mkdir()
    write_tiny_gguf(tmp_path / "models" / "tiny.gguf")
    with running_daemon(tmp_path) as daemon:
        (found,) = daemon.admin.get("v1", "studio", "models")["models"]
        assert (found["id"], found["has_recipe"], found["recipe_ids"]) == ("tiny", False, [])
        daemon.admin.post("recipes", body={"id": "mine", "model_path": found["path"]})
        (found,) = daemon.admin.get("v1", "studio", "models")["models"]
        assert (found["has_recipe"], found["recipe_ids"]) == (True, ["mine"])


async def test_gguf_without_a_recipe_cannot_be_deleted(tmp_path: Path) -> None:
    """The answer says why, and what to do."""
    (tmp_path / "models").mkdir()
    write_tiny_gguf(tmp_path / "models" / "tiny.gguf")
    with running_daemon(tmp_path) as daemon:
        async with aiohttp.ClientSession(
            "http://admin", connector=aiohttp.UnixConnector(daemon.admin.socket_path)
        ) as admin:
            status, answer = await ask(admin, "DELETE", "/recipes/tiny")
    assert (status, answer["kind"]) == (409, "conflict")
    assert "auto_recipes" in answer["hint"]


async def test_recipe_is_changed_and_removed_by_its_id_alone(
    daemon: RunningDaemon, admin: aiohttp.ClientSession
) -> None:
    """An alias may be another recipe's tomorrow."""
    assert (await ask(admin, "POST", "/recipes", recipe(daemon, "one", aliases=["gpt-4o"])))[0] == 200
    status, answer = await ask(admin, "DELETE", "/recipes/gpt-4o")
    assert (status, answer["kind"], "'one'" in answer["hint"]) == (404, "model_not_found", True), answer
    status, answer = await ask(admin, "PUT", "/recipes/gpt-4o", recipe(daemon, "one"))
    assert (status, "gpt-4o" in answer["detail"]) == (409, True), answer
    assert [item["id"] for item in (await ask(admin, "GET", "/recipes"))[1]] == ["one"]
    assert (await ask(admin, "DELETE", "/recipes/one"))[0] == 200


async def test_file_has_the_recipes_that_mean_it(daemon: RunningDaemon, admin: aiohttp.ClientSession) -> None:
    """However they name it: by its path, by a short one, by a link, or by the directory that holds it alone."""
    models = daemon.home / "models"
    (models / "sub").mkdir()
    write_tiny_gguf(models / "sub" / "alone.gguf")
    (models / "link").symlink_to("sub")
    ways = {"path": str(models / "sub" / "alone.gguf"), "short": "sub/alone.gguf", "directory": str(models / "sub")}
    ways |= {"link": str(models / "link" / "alone.gguf"), "nowhere": "sub/nothing.gguf"}
    for model, path in ways.items():
        daemon.put_recipe({"id": model, "model_path": path})
    daemon.reload()
    found = (await ask(admin, "GET", "/v1/studio/models"))[1]
    wanted = sorted(ways.keys() - {"nowhere"})
    told = {item["name"]: item["recipe_ids"] for item in found["models"]}
    assert told == {"alone.gguf": wanted, "tiny.gguf": []}
    assert found["roots"][0]["recipe_ids"] == wanted
