"""The transient unit's command line, without systemd."""

import shlex
from dataclasses import replace

import pytest

from llmstudiod.core.command import BoundFile
from llmstudiod.core.launch import LaunchRequest
from llmstudiod.core.recipe import Sandbox
from llmstudiod.core.unit import question_argv, runs_as_asked, systemd_run_argv, unit_properties

REQUEST = LaunchRequest(
    model_id="m.1",
    recipe_hash="sha256:0",
    recipe_file="/etc/llmstudio/recipes.d/m.yaml",
    argv=("/usr/bin/llama-server", "-m", "/run/llmstudio-model/0/m.gguf", "--alias", "$HOME %h 'x'"),
    environment={"GGML_X": 'a "b" \\c'},
    socket_path="/run/llmstudio-models/m.1/llama.sock",
    files=(BoundFile('/srv/a b/"m".gguf', "/run/llmstudio-model/0/m.gguf"),),
    limits={"MemoryMax": "1073741824"},
)
VALUE_OF_FILE = '"/srv/a b/\\"m\\".gguf":"/run/llmstudio-model/0/m.gguf"'


def test_unit_argv_is_complete_and_quoted() -> None:
    """The server's words come last and as they are; nothing expands them, and lists are quoted."""
    argv = systemd_run_argv(REQUEST)
    assert argv[argv.index("--") + 1 :] == list(REQUEST.argv)
    assert "--expand-environment=no" in argv
    assert "--unit=llmstudio-model-m.1.service" in argv
    assert "--collect" not in argv
    assert 'BindReadOnlyPaths="/srv/a b/\\"m\\".gguf":"/run/llmstudio-model/0/m.gguf"' in argv
    assert 'Environment="GGML_X=a \\"b\\" \\\\c"' in argv
    assert "MemoryMax=1073741824" in argv


def test_own_environment_cannot_be_overridden() -> None:
    """A recipe's variables come before ours, and the later of two lines counts."""
    request = replace(REQUEST, environment={"LLMSTUDIO_SOCKET": "/elsewhere"})
    lines = [line for line in unit_properties(request) if line.startswith('Environment="LLMSTUDIO_SOCKET=')]
    assert lines == [f'Environment="LLMSTUDIO_SOCKET={REQUEST.socket_path}"']


def value_of(name: str, request: LaunchRequest) -> list[str]:
    """Return the values of a property, in the order in which they are given."""
    found = [line.partition("=")[2] for line in unit_properties(request) if line.startswith(f"{name}=")]
    assert found, name
    return found


@pytest.mark.parametrize(
    ("executables", "expected"),
    [
        (
            ("/usr/bin/llama-server", "/usr/lib", "/usr/lib64"),
            {"ProtectHome": ["yes"], "ExecPaths": ['"-/usr/bin/llama-server" "-/usr/lib" "-/usr/lib64"']},
        ),
        (("/opt/my llama/bin",), {"ProtectHome": ["yes"], "ExecPaths": ['"-/opt/my llama/bin"']}),
        (
            ("/home/me/llama-server", "/usr/lib"),
            {"ProtectHome": ["tmpfs"], "BindReadOnlyPaths": [VALUE_OF_FILE, '"/home/me/llama-server"']},
        ),
    ],
)
def test_what_may_be_executed(executables: tuple[str, ...], expected: dict[str, list[str]]) -> None:
    """The server and its libraries alone, wherever they are; of a home directory nothing else is seen."""
    request = replace(REQUEST, executables=executables)
    assert value_of("NoExecPaths", request) == ["/"]
    assert {name: value_of(name, request) for name in expected} == expected


@pytest.mark.parametrize(
    ("hidden", "executables", "argv", "seen", "unseen"),
    [
        (("/models", "/data/llm/"), ("/usr/bin/x",), (), [], ["/models", "/data/llm", "/opt", "/mnt", "/var/log"]),
        (("/models",), ("/opt/llama/bin", "-/srv/lib"), (), ["/opt", "/srv"], ["/models", "/mnt"]),
        (("/", "/usr", "/var", "/etc", "/run/x", "/opt/llama"), ("/opt/llama/bin/x",), (),
         ["/", "", "/usr", "/var", "/etc", "/opt", "/opt/llama"], ["/run/x"]),
        (("/models",), (), ("/opt/llama/bin/x",), ["/opt", "/models"], ["/srv", "/var/lib/llmstudio"]),
        (("/a b",), ("/usr/bin/x",), (), [], ["/a b"]),
    ],
)  # fmt: skip
def test_directories_that_cannot_be_seen(
    hidden: tuple[str, ...], executables: tuple[str, ...], argv: tuple[str, ...], seen: list[str], unseen: list[str]
) -> None:
    """Models, recipes and whatever others may have put somewhere; never the system, or the program itself."""
    request = replace(REQUEST, hidden=hidden, executables=executables, argv=argv or REQUEST.argv)
    (value,) = value_of("InaccessiblePaths", request)
    told = [word.removeprefix("-") for word in shlex.split(value)]
    assert set(told) >= {"/etc/llmstudio", "/var/lib/llmstudio", *unseen}
    assert not set(told) & set(seen)
    assert len(shlex.split(value)) == sum(word.startswith("-") for word in shlex.split(value))


