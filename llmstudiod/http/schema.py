"""The shapes of the admin interface's answers, for /api/spec. Imported only there: pydantic is slow to import."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

State = Literal["stopped", "starting", "loading", "ready", "draining", "stopping", "failed"]
OldState = Literal["running", "starting", "stopped", "error"]
Bytes = Annotated[int, Field(ge=0, description="bytes")]
Moment = Annotated[float, Field(description="seconds since 1970")]


class _Answer(BaseModel):
    pass


class Problem(_Answer):
    """What went wrong, of which kind, and what to do."""

    detail: str
    kind: str
    hint: str | None = None


class Refused(Problem):
    """A launch that failed; old clients read ``success``."""

    success: Literal[False]


class Fault(_Answer):
    """What is wrong with a file, and where."""

    file: str | None
    line: int | None
    key: str | None
    recipe_id: str | None
    message: str
    hint: str | None
    severity: Literal["fault", "warning"]


class Success(_Answer):
    """It was done."""

    success: Literal[True]


class WebCode(_Answer):
    """A code that signs in once."""

    code: str
    urls: list[str]
    expires_in_s: float


class Told(Success):
    """It was done, in words."""

    message: str


class Reloaded(Told):
    """Everything was read again."""

    faults: list[Fault]


class Launched(Told):
    """A model that is ready, or is being loaded."""

    pid: int | None = None
    log_file: str | None = None


class Saved(Success):
    """A recipe that was written."""

    id: str


class Evicted(Success):
    """Models that were unloaded."""

    evicted_pid: int | None
    evicted: list[str] = []


class Health(_Answer):
    """Whether the daemon can serve."""

    status: Literal["ok"]
    version: str
    inference_ready: bool
    running_model: str | None
    models: dict[str, int]
    faulty_recipes: int


class HostShare(_Answer):
    """What a model takes of RAM."""

    estimated: Bytes | None
    measured: Bytes | None


class Instance(_Answer):
    """A model, as lists show it."""

    id: str
    name: str
    state: State
    since: Moment
    reason: str | None
    kind: str | None
    hint: str | None
    is_refused: bool
    failures: int
    retry_at: Moment | None
    is_exhausted: bool
    is_pinned: bool
    in_flight: int
    queued: int
    progress: float | None
    stage: str | None
    alerts: list[str]
    slots: int | None
    n_ctx: int | None
    idle_since: Moment | None
    is_stale: bool
    tokens_per_second: float | None
    prompt_tokens_per_second: float | None
    ttft_ms: float | None
    memory: HostShare
    unit: str | None
    pid: int | None
    invocation_id: str | None


class Step(_Answer):
    """A transition."""

    at: Moment
    from_: State = Field(alias="from")
    to: State
    cause: str


class DeviceShare(HostShare):
    """What a model takes of a GPU."""

    index: int | None
    uuid: str | None
    layers: float | int | None


class WholeInstance(Instance):
    """A model with its story."""

    totals: dict[str, int]
    argv: list[str] | None
    socket: str | None
    sandbox: list[str]
    notes: list[str]
    last_lines: list[str]
    warnings: list[str]
    story: list[Step]
    devices: list[DeviceShare]


class Instances(_Answer):
    """Every model."""

    instances: list[Instance]


class Process(_Answer):
    """The first model that is ready."""

    pid: int | None
    backend: str | None
    model_path: str | None
    port: int | None
    served_model_name: str | None


class Status(_Answer):
    """The daemon and its models."""

    version: str
    running: bool
    process: Process | None
    inference_port: int | None
    ports: list[int]
    launching: str | None
    launcher: str
    llama_server: dict[str, Any]
    instances: list[Instance]
    counts: dict[str, int]
    faults: list[Fault]


class History(_Answer):
    """The last hour of a model, minute by minute, the oldest first."""

    id: str
    from_: Moment = Field(alias="from")
    step_s: float
    requests: list[int]
    tokens_per_second: list[float | None]
    prompt_tokens_per_second: list[float | None]
    ttft_ms: list[float | None]
    memory: list[int | None]
    gpu_memory: list[int | None]


class Slot(_Answer):
    """What a slot does: tokens read of its prompt, and written."""

    id: int
    is_busy: bool
    n_ctx: int
    n_prompt: int
    n_decoded: int


class Slots(_Answer):
    """Every slot of a model; none while it is not ready."""

    id: str
    slots: list[Slot]


class Recipe(_Answer):
    """A recipe, with every field of vllm-studio's and those of ours that it sets."""

    model_config = ConfigDict(extra="allow")

    id: str
    name: str
    model_path: str
    backend: str
    env_vars: dict[str, str] | None
    tensor_parallel_size: int
    pipeline_parallel_size: int
    max_model_len: int
    gpu_memory_utilization: float
    kv_cache_dtype: str
    max_num_seqs: int
    trust_remote_code: bool
    tool_call_parser: str | None
    reasoning_parser: str | None
    enable_auto_tool_choice: bool
    quantization: str | None
    dtype: str | None
    host: str
    port: int
    served_model_name: str | None
    python_path: str | None
    extra_args: dict[str, Any]
    max_thinking_tokens: int | None
    thinking_mode: str
    status: OldState
    state: State
    file: str | None
    old: list[str]
    warnings: list[Fault]


