"""Who may do what on an installed system: the daemon next to nothing, the launcher what it must."""

import json
import re

import openai
import pytest

from llmstudiod.core.keys import hash_of
from llmstudiod.core.recipe import Recipe, recipe_hash

# Relative: without tests/__init__.py the absolute name differs between pytest and python -m.
from .daemon import MODELS, RECIPES, SERVICE, Daemon, unit_of  # noqa: TID252

LAUNCHER = "llmstudio-launcher.service"
SOCKET = "/run/llmstudio/launcher.sock"
HASH = "sha256:" + "0" * 64
ASK = """
import json, socket, sys
client = socket.socket(socket.AF_UNIX)
try:
    client.connect("/run/llmstudio/launcher.sock")
    client.sendall(sys.argv[1].encode() + b"\\n")
    print(client.makefile().readline())
except OSError as error:
    print(json.dumps({"error": {"message": error.strerror}}))
"""


def ask(daemon: Daemon, request: dict[str, object], *, user: str = "llmstudio") -> str:
    """Ask the launcher as a user of the host, and return what it refuses with, or an empty text."""
    argv = ["setpriv", "--reuid", user, "--clear-groups", "python3", "-c", ASK, json.dumps(request)]
    answer = json.loads(daemon.host.run(*argv).stdout)
    return str(answer.get("error", {}).get("message", ""))


