"""The admin interface and the page in a booted host, by curl: signed in over TCP, with the launcher that writes."""

import json
from typing import Any

import pytest

# Relative: without tests/__init__.py the absolute name differs between pytest and python -m.
from .daemon import MODELS, RECIPES, SERVICE, Daemon, unit_of, wait_until  # noqa: TID252

URL = "http://localhost:8080"
OWN = ("-H", f"Origin: {URL}", "-H", "Sec-Fetch-Site: same-origin")


def curl(daemon: Daemon, path: str, *words: str) -> tuple[int, str]:
    """Ask the endpoint from inside the host; return status and body."""
    done = daemon.host.run("curl", "-sS", "-m", "30", "-w", "\\n%{http_code}", *words, URL + path)
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


def sign_in(daemon: Daemon) -> tuple[str, str]:
    """Redeem the code that `llmstudioctl web` prints; return curl's words for the cookie."""
    address = daemon.host.run("llmstudioctl", "web", "--no-open").stdout.strip()
    code = address.partition("#")[2].rpartition("=")[2] or address.rpartition("/")[2]
    status, answer = curl(daemon, "/sign-in", *OWN, "-D", "/tmp/headers", "--json", json.dumps({"code": code}))
    assert status == 200, (address, answer)
    headers = daemon.host.run("cat", "/tmp/headers").stdout
    (cookie,) = (line for line in headers.splitlines() if line.lower().startswith("set-cookie: "))
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    return "-H", f"Cookie: {cookie[12:].partition(';')[0]}"


def ask(daemon: Daemon, path: str, *words: str, body: object = None, method: str | None = None) -> tuple[int, Any]:
    """Ask as the page does; return status and answer."""
    more = [] if body is None else ["--json", json.dumps(body)]
    more += [] if method is None else ["-X", method]
    status, text = curl(daemon, path, *OWN, *more, *words)
    return status, json.loads(text)


@pytest.fixture
def cookie(daemon: Daemon) -> tuple[str, str]:
    """Somebody signed in."""
    daemon.listen()
    return sign_in(daemon)


def test_page_is_served_to_everybody_and_tells_nothing(daemon: Daemon) -> None:
    """Its files come with the package; what they show needs a session, on loopback too."""
    daemon.listen()
    status, page = curl(daemon, "/", "-H", "Accept: text/html")
    assert (status, "<html" in page, "tiny" in page) == (200, True, False)
    for path in ("/page/app.js", "/page/style.css", "/page/recipe.js"):
        assert curl(daemon, path)[0] == 200, path
    for path in ("/status", "/recipes", "/events", "/logs/tiny", "/metrics", "/config"):
        assert curl(daemon, path, *OWN)[0] == 401, path


def test_recipe_is_made_by_the_launcher_and_used(daemon: Daemon, cookie: tuple[str, str]) -> None:
    """Root's file, in force at once; what a person wrote is refused with the reason, and stays as it was."""
    recipe = {"id": "made", "model_path": f"{MODELS}/tiny.gguf", "max_model_len": 512, "name": "Made"}
    status, checked = ask(daemon, "/recipes/check", *cookie, body=recipe)
    assert (status, checked["ok"], checked["error"], checked["plan"]["n_ctx"]) == (200, True, None, 512)
    assert checked["plan"]["estimate"]["host"]["total"] > 1 << 20
    assert ask(daemon, "/recipes", *cookie, body=recipe) == (200, {"success": True, "id": "made"})
    stat = daemon.host.run("stat", "-c", "%U:%G %a", f"{RECIPES}/made.yaml").stdout.strip()
    assert stat.startswith("root:")
    assert int(stat.split()[1], 8) & 0o022 == 0
    status, answer = ask(daemon, "/launch/made", *cookie, method="POST")
    assert (status, answer["success"]) == (200, True)
    assert daemon.state(unit_of("made")) == "active"
    assert daemon.chat("made")
    assert 1 << 20 < daemon.status("made")["memory"]["measured"] < 1 << 30
    status, logs = ask(daemon, "/logs/made", *cookie)
    assert status == 200
    assert any("listening" in line for line in logs["logs"])
    assert ask(daemon, "/evict/made", *cookie, method="POST")[0] == 200
    assert ask(daemon, "/recipes/made", *cookie, method="DELETE") == (200, {"success": True})
    assert "made.yaml" not in daemon.host.run("ls", RECIPES).stdout

    text = f"# mine\nid: mine\nmodel_path: {MODELS}/tiny.gguf  # small\n"
    daemon.put_recipe(text, file="mine.yaml")
    daemon.systemctl("reload", SERVICE)
    status, told = ask(daemon, "/recipes/mine", *cookie, body={**recipe, "id": "mine"}, method="PUT")
    assert status == 403, told
    assert told["hint"]
    assert daemon.host.run("cat", f"{RECIPES}/mine.yaml").stdout == text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_path": "/etc/shadow"}, "model_path"),
        ({"model_path": f"{MODELS}/../../../etc/shadow"}, "model_path"),
        ({"extra_args": {"path": "/etc"}}, "path"),
        ({"env_vars": {"LD_PRELOAD": "/tmp/x.so"}}, "env_vars"),
        ({"llama_server": "/bin/sh"}, "llama_server"),
        ({"id": "../../cron.d/x"}, "id"),
    ],
)
def test_nothing_dangerous_comes_over_http(
    daemon: Daemon, cookie: tuple[str, str], change: dict[str, object], says: str
) -> None:
    """No binary, no path outside the models, no variable, no dangerous flag; nothing is written."""
    recipe = {"id": "evil", "model_path": f"{MODELS}/tiny.gguf"} | change
    status, told = ask(daemon, "/recipes", *cookie, body=recipe)
    assert 400 <= status < 500, told
    assert says in json.dumps(told)
    assert [name for name in daemon.host.run("ls", RECIPES).stdout.split() if name.endswith(".yaml")] == []