class Check(_Answer):
    """What is wrong with a recipe, and what would become of it."""

    ok: bool
    faults: list[Fault]
    recipe: dict[str, Any] | None
    yaml: str | None
    plan: dict[str, Any] | None
    placement: dict[str, Any] | None
    error: Problem | None
    by_hand: bool = Field(description="with ?id: a person wrote the file of this recipe, so it is not overwritten")


class FromCommand(_Answer):
    """A recipe made of a command line."""

    yaml: str
    recipe: dict[str, Any]
    notes: list[str]


class WaitReady(_Answer):
    """Whether a model became ready, and after how many seconds."""

    ready: bool
    elapsed: float
    error: str | None = None


class Gpu(_Answer):
    """A GPU: bytes, percent, degrees Celsius, watts."""

    index: int | None
    name: str
    memory_total: Bytes | None
    memory_used: Bytes | None
    memory_free: Bytes | None
    utilization: float | None
    temperature: float | None
    power_draw: float | None
    power_limit: float | None
    uuid: str | None
    kind: str
    processes: list[dict[str, Any]]
    promised: list[dict[str, Any]]


class HostMemory(_Answer):
    """RAM."""

    memory_total: Bytes | None
    memory_used: Bytes | None
    memory_available: Bytes | None
    memory_limit: Bytes | None


class Gpus(_Answer):
    """What the machine has."""

    count: int
    gpus: list[Gpu]
    host: HostMemory
    faults: list[str]


class Config(_Answer):
    """The settings in force, and vllm-studio's view of them."""

    settings: dict[str, Any]
    sources: dict[str, str]
    faults: list[Fault]
    config: dict[str, Any]
    services: list[dict[str, Any]]
    environment: dict[str, Any]


class Explained(_Answer):
    """What a start would do."""

    model_config = ConfigDict(extra="allow")

    recipe: Recipe
    argv: list[str]
    n_ctx: int
    n_parallel: int
    estimate: dict[str, Any] | None
    placement: dict[str, Any] | None
    systemd_run: list[str] | None


class LogSession(_Answer):
    """Whose log there is."""

    id: str
    recipe_id: str
    recipe_name: str
    model_path: str
    model: str
    backend: str
    created_at: str
    status: OldState


class LogSessions(_Answer):
    """All logs."""

    sessions: list[LogSession]


class Log(_Answer):
    """The last lines of a log."""

    id: str
    logs: list[str]
    content: str


class StudioModel(_Answer):
    """A GGUF of this machine."""

    path: str
    name: str
    id: str
    title: str | None
    size_bytes: Bytes
    modified_at: Moment | None
    architecture: str | None
    quantization: str | None
    context_length: int | None
    layers: int | None
    shards: int
    recipe_ids: list[str]
    has_recipe: bool
    fits: Literal["gpu", "gpu+ram", "ram", "no"]


class StudioModels(_Answer):
    """All GGUFs of this machine."""

    models: list[StudioModel]
    roots: list[dict[str, Any]]
    configured_models_dir: str | None


class Vram(_Answer):
    """What a file needs, in gibibytes; ``estimate`` in bytes."""

    model_size_gb: float
    context_memory_gb: float
    overhead_gb: float
    total_gb: float
    fits_in_vram: bool
    fits: bool
    utilization_percent: float | None
    breakdown: dict[str, float]
    n_ctx: int
    n_parallel: int
    layers: int
    estimate: dict[str, Any]


class Key(_Answer):
    """An API key without its secret."""

    name: str
    admin: bool
    metrics: bool
    models: list[str] | None
    created: Moment
    expires: Moment | None
    last_used: Moment | None = None


class Keys(_Answer):
    """All API keys."""

    keys: list[Key]


class KeyMade(Key):
    """An API key with its secret, which is told this once."""

    secret: str
    warnings: list[str]


class KeyRevoked(Success):
    """A key that is gone."""

    name: str
    warnings: list[str]


class Peak(_Answer):
    """The best that a model has shown."""

    model_id: str
    prefill_tps: float | None
    generation_tps: float | None
    ttft_ms: float | None
    total_tokens: int
    total_requests: int


class Peaks(_Answer):
    """The best of every model."""

    metrics: list[Peak]


class NoPeak(_Answer):
    """A model that has served nothing yet."""

    error: str


class Lifetime(_Answer):
    """The sums of all times."""

    tokens_total: int
    prompt_tokens_total: int
    completion_tokens_total: int
    requests_total: int
    energy_wh: float
    energy_kwh: float
    uptime_seconds: float
    first_started_at: Moment | None


class Usage(_Answer):
    """What was used, in vllm-studio's shape."""

    totals: dict[str, float]
    latency: dict[str, float]
    ttft: dict[str, float]
    tokens_per_request: dict[str, float]
    cache: dict[str, float]
    week_over_week: dict[str, Any]
    recent_activity: dict[str, float | None]
    peak_days: list[dict[str, Any]]
    peak_hours: list[dict[str, Any]]
    by_model: list[dict[str, Any]]
    by_key: list[dict[str, Any]]
    daily: list[dict[str, Any]]
    hourly_pattern: list[dict[str, Any]]


class Measured(_Answer):
    """How fast a benchmark's request was."""

    prompt_tokens: int
    completion_tokens: int
    total_time_s: float
    prefill_tps: float | None
    generation_tps: float | None


class Benchmark(Success):
    """A benchmark of one request."""

    model_id: str
    benchmark: Measured
    peak_metrics: Peak | None


class EventStats(_Answer):
    """How many read the events along."""

    total_events_published: int
    channels: dict[str, int]