def inside_the_daemon(daemon: Daemon, *argv: str) -> tuple[int, str]:
    """Run a command with the daemon's user, groups, seccomp filter, capabilities, namespaces and mounts."""
    wanted = [
        "User", "Group", "SupplementaryGroups", "CapabilityBoundingSet", "AmbientCapabilities", "NoNewPrivileges",
        "ProtectSystem", "ProtectHome", "PrivateTmp", "PrivateDevices", "DevicePolicy", "DeviceAllow", "BindPaths",
        "PrivateNetwork",
        "RestrictAddressFamilies", "PrivateUsers", "RestrictNamespaces", "LockPersonality", "SystemCallArchitectures",
        "SystemCallFilter", "SystemCallErrorNumber", "MemoryDenyWriteExecute", "ProtectProc", "ProcSubset",
    ]  # fmt: skip
    unit = daemon.host.run("cat", "/usr/lib/systemd/system/llmstudiod.service").stdout
    lines = [line for line in unit.splitlines() if line.partition("=")[0] in wanted]
    options = [word for line in lines for word in ("-p", line)]
    done = daemon.host.run(
        "systemd-run", "--quiet", "--wait", "--pipe", "--collect", *options, "--", *argv, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("user", ["nobody", "daemon"])
def test_nobody_else_reaches_the_launcher(daemon: Daemon, user: str) -> None:
    """Its socket is for the daemon's user, and for root."""
    daemon.listen()
    assert ask(daemon, {"verb": "probe"}, user=user) == "Permission denied"
    assert ask(daemon, {"verb": "probe"}) == ""
    assert ask(daemon, {"verb": "probe"}, user="root") == ""


GOOD = f"id: x\nmodel_path: {MODELS}/tiny.gguf\n"
REFUSED = [
    ({"verb": "stop", "id": "../ssh"}, "id: expected an id"),
    ({"verb": "start", "id": "evil", "hash": HASH, "file": "/etc/passwd", "model": "/m.gguf"}, "file: expected"),
    ({"verb": "start", "id": "evil", "hash": HASH, "file": "/etc/x.yaml", "model": "/m.gguf"}, "recipes directory"),
    ({"verb": "start", "id": "evil", "hash": HASH, "file": f"{RECIPES}/evil.yaml", "model": "/m.gguf"}, "any more"),
    ({"verb": "start", "id": "shadow", "hash": HASH, "file": None, "model": "/etc/shadow"}, "is not served"),
    ({"verb": "start", "id": "tiny", "hash": HASH, "file": None, "model": f"{MODELS}/tiny.gguf"}, "is not served"),
    ({"verb": "put-recipe", "name": "../x.yaml", "text": ""}, "name: expected"),
    ({"verb": "put-recipe", "name": "x.yaml", "text": "id: x\nmodel_path: /etc/shadow\n"}, "model directories"),
    (
        {
            "verb": "put-recipe",
            "name": "x.yaml",
            "text": f"id: x\nmodel_path: {MODELS}/tiny.gguf\nsandbox: {{network: host}}",
        },
        "no relaxation over HTTP",
    ),
]


@pytest.mark.parametrize(("request_", "says"), REFUSED)
def test_compromised_daemon_is_refused(daemon: Daemon, request_: dict[str, object], says: str) -> None:
    """Whatever asks with the daemon's rights gets root's recipes started, and nothing else."""
    daemon.listen()
    assert says in ask(daemon, request_)
    assert daemon.model_units() == []


def test_recipe_of_another_owner_is_refused(daemon: Daemon) -> None:
    """By the launcher, which reads the file itself, and by the daemon when it reads it; the client is told."""
    path = daemon.put_recipe({"id": "other", "model_path": f"{MODELS}/tiny.gguf"})
    daemon.listen()
    chat = {"model": "other", "messages": [{"role": "user", "content": "x"}]}
    with daemon.client() as client:
        daemon.ctl("list")
        daemon.host.run("chown", "daemon", path)
        with pytest.raises(openai.InternalServerError, match="root to own it") as caught:
            client.chat.completions.create(**chat)  # type: ignore[call-overload]
        assert "chown root" in str(caught.value.body)
        daemon.systemctl("reload", SERVICE)
        with pytest.raises(openai.NotFoundError, match="there is no model 'other'") as unknown:
            client.chat.completions.create(**chat)  # type: ignore[call-overload]
        assert "root to own it" in str(unknown.value.body)
    check = daemon.host.run("llmstudioctl", "check", check=False)
    assert (check.returncode, "expected root to own it" in check.stdout) == (3, True)
    assert daemon.model_units() == []


def test_link_to_a_secret_is_no_model(daemon: Daemon) -> None:
    """A model path whose target is /etc/shadow is refused by the daemon and by the launcher."""
    daemon.host.run("ln", "-sf", "/etc/shadow", f"{MODELS}/secret.gguf")
    recipe = {"id": "secret", "model_path": f"{MODELS}/secret.gguf"}
    path = daemon.put_recipe(recipe)
    daemon.listen()
    with daemon.client() as client, pytest.raises(openai.InternalServerError, match="cannot load 'secret'"):
        client.chat.completions.create(model="secret", messages=[{"role": "user", "content": "x"}])
    wanted = Recipe(id="secret", model_path=f"{MODELS}/secret.gguf")
    named = {"id": "secret", "hash": recipe_hash(wanted), "model": wanted.model_path}
    assert "expected a GGUF file, found another" in ask(daemon, {"verb": "start", **named, "file": path})
    assert "expected a file in the model directories" in ask(daemon, {"verb": "start", **named, "file": None})
    assert daemon.model_units() == []


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["systemd-run", "--no-ask-password", "id"], "Access denied|authentication|Permission denied"),
        (["systemctl", "--no-ask-password", "stop", "dbus.service"], "Access denied|authentication|Permission denied"),
        (["cat", "/etc/shadow"], "Permission denied"),
        (["touch", "/etc/llmstudio/recipes.d/x.yaml"], "Permission denied|Read-only"),
        (["touch", "/var/lib/llmstudio-launcher/x"], "Permission denied|Read-only"),
        (["unshare", "-U", "true"], "Operation not permitted"),
        (["python3", "-c", "import socket; socket.socket(socket.AF_INET)"], "not supported"),
        (["curl", "-sS", "http://127.0.0.1:8080/health"], "Couldn|Could not|Failed|error"),
    ],
)
def test_daemon_may_not(daemon: Daemon, argv: list[str], says: str) -> None:
    """From inside its sandbox: no unit, no secret, no recipe, no namespace, no network."""
    daemon.listen()
    daemon.chat()
    code, output = inside_the_daemon(daemon, *argv)
    assert code != 0, output
    assert re.search(says, output), output


