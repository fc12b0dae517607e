"""The transient unit's command line, without systemd."""

from dataclasses import replace

import pytest

from llmstudiod.core.command import BoundFile
from llmstudiod.core.launch import LaunchRequest
from llmstudiod.core.unit import systemd_run_argv, unit_properties

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


def test_request_is_a_plain_value() -> None:
    """What a privileged helper will be told survives a line of JSON."""
    assert LaunchRequest.from_json(REQUEST.to_json()) == REQUEST
    assert "\n" not in REQUEST.to_json()


def test_own_environment_cannot_be_overridden() -> None:
    """A recipe's variables come before ours, and the later of two lines counts."""
    request = replace(REQUEST, environment={"LLMSTUDIO_SOCKET": "/elsewhere"})
    lines = [line for line in unit_properties(request) if line.startswith('Environment="LLMSTUDIO_SOCKET=')]
    assert lines == [f'Environment="LLMSTUDIO_SOCKET={REQUEST.socket_path}"']


@pytest.mark.parametrize(
    ("binary", "expected"),
    [
        ("/usr/bin/llama-server", "NoExecPaths=/"),
        ("/opt/llama/bin/llama-server", "ProtectHome=yes"),
        ("/home/me/llama-server", "ProtectHome=read-only"),
    ],
)
def test_what_may_be_executed(binary: str, expected: str) -> None:
    """A packaged server may execute itself alone; a build of one's own is still found where it lies."""
    assert expected in unit_properties(replace(REQUEST, argv=(binary,)))


def test_gpu_needs_its_devices() -> None:
    """With PrivateDevices=yes or a hidden /proc a CUDA server silently uses the CPU."""
    properties = unit_properties(replace(REQUEST, needs_gpu=True))
    assert "PrivateDevices=no" in properties
    assert "ProcSubset=all" in properties
    assert "DeviceAllow=char-nvidia* rw" in properties
    assert "PrivateDevices=yes" in unit_properties(REQUEST)
