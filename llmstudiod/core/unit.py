"""The properties of a model's transient unit: pure, so that they can be shown and tested without systemd.

Each was tried with the real llama-server on systemd 257 and 262. What a GPU needs is kept apart: with
``PrivateDevices=yes`` or without /proc/driver a CUDA server falls back to the CPU without failing.
"""

import posixpath
from collections.abc import Mapping

from llmstudiod.core.launch import LaunchRequest

SLICE = "llmstudio-models.slice"
PREFIX = "llmstudio-model-"
RUNTIME = "llmstudio-models"  # below /run and /var/cache

_ALWAYS: Mapping[str, str] = {
    "DynamicUser": "yes",
    "UMask": "0007",
    "WorkingDirectory": "/",
    "ProtectSystem": "strict",
    "PrivateTmp": "yes",
    # Inside the unit /run holds its own socket and its own files: no D-Bus, no other model's socket.
    "TemporaryFileSystem": "/run:mode=0755,size=64k",
    "InaccessiblePaths": "-/srv -/etc/llmstudio -/var/lib/llmstudio",
    "ProtectKernelTunables": "yes",
    "ProtectKernelModules": "yes",
    "ProtectKernelLogs": "yes",
    "ProtectControlGroups": "yes",
    "ProtectClock": "yes",
    "ProtectHostname": "yes",
    "ProtectProc": "invisible",
    "PrivateNetwork": "yes",
    "RestrictAddressFamilies": "AF_UNIX",
    "IPAddressDeny": "any",
    "PrivateIPC": "yes",
    "NoNewPrivileges": "yes",
    "CapabilityBoundingSet": "",
    "AmbientCapabilities": "",
    "PrivateUsers": "yes",
    "RestrictNamespaces": "yes",
    "RestrictRealtime": "yes",
    "RestrictSUIDSGID": "yes",
    "LockPersonality": "yes",
    "RemoveIPC": "yes",
    "KeyringMode": "private",
    "SystemCallArchitectures": "native",
    "SystemCallErrorNumber": "EPERM",
    "TasksMax": "512",
    "LimitNOFILE": "65536",
    "LimitCORE": "0",
    "LimitMEMLOCK": "infinity",
    "OOMPolicy": "stop",
    "OOMScoreAdjust": "500",
    "KillMode": "mixed",
    "TimeoutStartSec": "30",
    "TimeoutStopSec": "10",
    "Restart": "no",  # the daemon decides, and a restart by systemd would run an old command line
    "StandardInput": "null",
    "StandardOutput": "journal",
    "StandardError": "journal",
    "LogRateLimitIntervalSec": "0",  # the telling line must not be the one that is dropped
    "Documentation": "man:llmstudiod(8)",
    "Before": "llmstudiod.service",  # at shutdown the daemon drains first
}
_CPU: Mapping[str, str] = {
    "PrivateDevices": "yes",
    "DevicePolicy": "closed",
    "ProcSubset": "pid",
    "MemoryDenyWriteExecute": "yes",
}
_GPU: Mapping[str, str] = {"PrivateDevices": "no", "DevicePolicy": "closed", "ProcSubset": "all"}
_GPU_DEVICES = ("char-nvidia* rw", "char-drm rw", "/dev/kfd rw")


def unit_name(model_id: str) -> str:
    """Return the unit of a model.

    >>> unit_name("qwen3-32b")
    'llmstudio-model-qwen3-32b.service'
    """
    return f"{PREFIX}{model_id}.service"


def unit_properties(request: LaunchRequest, *, group: str | None = None) -> list[str]:
    """Return ``Name=value`` for each property, in the form in which ``systemd-run -p`` takes them."""
    model = request.model_id
    cache = f"/var/cache/{RUNTIME}/{model}"
    properties = [f"{name}={value}" for name, value in _ALWAYS.items()]
    properties += [f"{name}={value}" for name, value in (_GPU if request.needs_gpu else _CPU).items()]
    properties += [f"DeviceAllow={device}" for device in _GPU_DEVICES] if request.needs_gpu else []
    # Two lines of one filter: an allow-list, then what is taken out of it again.
    properties += ["SystemCallFilter=@system-service", "SystemCallFilter=~@privileged @resources"]
    properties += [f"Group={group}"] if group else []
    properties += [
        f"RuntimeDirectory={RUNTIME}/{model}",
        "RuntimeDirectoryMode=0750",
        f"CacheDirectory={RUNTIME}/{model}",
        "CacheDirectoryMode=0700",
        f"SyslogIdentifier={PREFIX}{model}",
        "LogExtraFields=LLMSTUDIO=model",
        f"LogExtraFields=LLMSTUDIO_MODEL={model}",
    ]
    properties += [f"BindReadOnlyPaths={_quote(file.host)}:{_quote(file.inside)}" for file in request.files]
    properties += _executable_paths(request.argv[0])
    properties += [f"{name}={value}" for name, value in request.limits.items()]
    environment = {
        "HOME": cache,
        "LLAMA_CACHE": cache,
        **request.environment,
        "LLMSTUDIO_MODEL": model,
        "LLMSTUDIO_RECIPE_HASH": request.recipe_hash,
        "LLMSTUDIO_SOCKET": request.socket_path,
    }
    properties += [f"Environment={_quote(f'{name}={value}')}" for name, value in environment.items()]
    if request.recipe_file:
        properties.append(f"SourcePath={request.recipe_file}")
    return properties


def _executable_paths(binary: str) -> list[str]:
    """Nothing may be executed but the server and its libraries, as far as we know where those are.

    A build of one's own keeps its libraries anywhere; there the home directories alone are closed.
    """
    if binary.startswith("/usr/bin/"):
        return ["ProtectHome=yes", "NoExecPaths=/", f"ExecPaths={_quote(binary)} /usr/lib -/usr/lib64"]
    is_at_home = binary.startswith(("/home/", "/root/"))
    return ["ProtectHome=read-only" if is_at_home else "ProtectHome=yes"]


def _quote(text: str) -> str:
    """Return ``text`` as one word of a unit's list value. Source: systemd.syntax(7), "Quoting"."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def systemd_run_argv(request: LaunchRequest, *, group: str | None = None) -> list[str]:
    """Return the whole ``systemd-run`` command line that starts the unit."""
    argv = [
        "systemd-run", f"--unit={unit_name(request.model_id)}", f"--slice={SLICE}", "--service-type=exec", "--quiet",
        "--no-ask-password", "--expand-environment=no", f"--description=LLM Studio model {request.model_id}",
    ]  # fmt: skip
    for item in unit_properties(request, group=group):
        argv += ["-p", item]
    return [*argv, "--", *request.argv]


def inside_socket_path(model_id: str) -> str:
    """Return the unit's socket, which lies in its own runtime directory on the host too."""
    return posixpath.join("/run", RUNTIME, model_id, "llama.sock")
