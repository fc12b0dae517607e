"""The daemon's settings and their defaults. `llmstudiod.core.settings_reader` reads them from files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from llmstudiod.core.bounds import Ge, Interval
from llmstudiod.core.recipe import Fault
from llmstudiod.core.sharing import RESERVED

DEFAULT_FILE = "/etc/llmstudio/llmstudiod.yaml"


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting with its default. Durations in seconds, sizes in bytes."""

    recipes_dir: str = "/etc/llmstudio/recipes.d"
    auto_recipes: bool = True
    model_dirs: tuple[str, ...] = ("/var/lib/llmstudio/models", "/srv/models", "/models")
    llama_server: str | None = None
    launcher: Literal["auto", "systemd", "subprocess"] = "auto"
    runtime_dir: str = "/run/llmstudio-models"
    listen: tuple[str, ...] = ("127.0.0.1:8080", "[::1]:8080")
    admin_socket: str = "/run/llmstudio/admin.sock"
    launcher_socket: str = "/run/llmstudio/launcher.sock"
    keys_file: str = "/etc/llmstudio/keys"
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    allow_open_listener: bool = False
    open_status: bool = False
    idle_timeout: Annotated[float, Ge(0)] = 600.0
    max_instances: Annotated[int, Interval(ge=0, le=1000)] = 0
    reserved_memory: Mapping[str, int] = field(default_factory=lambda: dict(RESERVED))
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    concurrency_limit: Annotated[int, Interval(ge=0, le=4096)] = 0
    max_queue: Annotated[int, Interval(ge=0, le=100_000)] = 64
    max_body: Annotated[int, Interval(ge=1024, le=1 << 32)] = 64 << 20
    load_stall_timeout: Annotated[float, Ge(1)] = 120.0
    drain_timeout: Annotated[float, Ge(0)] = 60.0
    restart_limit: Annotated[int, Interval(ge=0, le=100)] = 3
    restart_window: Annotated[float, Ge(1)] = 600.0
    exit_idle: Annotated[float, Ge(0)] = 0.0
    wait_comment_interval: Annotated[float, Ge(0.05)] = 5.0
    usage_keep: Annotated[float, Ge(3600)] = 30 * 86400.0
    log_level: Literal["error", "warning", "info", "debug"] = "info"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the settings of which ``values`` are the fields, as JSON holds them; nothing is checked again."""
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """Settings, where each that is not a default came from, and what was wrong."""

    settings: Settings
    sources: Mapping[str, str]
    faults: tuple[Fault, ...]