@pytest.mark.parametrize(
    ("unit", "most"), [(SERVICE, 0.5), (LAUNCHER, 1.0), (unit_of("tiny"), 0.3)], ids=["daemon", "launcher", "model"]
)
def test_exposure_is_low(daemon: Daemon, unit: str, most: float) -> None:
    """What `systemd-analyze security` says of the running units."""
    daemon.listen()
    daemon.chat()
    told = daemon.host.run("systemd-analyze", "security", "--no-pager", unit).stdout
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", told)
    assert found is not None, told
    assert float(found[1]) <= most, told


def test_cuda_variant_is_nearly_as_closed(daemon: Daemon) -> None:
    """The unit with a GPU's device nodes: only they are open, and what CUDA reads below /proc."""
    daemon.listen()
    argv = json.loads(daemon.ctl("explain", "--json", "tiny"))["systemd_run"]
    options = [word for word in argv[1 : argv.index("--")] if not word.startswith(("--unit", "--description"))]
    cuda = ["-p", "PrivateDevices=no", "-p", "ProcSubset=all", "-p", "DeviceAllow=/dev/nvidiactl rw"]
    host = daemon.host
    host.run("systemd-run", "--unit=llmstudio-model-cuda.service", *options, *cuda, "--", *argv[argv.index("--") + 1 :])
    try:
        told = host.run("systemd-analyze", "security", "--no-pager", unit_of("cuda")).stdout
    finally:
        host.run("systemctl", "stop", unit_of("cuda"), check=False)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", told)
    assert found is not None, told
    assert float(found[1]) <= 0.5, told


def test_daemon_may_measure_the_gpus(daemon: Daemon) -> None:
    """NVIDIA's nodes are there for NVML, and may be opened: no driver answers here, but the device list lets it ask."""
    host = daemon.host
    host.run("sh", "-c", "for n in ctl:255 0:0; do mknod -m 666 /dev/nvidia${n%:*} c 195 ${n#*:}; done")
    try:
        daemon.listen()
        daemon.ctl("status")
        pid = daemon.show(SERVICE, "MainPID")["MainPID"]
        seen = host.run("ls", f"/proc/{pid}/root/dev").stdout.split()
        assert {"nvidiactl", "nvidia0"} <= set(seen)
        assert "fuse" not in seen
        opened = "import os\ntry: os.open('/dev/nvidiactl', os.O_RDWR)\nexcept OSError as error: print(error.strerror)"
        told = inside_the_daemon(daemon, "python3", "-c", opened)[1]
        assert "No such device or address" in told, told
    finally:
        host.run("rm", "/dev/nvidiactl", "/dev/nvidia0")


# Keys and administrators


def curl(daemon: Daemon, *words: str) -> tuple[int, str]:
    """Ask the endpoint from inside the host; return status and body."""
    done = daemon.host.run("curl", "-sS", "-m", "20", "-w", "\\n%{http_code}", *words)
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


def test_key_is_made_used_and_revoked(daemon: Daemon) -> None:
    """By llmstudioctl; the file is root's, the daemon's group reads it, and nobody ever sees the secret again."""
    daemon.listen()
    url = "http://127.0.0.1:8080/v1/models"
    assert curl(daemon, url)[0] == 200
    secret = daemon.host.run("llmstudioctl", "key", "add", "laptop", "--models", "tiny").stdout.strip()
    try:
        assert curl(daemon, url)[0] == 401
        assert curl(daemon, "-H", f"Authorization: Bearer {secret}", url)[0] == 200
        stat = daemon.host.run("stat", "-c", "%U:%G %a", "/etc/llmstudio/keys").stdout.strip()
        assert stat == "root:llmstudio 640"
        assert "laptop" in daemon.ctl("key", "list")
        shown = daemon.host.run("cat", "/etc/llmstudio/keys").stdout + daemon.host.journal(SERVICE)
        shown += daemon.ctl("key", "list", "--json") + daemon.ctl("status", "--json")
        assert secret not in shown
        daemon.systemctl("restart", SERVICE)
        assert curl(daemon, "-H", f"x-api-key: {secret}", url)[0] == 200
    finally:
        daemon.ctl("key", "revoke", "laptop")
    assert curl(daemon, url)[0] == 200