def test_pin_and_session_outlast_the_daemon(daemon: Daemon, cookie: tuple[str, str]) -> None:
    """A restart, and a kill: both are in the state, and so is what was used."""
    assert ask(daemon, "/instances/tiny/pin", *cookie, method="POST")[0] == 200
    before = ask(daemon, "/lifetime-metrics", *cookie)[1]["requests_total"]
    daemon.chat()
    pid = daemon.pid(unit_of("tiny"))
    lifetime = ask(daemon, "/lifetime-metrics", *cookie)[1]
    assert lifetime["requests_total"] == before + 1
    daemon.systemctl("kill", "--signal=KILL", SERVICE)
    wait_until(lambda: daemon.state(SERVICE) == "active")
    status, shown = ask(daemon, "/instances/tiny", *cookie)
    assert (status, shown["is_pinned"]) == (200, True)  # from the first answer on: who asks next may want its place
    wait_until(lambda: ask(daemon, "/instances/tiny", *cookie)[1]["state"] == "ready")
    daemon.systemctl("restart", SERVICE)
    assert ask(daemon, "/instances/tiny", *cookie)[1]["is_pinned"] is True
    daemon.chat()
    later = ask(daemon, "/lifetime-metrics", *cookie)[1]
    assert later["requests_total"] == before + 2
    assert later["tokens_total"] > lifetime["tokens_total"]
    assert daemon.pid(unit_of("tiny")) == pid
    assert ask(daemon, "/instances/tiny/unpin", *cookie, method="POST")[0] == 200


def test_metrics_are_for_prometheus(daemon: Daemon) -> None:
    """With a key that may read them, and no other right."""
    daemon.listen()
    secret = daemon.host.run("llmstudioctl", "key", "add", "prometheus", "--metrics").stdout.strip()
    try:
        bearer = ("-H", f"Authorization: Bearer {secret}")
        status, text = curl(daemon, "/metrics", *bearer)
        assert status == 200
        assert "# TYPE llmstudio" in text
        assert curl(daemon, "/status", *bearer)[0] in {401, 403}
    finally:
        daemon.ctl("key", "revoke", "prometheus")


def test_doctor_finds_the_installation_in_order(daemon: Daemon) -> None:
    """And tells when a unit is not: with the command that mends it."""
    daemon.listen()
    daemon.chat()
    done = daemon.host.run("llmstudioctl", "doctor", "--json", check=False)
    found = json.loads(done.stdout)
    assert [each for each in found if each["level"] == "fault"] == []
    topics = {each["topic"] for each in found if each["level"] == "ok"}
    assert topics >= {"units", "daemon", "llama-server", "devices", "endpoint", "disk", "journal", "recipes"}
    daemon.systemctl("stop", "llmstudio-launcher.socket")
    broken = daemon.host.run("llmstudioctl", "doctor", check=False)
    assert broken.returncode == 1
    assert "llmstudio-launcher.socket does not listen" in broken.stdout
    assert "systemctl enable --now llmstudio-launcher.socket" in broken.stdout


def test_doctor_tells_a_user_of_the_group(daemon: Daemon) -> None:
    """Who may not use the socket learns how to be let in."""
    daemon.listen()
    done = daemon.host.run("setpriv", "--reuid=nobody", "--clear-groups", "llmstudioctl", "doctor", check=False)
    assert done.returncode == 1
    assert "you are not in the group llmstudio-admin" in done.stdout
    assert "usermod -aG llmstudio-admin" in done.stdout