GPU = replace(REQUEST, devices=("/dev/nvidiactl", "/dev/nvidia3"), device_groups=("render",))


def test_gpu_needs_its_devices() -> None:
    """With PrivateDevices=yes or a hidden /proc a CUDA server silently uses the CPU; other GPUs stay closed."""
    assert value_of("DeviceAllow", GPU) == ["/dev/nvidiactl rw", "/dev/nvidia3 rw"]
    names = ("PrivateDevices", "DevicePolicy", "ProcSubset")
    assert [value_of(name, GPU)[0] for name in names] == ["no", "closed", "all"]
    assert value_of("SupplementaryGroups", GPU) == ["render"]
    assert value_of("PrivateDevices", REQUEST) == ["yes"]


@pytest.mark.parametrize(
    ("sandbox", "name", "strict", "relaxed"),
    [
        (Sandbox(network="host"), "PrivateNetwork", ["yes"], ["no"]),
        (Sandbox(network="loopback"), "PrivateNetwork", ["yes"], ["yes"]),
        (Sandbox(network="loopback"), "RestrictAddressFamilies", ["AF_UNIX"], ["AF_UNIX AF_INET AF_INET6 AF_NETLINK"]),
        (Sandbox(writable_code=True), "MemoryDenyWriteExecute", ["yes"], ["no"]),
        (Sandbox(shared_ipc=True), "PrivateIPC", ["yes"], ["no"]),
        (
            Sandbox(scheduling=True),
            "SystemCallFilter",
            ["@system-service", "~@privileged @resources"],
            ["@system-service", "~@privileged"],
        ),
    ],
)
def test_relaxation_changes_what_it_names(sandbox: Sandbox, name: str, strict: list[str], relaxed: list[str]) -> None:
    """Each opens one thing, and nothing else changes."""
    opened = replace(REQUEST, sandbox=sandbox)
    assert (value_of(name, REQUEST), value_of(name, opened)) == (strict, relaxed)
    changed = {line.partition("=")[0] for line in {*unit_properties(REQUEST)} ^ {*unit_properties(opened)}}
    assert changed <= {
        Sandbox(network="host"): {"PrivateNetwork", "RestrictAddressFamilies", "IPAddressDeny"},
        Sandbox(network="loopback"): {"RestrictAddressFamilies", "IPAddressDeny"},
        Sandbox(shared_ipc=True): {"BindPaths", "PrivateIPC"},
    }.get(sandbox, {name})


def test_question_is_asked_in_the_same_sandbox() -> None:
    """What keeps a model to itself keeps a question to its binary to itself; only the way out differs."""
    argv = question_argv(REQUEST, unit="q.service", timeout_s=5)
    own = {
        "Before",
        "Group",
        "LogExtraFields",
        "LogRateLimitIntervalSec",
        "SourcePath",
        "SyslogIdentifier",
        "Environment",
    }
    own |= {"CacheDirectory", "CacheDirectoryMode", "RuntimeDirectory", "RuntimeDirectoryMode", "MemoryMax"}
    own |= {"Environment", "StandardInput", "StandardOutput", "StandardError"}
    assert {line for line in unit_properties(REQUEST) if line.partition("=")[0] not in own} <= {*argv}
    assert "RuntimeMaxSec=5" in argv
    assert argv[argv.index("--") + 1 :] == list(REQUEST.argv)


def _shown(request: LaunchRequest, *, state: str = "active", argv: str | None = None, extra: str = "") -> str:
    """Return what ``systemctl show`` tells of the unit that a request has made."""
    variables = {**request.environment, "LLMSTUDIO_RECIPE_HASH": request.recipe_hash}
    environment = " ".join(f"{name}={value}" for name, value in variables.items())
    command = " ".join(request.argv) if argv is None else argv
    executed = f"{{ path={request.argv[0]} ; argv[]={command} ; ignore_errors=no ; pid=7 }}"
    return f"ActiveState={state}\nExecStart={executed}\nEnvironment={environment}{extra}\n"


def test_unit_that_runs_as_asked_is_known() -> None:
    """The same command line and environment: it may go on. Any difference, and it is started anew."""
    request = replace(
        REQUEST,
        argv=("/usr/bin/llama-server", "-m", "x"),
        environment={"CUDA_VISIBLE_DEVICES": "GPU-1"},
        recipe_hash="sha256:aa",
    )
    assert runs_as_asked(_shown(request, extra=" LLMSTUDIO_MODEL=x"), request)
    others = [
        _shown(request, state="failed"),
        _shown(request, argv=" ".join(request.argv) + " -c 5"),
        _shown(replace(request, recipe_hash="sha256:ab"), extra=" X=sha256:aa"),
        _shown(replace(request, environment={"CUDA_VISIBLE_DEVICES": "GPU-12"})),
        "",
    ]
    assert [runs_as_asked(shown, request) for shown in others] == [False] * len(others)