def test_faulty_keys_file_lets_nobody_in(daemon: Daemon) -> None:
    """Rather than everybody; the daemon says why, and goes on."""
    daemon.host.write("/etc/llmstudio/keys", "[{]")
    try:
        daemon.listen()
        assert curl(daemon, "http://127.0.0.1:8080/v1/models")[0] == 401
        assert curl(daemon, "http://127.0.0.1:8080/health")[0] == 200
        assert "the keys file is not valid JSON" in daemon.host.journal(SERVICE)
        check = daemon.host.run("llmstudioctl", "check", check=False)
        assert (check.returncode, "/etc/llmstudio/keys" in check.stdout) == (3, True)
        for words in (["list"], ["add", "new"], ["revoke", "old"]):  # what it holds is not lost
            done = daemon.host.run("llmstudioctl", "key", *words, check=False)
            assert (done.returncode, "is not valid JSON" in done.stderr) == (3, True), done
        assert daemon.host.run("cat", "/etc/llmstudio/keys").stdout == "[{]"
        daemon.host.write("/etc/llmstudio/keys", "[]")
        daemon.host.run("chown", "nobody", "/etc/llmstudio/keys")
        daemon.systemctl("reload", SERVICE)
        assert "expected root alone to write it" in daemon.host.run("llmstudioctl", "check", check=False).stdout
        assert curl(daemon, "http://127.0.0.1:8080/v1/models")[0] == 401
    finally:
        daemon.host.run("rm", "/etc/llmstudio/keys")


def test_keys_that_systemd_hands_over_are_not_ours_to_write(daemon: Daemon) -> None:
    """They count; nobody is told that a key is made or revoked that is not."""
    secret = "llms-" + "x" * 40
    key = {"name": "boss", "hash": hash_of(secret)}
    daemon.host.write("/root/keys", json.dumps([key]))
    drop_in = "/etc/systemd/system/llmstudiod.service.d/keys.conf"
    daemon.host.write(drop_in, "[Service]\nLoadCredential=keys:/root/keys\n")
    daemon.systemctl("daemon-reload")
    try:
        daemon.listen()
        url = "http://127.0.0.1:8080/v1/models"
        assert curl(daemon, url)[0] == 401
        assert curl(daemon, "-H", f"x-api-key: {secret}", url)[0] == 200
        assert "boss" in daemon.ctl("key", "list")
        for words in (["add", "new"], ["revoke", "boss"]):
            done = daemon.host.run("llmstudioctl", "key", *words, check=False)
            assert (done.returncode, "LoadCredential" in done.stderr) == (3, True), done
        assert curl(daemon, "-H", f"x-api-key: {secret}", url)[0] == 200
        assert not daemon.host.path("/etc/llmstudio/keys").exists()
    finally:
        daemon.host.run("rm", drop_in)
        daemon.systemctl("daemon-reload")


def ctl_as(daemon: Daemon, user: str, *words: str, editor: str = "") -> tuple[int, str]:
    """Run llmstudioctl as another user, of the groups of that user; return its exit code and what it said."""
    argv = ("setpriv", "--reuid", user, "--regid", user, "--init-groups", "llmstudioctl", *words)
    done = daemon.host.run(*argv, check=False, env={"EDITOR": editor} if editor else None)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def bob(daemon: Daemon) -> str:
    """A user who administers the models, and is not root."""
    daemon.host.run("sh", "-c", "id bob 2>/dev/null || useradd bob; usermod -aG llmstudio-admin bob")
    daemon.listen()
    return "bob"


