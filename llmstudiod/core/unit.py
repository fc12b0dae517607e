"""The properties of a model's transient unit: pure, so that they can be shown and tested without systemd.

Each was tried with the real llama-server on systemd 257 and 262. What a GPU needs is kept apart: with
``PrivateDevices=yes`` or without /proc/driver a CUDA server falls back to the CPU without failing.
"""

import posixpath
from collections.abc import Iterable, Mapping

from llmstudiod.core.launch import LaunchRequest

QUESTION_MEMORY = "4G"  # for what is asked about a model: a GPU's runtime, and 52 B for each token of its context

SLICE = "llmstudio-models.slice"
PREFIX = "llmstudio-model-"
GROUP = "llmstudio-model"  # may connect to the sockets; if nobody made it, DynamicUser= invents one
RUNTIME = "llmstudio-models"  # below /run and /var/cache

_ALWAYS: Mapping[str, str] = {
    "DynamicUser": "yes",
    "UMask": "0007",
    "WorkingDirectory": "/",
    "ProtectSystem": "strict",
    # Inside the unit /run holds its own socket and its own files: no D-Bus, no other model's socket.
    "TemporaryFileSystem": "/run:mode=0755,size=64k",
    "ProtectKernelTunables": "yes",
    "ProtectKernelModules": "yes",
    "ProtectKernelLogs": "yes",
    "ProtectControlGroups": "yes",
    "ProtectClock": "yes",
    "ProtectHostname": "yes",
    "ProtectProc": "invisible",
    "NoNewPrivileges": "yes",
    "CapabilityBoundingSet": "",
    "AmbientCapabilities": "",
    "PrivateUsers": "yes",
    "RestrictNamespaces": "yes",
    "RestrictRealtime": "yes",
    "RestrictSUIDSGID": "yes",
    "LockPersonality": "yes",
    "RemoveIPC": "yes",
    "PrivateTmp": "yes",
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
    "Documentation": "man:llmstudiod(8)",
}
_LOGGED: Mapping[str, str] = {
    "StandardInput": "null",
    "StandardOutput": "journal",
    "StandardError": "journal",
    "LogRateLimitIntervalSec": "0",  # the telling line must not be the one that is dropped
    "Before": "llmstudiod.service",  # at shutdown the daemon drains first
}
# Whatever may hold what others put there. /etc and /usr stay: libraries and certificates of theirs are needed.
_HIDDEN = ("/etc/llmstudio", "/var/lib/llmstudio", "/srv")
_HIDDEN_FROM_MODELS = ("/mnt", "/media", "/opt", "/boot", "/var/log", "/var/backups", "/var/mail", "/var/spool")
_NEVER_HIDDEN = ("/usr", "/lib", "/lib64", "/bin", "/etc", "/dev", "/proc", "/sys", "/run", "/var/cache")
_CPU: Mapping[str, str] = {"PrivateDevices": "yes", "DevicePolicy": "closed", "ProcSubset": "pid"}
_GPU: Mapping[str, str] = {"PrivateDevices": "no", "DevicePolicy": "closed", "ProcSubset": "all"}
_NETWORKS: Mapping[str, Mapping[str, str]] = {
    "none": {"PrivateNetwork": "yes", "RestrictAddressFamilies": "AF_UNIX", "IPAddressDeny": "any"},
    # A loopback of its own: enough for libraries that talk to themselves (NCCL, RPC), and for nobody else.
    "loopback": {"PrivateNetwork": "yes", "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6 AF_NETLINK"},
    "host": {"PrivateNetwork": "no", "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6 AF_NETLINK"},
}


def unit_name(model_id: str) -> str:
    """Return the unit of a model.

    >>> unit_name("qwen3-32b")
    'llmstudio-model-qwen3-32b.service'
    """
    return f"{PREFIX}{model_id}.service"