def test_group_of_administrators_administers(daemon: Daemon, bob: str) -> None:
    """Without being root; other users may not, unless the status is open, and then they may only look."""
    daemon.host.run("sh", "-c", "id eve 2>/dev/null || useradd eve")
    assert ctl_as(daemon, bob, "load", "tiny")[0] == 0
    code, output = ctl_as(daemon, "eve", "status")
    assert (code, "llmstudio-admin" in output) == (5, True)
    daemon.use_settings(open_status=True)
    daemon.systemctl("reload", SERVICE)
    assert ctl_as(daemon, "eve", "list")[0] == 0
    assert ctl_as(daemon, "eve", "unload", "tiny")[0] == 5
    assert daemon.status("tiny")["state"] == "ready"


def test_member_edits_what_the_daemon_wrote(daemon: Daemon, bob: str) -> None:
    """By the daemon, for the file is root's; what was changed meanwhile, or written by hand, stays."""
    recipe = "/srv/recipe-of-bob"
    assert ctl_as(daemon, bob, "recipe", "new", f"{MODELS}/tiny.gguf", "--id", "mine")[0] == 0
    daemon.host.write(f"{recipe}/two", '#!/bin/sh\necho "priority: 2" >> "$1"\n', mode=0o755)
    during = f"EDITOR={recipe}/two llmstudioctl recipe edit mine"
    daemon.host.write(f"{recipe}/one", f'#!/bin/sh\n{during}\necho "max_queue: 3" >> "$1"\n', mode=0o755)
    code, told = ctl_as(daemon, bob, "recipe", "edit", "mine", editor=f"{recipe}/one")
    assert (code, "the recipe 'mine' was changed meanwhile" in told) == (2, True), told
    assert "`llmstudioctl recipe edit mine` shows what it says now" in told
    kept = re.search(r"what you wrote is kept in (\S+)", told)
    assert kept
    assert "max_queue: 3" in daemon.host.run("cat", kept[1]).stdout
    text = daemon.host.run("cat", f"{RECIPES}/mine.yaml").stdout
    assert ("priority: 2" in text, "max_queue" in text) == (True, False)
    assert daemon.host.run("stat", "-c", "%U", f"{RECIPES}/mine.yaml").stdout.strip() == "root"

    daemon.put_recipe(f"# by hand\n{text}", file="mine.yaml")
    daemon.systemctl("reload", SERVICE)
    code, told = ctl_as(daemon, bob, "recipe", "edit", "mine", editor=f"{recipe}/one")
    assert (code, "was written by hand" in told, "sudo llmstudioctl recipe edit mine" in told) == (5, True, True)
    assert "kept in" not in told


def test_listener_for_others_needs_a_key(daemon: Daemon) -> None:
    """A drop-in opens the port to a bridge; without keys everybody there is answered 403."""
    host = daemon.host
    host.run("sh", "-c", "ip link add br0 type bridge && ip addr add 172.31.0.1/24 dev br0 && ip link set br0 up")
    listen = "[Socket]\nListenStream=\nListenStream=127.0.0.1:8080\nListenStream=172.31.0.1:8080\n"
    host.write("/etc/systemd/system/llmstudiod.socket.d/listen.conf", listen)
    daemon.systemctl("daemon-reload")
    try:
        daemon.listen()
        url = "http://172.31.0.1:8080/v1/models"
        status, body = curl(daemon, url)
        assert (status, "llmstudioctl key add" in body) == (403, True)
        assert curl(daemon, "http://127.0.0.1:8080/v1/models")[0] == 200
        secret = host.run("llmstudioctl", "key", "add", "lan").stdout.strip()
        assert curl(daemon, "-H", f"Authorization: Bearer {secret}", url)[0] == 200
    finally:
        daemon.ctl("key", "revoke", "lan", check=False)
        daemon.systemctl("stop", "llmstudiod.socket", SERVICE)
        host.run("rm", "-r", "/etc/systemd/system/llmstudiod.socket.d")
        host.run("ip", "link", "del", "br0")
        daemon.systemctl("daemon-reload")