def sandbox_properties(request: LaunchRequest) -> list[str]:
    """Return what keeps a process to itself, whatever it is for: a server, or a question to its binary."""
    sandbox = request.sandbox
    properties = [f"{name}={value}" for name, value in {**_ALWAYS, **_NETWORKS[sandbox.network]}.items()]
    properties += [f"{name}={value}" for name, value in (_GPU if request.devices else _CPU).items()]
    properties += [f"DeviceAllow={device} rw" for device in request.devices]
    properties += [f"SupplementaryGroups={' '.join(request.device_groups)}"] if request.device_groups else []
    properties.append(f"MemoryDenyWriteExecute={_yes(not sandbox.writable_code)}")
    properties.append(f"PrivateIPC={_yes(not sandbox.shared_ipc)}")
    # Two lines of one filter: an allow-list, then what is taken out of it again.
    filtered = "~@privileged" if sandbox.scheduling else "~@privileged @resources"
    properties += ["SystemCallFilter=@system-service", f"SystemCallFilter={filtered}"]
    properties += [f"BindReadOnlyPaths={_quote(file.host)}:{_quote(file.inside)}" for file in request.files]
    if sandbox.shared_ipc:  # DynamicUser= keeps a /tmp of its own whatever is asked for
        properties.append("BindPaths=-/tmp/nvidia-mps")
    if request.devices:  # TemporaryFileSystem=/run hides its socket, which keeps the driver loaded
        properties.append("BindPaths=-/run/nvidia-persistenced")
    hidden = " ".join(_quote(f"-{path}") for path in hidden_paths(request))
    return [*properties, f"InaccessiblePaths={hidden}", *_executable_paths(request.executables)]


def hidden_paths(request: LaunchRequest) -> list[str]:
    """Return the directories that a unit cannot see, the model directories among them: its own files are bound.

    Left out is what would take a part of the system away, or the program itself: systemd cannot show a part of it.
    """
    more = (*_HIDDEN_FROM_MODELS, *request.hidden) if request.executables else ()
    programs = [path.removeprefix("-") for path in request.executables or request.argv[:1]]
    needed = [*_NEVER_HIDDEN, *programs]
    wanted = dict.fromkeys(path.rstrip("/") for path in (*_HIDDEN, *more))
    return [path for path in wanted if not any(f"{need}/".startswith(f"{path}/") for need in needed)]


def unit_properties(request: LaunchRequest) -> list[str]:
    """Return ``Name=value`` for each property, in the form in which ``systemd-run -p`` takes them."""
    model = request.model_id
    cache = f"/var/cache/{RUNTIME}/{model}"
    properties = sandbox_properties(request)
    properties += [f"{name}={value}" for name, value in _LOGGED.items()]
    properties += [
        f"Group={GROUP}",
        f"RuntimeDirectory={RUNTIME}/{model}",
        "RuntimeDirectoryMode=0750",
        f"CacheDirectory={RUNTIME}/{model}",
        "CacheDirectoryMode=0700",
        f"SyslogIdentifier={PREFIX}{model}",
        "LogExtraFields=LLMSTUDIO=model",
        f"LogExtraFields=LLMSTUDIO_MODEL={model}",
    ]
    properties += [f"{name}={value}" for name, value in request.limits.items()]
    environment = {
        "HOME": cache,
        "LLAMA_CACHE": cache,
        **request.environment,
        "LLMSTUDIO_MODEL": model,
        "LLMSTUDIO_RECIPE_HASH": request.recipe_hash,
        "LLMSTUDIO_SOCKET": request.socket_path,
    }
    properties += _environment(environment)
    if request.recipe_file:
        properties.append(f"SourcePath={request.recipe_file}")
    return properties


def _executable_paths(executables: Iterable[str]) -> list[str]:
    """Nothing may be executed but the server and its libraries; none given: whatever lies outside the homes."""
    paths = [*executables]
    if not paths:
        return ["ProtectHome=yes"]
    # tmpfs, unlike yes, lets what is named be seen: a build that lies in somebody's home directory.
    is_at_home = any(path.startswith(("/home/", "/root/")) for path in paths)
    home = ["ProtectHome=tmpfs", *(f"BindReadOnlyPaths={_quote(path)}" for path in paths if _is_at_home(path))]
    words = " ".join(_quote(path if path.startswith("-") else f"-{path}") for path in paths)
    return [*(home if is_at_home else ["ProtectHome=yes"]), "NoExecPaths=/", f"ExecPaths={words}"]


def _is_at_home(path: str) -> bool:
    return path.startswith(("/home/", "/root/"))


def _environment(variables: Mapping[str, str]) -> list[str]:
    return [f"Environment={_quote(f'{name}={value}')}" for name, value in variables.items()]


def _yes(is_so: bool) -> str:  # noqa: FBT001 - it is its only argument
    return "yes" if is_so else "no"


def _quote(text: str) -> str:
    """Return ``text`` as one word of a unit's list value. Source: systemd.syntax(7), "Quoting"."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def systemd_run_argv(request: LaunchRequest) -> list[str]:
    """Return the whole ``systemd-run`` command line that starts the unit."""
    argv = [
        "systemd-run", f"--unit={unit_name(request.model_id)}", f"--slice={SLICE}", "--service-type=exec", "--quiet",
        "--no-ask-password", "--expand-environment=no", f"--description=LLM Studio model {request.model_id}",
    ]  # fmt: skip
    for item in unit_properties(request):
        argv += ["-p", item]
    return [*argv, "--", *request.argv]


def show_argv(model_id: str) -> list[str]:
    """Return the ``systemctl`` command line that tells what `runs_as_asked` wants to know."""
    return ["systemctl", "show", "--property=ActiveState,ExecStart,Environment", unit_name(model_id)]


def runs_as_asked(shown: str, request: LaunchRequest) -> bool:
    """Whether the unit that ``systemctl show`` describes is active, with the command line and environment of a request.

    What systemd shows in another form than it was given counts as different.
    """
    lines = shown.splitlines()
    variables = {**request.environment, "LLMSTUDIO_RECIPE_HASH": request.recipe_hash}
    environment = next((f"{line[len('Environment=') :]} " for line in lines if line.startswith("Environment=")), "")
    return (
        "ActiveState=active" in lines
        and any(f"argv[]={' '.join(request.argv)} ;" in line for line in lines)
        and all(f"{name}={value} " in environment for name, value in variables.items())
    )


def question_argv(request: LaunchRequest, *, unit: str, timeout_s: float) -> list[str]:
    """Return the ``systemd-run`` command line that lets a binary answer a question, in a model's sandbox."""
    argv = [
        "systemd-run", f"--unit={unit}", f"--slice={SLICE}", "--service-type=exec", "--quiet", "--pipe", "--wait",
        "--collect", "--no-ask-password", "--expand-environment=no", "--description=LLM Studio asks llama-server",
    ]  # fmt: skip
    properties = [*sandbox_properties(request), *_environment({"HOME": "/nonexistent", **request.environment})]
    for item in [*properties, f"RuntimeMaxSec={timeout_s:g}", f"MemoryMax={QUESTION_MEMORY}", "MemorySwapMax=0"]:
        argv += ["-p", item]
    return [*argv, "--", *request.argv]


def stop_argv(model_id: str) -> list[str]:
    """Return the ``systemctl`` command line that stops the unit.

    The unit is ordered before llmstudiod.service, so that at shutdown the daemon drains first. But then the stop of the
    daemon would wait for the unit's, and an ordered stop of the unit for the daemon's: this one must not wait.
    """
    return ["systemctl", "stop", "--job-mode=ignore-dependencies", unit_name(model_id)]


def inside_socket_path(model_id: str) -> str:
    """Return the unit's socket, which lies in its own runtime directory on the host too."""
    return posixpath.join("/run", RUNTIME, model_id, "llama.sock")
