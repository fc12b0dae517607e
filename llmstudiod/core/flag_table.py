"""The decision on every flag of llama-server: its kind, the recipe field that means the same, or why it is refused.

Pure data, read by `llmstudiod.core.flags` only. Source: ``llama-server --help`` of llama.cpp 0.7.0 (build 11669), which
is recorded in ``tests/data``; tests hold the table against it, and a system test against the installed binary.
A new flag of a newer build is decided here, by a person; until then root's recipes may give it and HTTP may not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class FlagKind(StrEnum):
    """What follows a flag on the command line."""

    SWITCH = "switch"  # nothing; many have a --no- twin
    VALUE = "value"  # one text
    NUMBER = "number"
    INTEGER = "integer"
    LIST = "list"  # texts joined by commas
    JSON = "json"  # one JSON document
    ON_OFF_AUTO = "on_off_auto"  # one of three words; without one llama-server eats the next argument


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag.

    Attributes:
        names: Every spelling that switches it on, the one that we write first.
        kind: What follows it.
        negated: The spellings that switch it off, the one that we write first; only switches have them.
        field: The recipe field with the same meaning; ``extra_args`` that names the flag is taken as that field.
        denied: Why no recipe may give it, as a clause; None when any may, over HTTP too.
    """

    names: tuple[str, ...]
    kind: FlagKind
    negated: tuple[str, ...] = ()
    field: str | None = None
    denied: str | None = None


@dataclass(frozen=True, slots=True)
class Renamed:
    """What took the place of a flag that llama-server dropped.

    Attributes:
        flag: The flag to give now; None when there is no single one, then ``hint`` says what to do.
        on: The value that stands for the old switch; None when the old flag took a value, which is passed on.
        off: The value that stands for the old switch given as false; None when that was the default.
        hint: What else to know, as a clause.
    """

    flag: str | None
    on: str | None = None
    off: str | None = None
    hint: str = ""


SWITCH, VALUE, NUMBER, INTEGER = FlagKind.SWITCH, FlagKind.VALUE, FlagKind.NUMBER, FlagKind.INTEGER
LIST, JSON, ON_OFF_AUTO = FlagKind.LIST, FlagKind.JSON, FlagKind.ON_OFF_AUTO

CONNECTS = "it connects to other machines"
CORS = "the daemon writes the CORS headers itself"
DOWNLOADS = "it downloads files; the daemon serves what is on disk"
FFMPEG = "it chooses programs that llama-server runs"
FITS = "the daemon sets it: it fits the model itself and tells what it reduced; use max_model_len and n_gpu_layers"
FIT_OFF = "it acts only with --fit, which the daemon turns off"
GPUS = "it goes round the daemon's memory accounts; use gpus"
HTTP_POOL = "the daemon sets it: with too small a pool a burst of requests stalls /health"
KEYS = "the daemon checks keys and speaks TLS; the upstream's socket is private"
LISTENS = "it opens a listening socket; the daemon owns the upstream's socket"
LOG = "the daemon sets it: it reads the log, and higher levels print prompts"
OFFLINE = "the daemon sets it: a model's server has no network"
PING = "the daemon sets it: a stop waits for the next ping of each active stream"
POOL = "the daemon sizes the slots; use max_model_len and kv_unified"
PREFIX = "the daemon expects the upstream's paths as they are"
PRINTS = "it prints something and exits"
PROPS = "it lets any client change the server's settings"
READINGS = "the daemon sets it, and reads the upstream's state there"
READS = "it reads another file than the model's own"
ROUTER = "it belongs to llama-server's router mode; the daemon starts and stops models itself"
SLEEP = "it unloads behind the daemon's back; use idle_timeout"
STATIC = "it serves files from a directory"
SYNTHETIC = "it is for benchmarks only: replies made with it are not the model's"
TIMEOUT = "the daemon sets it: its own time limits apply"
TOKEN = "it puts a secret on the command line, and the daemon downloads nothing"  # noqa: S105 - a reason, not a secret
TOOLS = "it runs tools or reaches servers that do"
UI = "the daemon sets it: llama-server's own page is not served"
VECTORS = "it belongs to --control-vector, which reads another file than the model's own"
WRITES = "it writes files"

FLAGS: tuple[Flag, ...] = (
    # common params
    Flag(("--help", "-h", "--usage"), SWITCH, denied=PRINTS),
    Flag(("--version",), SWITCH, denied=PRINTS),
    Flag(("--cache-list", "-cl"), SWITCH, denied=PRINTS),
    Flag(("--completion-bash",), SWITCH, denied=PRINTS),
    Flag(("--threads", "-t"), INTEGER, field="threads"),
    Flag(("--threads-batch", "-tb"), INTEGER),
    Flag(("--cpu-mask", "-C"), VALUE),
    Flag(("--cpu-range", "-Cr"), VALUE),
    Flag(("--cpu-strict",), INTEGER),
    Flag(("--prio",), INTEGER),
    Flag(("--poll",), INTEGER),
    Flag(("--cpu-mask-batch", "-Cb"), VALUE),
    Flag(("--cpu-range-batch", "-Crb"), VALUE),
    Flag(("--cpu-strict-batch",), INTEGER),
    Flag(("--prio-batch",), INTEGER),
    Flag(("--poll-batch",), INTEGER),
    Flag(("--ctx-size", "-c"), INTEGER, field="max_model_len"),
    Flag(("--n-predict", "-n", "--predict"), INTEGER),
    Flag(("--batch-size", "-b"), INTEGER, field="n_batch"),
    Flag(("--ubatch-size", "-ub"), INTEGER, field="n_ubatch"),
    Flag(("--keep",), INTEGER),
    Flag(("--swa-full",), SWITCH),
    Flag(("--flash-attn", "-fa"), ON_OFF_AUTO, field="flash_attn"),
    Flag(("--perf",), SWITCH, negated=("--no-perf",)),
    Flag(("--escape", "-e"), SWITCH, negated=("--no-escape",)),
    Flag(("--rope-scaling",), VALUE),
    Flag(("--rope-scale",), NUMBER),
    Flag(("--rope-freq-base",), NUMBER),
    Flag(("--rope-freq-scale",), NUMBER),
    Flag(("--yarn-orig-ctx",), INTEGER),
    Flag(("--yarn-ext-factor",), NUMBER),
    Flag(("--yarn-attn-factor",), NUMBER),
    Flag(("--yarn-beta-slow",), NUMBER),
    Flag(("--yarn-beta-fast",), NUMBER),
    Flag(("--kv-offload", "-kvo"), SWITCH, negated=("--no-kv-offload", "-nkvo")),
    Flag(("--repack",), SWITCH, negated=("--no-repack", "-nr")),
    Flag(("--no-host",), SWITCH),
    Flag(("--cache-type-k", "-ctk"), VALUE, field="cache_type_k"),
    Flag(("--cache-type-v", "-ctv"), VALUE, field="cache_type_v"),
    Flag(("--defrag-thold", "-dt"), NUMBER),
    Flag(("--rpc",), LIST, denied=CONNECTS),
    Flag(("--load-mode", "-lm"), VALUE, field="load_mode"),
    Flag(("--lazy-mode", "-lzm"), ON_OFF_AUTO),
    Flag(("--numa",), VALUE),
    Flag(("--device", "-dev"), LIST, denied=GPUS),
    Flag(("--list-devices",), SWITCH, denied=PRINTS),
    Flag(("--override-tensor", "-ot"), LIST, field="override_tensor"),
    Flag(("--cpu-moe", "-cmoe"), SWITCH),
    Flag(("--n-cpu-moe", "-ncmoe"), INTEGER, field="n_cpu_moe"),
    Flag(("--moe-cache-mib",), INTEGER),
    Flag(("--n-cpu-ffn", "-ncffn"), INTEGER),
    Flag(("--n-gpu-layers", "-ngl", "--gpu-layers"), VALUE, field="n_gpu_layers"),
    Flag(("--split-mode", "-sm"), VALUE, field="split_mode"),
    Flag(("--tensor-split", "-ts"), LIST, field="tensor_split"),
    Flag(("--main-gpu", "-mg"), INTEGER, field="main_gpu"),
    Flag(("--fit", "-fit"), ON_OFF_AUTO, denied=FITS),
    Flag(("--fit-target", "-fitt"), LIST, denied=FIT_OFF),
    Flag(("--fit-ctx", "-fitc"), INTEGER, denied=FIT_OFF),
    Flag(("--check-tensors",), SWITCH),
    Flag(("--override-kv",), LIST),
    Flag(("--op-offload",), SWITCH, negated=("--no-op-offload",)),
    Flag(("--lora",), LIST, field="lora"),
    Flag(("--lora-scaled",), LIST, field="lora"),
    Flag(("--control-vector",), LIST, denied=READS),
    Flag(("--control-vector-scaled",), LIST, denied=READS),
    Flag(("--control-vector-layer-range",), VALUE, denied=VECTORS),
    Flag(("--model", "-m"), VALUE, field="model_path"),
    Flag(("--model-url", "-mu"), VALUE, denied=DOWNLOADS),
    Flag(("--docker-repo", "-dr"), VALUE, denied=DOWNLOADS),
    Flag(("--hf-repo", "-hf", "-hfr"), VALUE, denied=DOWNLOADS),
    Flag(("--hf-file", "-hff"), VALUE, denied=DOWNLOADS),
    Flag(("--hf-token", "-hft"), VALUE, denied=TOKEN),
    Flag(("--log-disable",), SWITCH, denied=LOG),
    Flag(("--log-file",), VALUE, denied=WRITES),
    Flag(("--log-jsonl",), SWITCH, negated=("--no-log-jsonl",), denied=LOG),
    Flag(("--log-colors",), ON_OFF_AUTO, denied=LOG),
    Flag(("--verbose", "-v", "--log-verbose"), SWITCH, denied=LOG),
    Flag(("--offline",), SWITCH, denied=OFFLINE),
    Flag(("--verbosity", "-lv", "--log-verbosity"), INTEGER, denied=LOG),
    Flag(("--log-prefix",), SWITCH, negated=("--no-log-prefix",), denied=LOG),
    Flag(("--log-timestamps",), SWITCH, negated=("--no-log-timestamps",), denied=LOG),
    Flag(("--spec-draft-type-k", "-ctkd", "--cache-type-k-draft"), VALUE),
    Flag(("--spec-draft-type-v", "-ctvd", "--cache-type-v-draft"), VALUE),
    # sampling params
    Flag(("--samplers",), VALUE),
    Flag(("--seed", "-s"), INTEGER),
    Flag(("--sampler-seq", "--sampling-seq"), VALUE),
    Flag(("--ignore-eos",), SWITCH),
    Flag(("--temp", "--temperature"), NUMBER),
    Flag(("--top-k",), INTEGER),
    Flag(("--top-p",), NUMBER),
    Flag(("--min-p",), NUMBER),
    Flag(("--top-n-sigma", "--top-nsigma"), NUMBER),
    Flag(("--xtc-probability",), NUMBER),
    Flag(("--xtc-threshold",), NUMBER),
    Flag(("--typical-p", "--typical"), NUMBER),
    Flag(("--repeat-last-n",), INTEGER),
    Flag(("--repeat-penalty",), NUMBER),
    Flag(("--presence-penalty",), NUMBER),
    Flag(("--frequency-penalty",), NUMBER),
    Flag(("--dry-multiplier",), NUMBER),
    Flag(("--dry-base",), NUMBER),
    Flag(("--dry-allowed-length",), INTEGER),
    Flag(("--dry-penalty-last-n",), INTEGER),
    Flag(("--dry-sequence-breaker",), VALUE),
    Flag(("--adaptive-target",), NUMBER),
    Flag(("--adaptive-decay",), NUMBER),
    Flag(("--dynatemp-range",), NUMBER),
    Flag(("--dynatemp-exp",), NUMBER),
    Flag(("--mirostat",), INTEGER),
    Flag(("--mirostat-lr",), NUMBER),
    Flag(("--mirostat-ent",), NUMBER),
    Flag(("--logit-bias", "-l"), VALUE),
    Flag(("--grammar",), VALUE),
    Flag(("--grammar-file",), VALUE, denied=READS),
    Flag(("--json-schema", "-j"), JSON),
    Flag(("--json-schema-file", "-jf"), VALUE, denied=READS),
    Flag(("--backend-sampling", "-bs"), SWITCH),
    # speculative params
    Flag(("--spec-draft-hf", "-hfd", "-hfrd", "--hf-repo-draft"), VALUE, denied=DOWNLOADS),
    Flag(("--spec-draft-threads", "-td", "--threads-draft"), INTEGER),
    Flag(("--spec-draft-threads-batch", "-tbd", "--threads-batch-draft"), INTEGER),
    Flag(("--spec-draft-cpu-mask", "-Cd", "--cpu-mask-draft"), VALUE),
    Flag(("--spec-draft-cpu-range", "-Crd", "--cpu-range-draft"), VALUE),
    Flag(("--spec-draft-cpu-strict", "--cpu-strict-draft"), INTEGER),
    Flag(("--spec-draft-prio", "--prio-draft"), INTEGER),
    Flag(("--spec-draft-poll", "--poll-draft"), INTEGER),
    Flag(("--spec-draft-cpu-mask-batch", "-Cbd", "--cpu-mask-batch-draft"), VALUE),
    Flag(("--spec-draft-cpu-strict-batch", "--cpu-strict-batch-draft"), INTEGER),
    Flag(("--spec-draft-prio-batch", "--prio-batch-draft"), INTEGER),
    Flag(("--spec-draft-poll-batch", "--poll-batch-draft"), INTEGER),
    Flag(("--spec-draft-override-tensor", "-otd", "--override-tensor-draft"), LIST),
    Flag(("--spec-draft-cpu-moe", "-cmoed", "--cpu-moe-draft"), SWITCH),
    Flag(("--spec-draft-n-cpu-moe", "--spec-draft-ncmoe", "-ncmoed", "--n-cpu-moe-draft"), INTEGER),
    Flag(("--spec-draft-n-max",), INTEGER, field="spec_draft_n_max"),
    Flag(("--spec-draft-n-min",), INTEGER, field="spec_draft_n_min"),
    Flag(("--spec-draft-n-ubatch",), INTEGER),
    Flag(("--spec-synth-len",), NUMBER, denied=SYNTHETIC),
    Flag(("--spec-synth-rates",), LIST, denied=SYNTHETIC),
    Flag(("--spec-draft-p-split", "--draft-p-split"), NUMBER),
    Flag(("--spec-draft-p-min", "--draft-p-min"), NUMBER, field="spec_draft_p_min"),
    Flag(("--spec-draft-backend-sampling",), SWITCH, negated=("--no-spec-draft-backend-sampling",)),
    Flag(("--spec-draft-sampling",), VALUE),
    Flag(("--spec-draft-device", "-devd", "--device-draft"), LIST, denied=GPUS),
    Flag(
        ("--spec-draft-ngl", "-ngld", "--gpu-layers-draft", "--n-gpu-layers-draft"),
        VALUE,
        field="spec_draft_n_gpu_layers",
    ),
    Flag(("--spec-draft-model", "-md", "--model-draft"), VALUE, field="draft_model"),
    Flag(("--spec-type",), LIST, field="spec_type"),
    Flag(("--spec-ngram-mod-n-min",), INTEGER),
    Flag(("--spec-ngram-mod-n-max",), INTEGER),
    Flag(("--spec-ngram-mod-n-match",), INTEGER),
    Flag(("--spec-ngram-simple-size-n",), INTEGER),
    Flag(("--spec-ngram-simple-size-m",), INTEGER),
    Flag(("--spec-ngram-simple-min-hits",), INTEGER),
    Flag(("--spec-ngram-map-k-size-n",), INTEGER),
    Flag(("--spec-ngram-map-k-size-m",), INTEGER),
    Flag(("--spec-ngram-map-k-min-hits",), INTEGER),
    Flag(("--spec-ngram-map-k4v-size-n",), INTEGER),
    Flag(("--spec-ngram-map-k4v-size-m",), INTEGER),
    Flag(("--spec-ngram-map-k4v-min-hits",), INTEGER),
    # example-specific params
    Flag(("--lookup-cache-static", "-lcs"), VALUE, denied=READS),
    Flag(("--lookup-cache-dynamic", "-lcd"), VALUE, denied=WRITES),
    Flag(("--kv-unified-per-slot",), INTEGER, denied=POOL),
    Flag(("--ctx-checkpoints", "-ctxcp", "--swa-checkpoints"), INTEGER),
    Flag(("--checkpoint-min-step", "-cms"), INTEGER),
    Flag(("--cache-ram", "-cram"), INTEGER, field="cache_ram"),
    Flag(("--kv-unified", "-kvu"), SWITCH, negated=("--no-kv-unified", "-no-kvu"), field="kv_unified"),
    Flag(("--cache-idle-slots",), SWITCH, negated=("--no-cache-idle-slots",)),
    Flag(("--context-shift",), SWITCH, negated=("--no-context-shift",)),
    Flag(("--reverse-prompt", "-r"), VALUE),
    Flag(("--special", "-sp"), SWITCH),
    Flag(("--warmup",), SWITCH, negated=("--no-warmup",)),
    Flag(("--spm-infill",), SWITCH),
    Flag(("--pooling",), VALUE, field="pooling"),
    Flag(("--parallel", "-np"), INTEGER, field="max_num_seqs"),
    Flag(("--cont-batching", "-cb"), SWITCH, negated=("--no-cont-batching", "-nocb")),
    Flag(("--mmproj", "-mm"), VALUE, field="mmproj"),
    Flag(("--mmproj-url", "-mmu"), VALUE, denied=DOWNLOADS),
    Flag(("--mmproj-auto",), SWITCH, negated=("--no-mmproj", "--no-mmproj-auto")),
    Flag(("--mmproj-offload",), SWITCH, negated=("--no-mmproj-offload",)),
    Flag(("--mmproj-device", "-mmdev"), VALUE, denied=GPUS),
    Flag(("--image-min-tokens",), INTEGER),
    Flag(("--image-max-tokens",), INTEGER),
    Flag(("--mtmd-batch-max-tokens",), INTEGER),
    Flag(("--video-fps",), NUMBER),
    Flag(("--video-timestamp-interval",), INTEGER),
    Flag(("--video-ffmpeg-dir",), VALUE, denied=FFMPEG),
    Flag(("--alias", "-a"), LIST, field="served_model_name"),
    Flag(("--tags",), LIST),
    Flag(("--embd-normalize",), INTEGER),
    Flag(("--host",), LIST, denied=LISTENS),
    Flag(("--port",), INTEGER, denied=LISTENS),
    Flag(("--reuse-port",), SWITCH, denied=LISTENS),
    Flag(("--path",), VALUE, denied=STATIC),
    Flag(("--cors-origins",), LIST, denied=CORS),
    Flag(("--cors-methods",), LIST, denied=CORS),
    Flag(("--cors-headers",), LIST, denied=CORS),
    Flag(("--cors-credentials",), SWITCH, negated=("--no-cors-credentials",), denied=CORS),
    Flag(("--api-prefix",), VALUE, denied=PREFIX),
    Flag(("--ui-config", "--webui-config"), JSON, denied=UI),
    Flag(("--ui-config-file", "--webui-config-file"), VALUE, denied=READS),
    Flag(
        ("--ui-mcp-proxy", "--webui-mcp-proxy"),
        SWITCH,
        negated=("--no-ui-mcp-proxy", "--no-webui-mcp-proxy"),
        denied=TOOLS,
    ),
    Flag(("--tools",), LIST, denied=TOOLS),
    Flag(("--tools-runtime",), VALUE, denied=TOOLS),
    Flag(("--mcp-servers-config",), VALUE, denied=TOOLS),
    Flag(("--mcp-servers-json",), JSON, denied=TOOLS),
    Flag(("--agent", "-ag"), SWITCH, negated=("--no-agent", "-no-ag"), denied=TOOLS),
    Flag(("--ui", "--webui"), SWITCH, negated=("--no-ui", "--no-webui"), denied=UI),
    Flag(("--embedding", "--embeddings"), SWITCH, field="embedding"),
    Flag(("--rerank", "--reranking"), SWITCH, field="rerank"),
    Flag(("--api-key",), LIST, denied=KEYS),
    Flag(("--api-key-file",), VALUE, denied=KEYS),
    Flag(("--ssl-key-file",), VALUE, denied=KEYS),
    Flag(("--ssl-cert-file",), VALUE, denied=KEYS),
    Flag(("--chat-template-kwargs",), JSON),
    Flag(("--timeout", "-to"), INTEGER, denied=TIMEOUT),
    Flag(("--sse-ping-interval",), INTEGER, denied=PING),
    Flag(("--threads-http",), INTEGER, denied=HTTP_POOL),
    Flag(("--cache-prompt",), SWITCH, negated=("--no-cache-prompt",)),
    Flag(("--cache-reuse",), INTEGER),
    Flag(("--metrics",), SWITCH, denied=READINGS),
    Flag(("--props",), SWITCH, denied=PROPS),
    Flag(("--slots",), SWITCH, negated=("--no-slots",), denied=READINGS),
    Flag(("--slot-save-path",), VALUE, denied=WRITES),
    Flag(("--media-path",), VALUE, denied=READS),
    Flag(("--models-dir",), VALUE, denied=ROUTER),
    Flag(("--models-preset",), VALUE, denied=ROUTER),
    Flag(("--models-max",), INTEGER, denied=ROUTER),
    Flag(("--models-autoload",), SWITCH, negated=("--no-models-autoload",), denied=ROUTER),
    Flag(("--jinja",), SWITCH, negated=("--no-jinja",)),
    Flag(("--reasoning-format",), VALUE, field="reasoning_format"),
    Flag(("--reasoning", "-rea"), ON_OFF_AUTO),
    Flag(("--reasoning-effort",), VALUE),
    Flag(("--reasoning-budget",), INTEGER),
    Flag(("--reasoning-budget-message",), VALUE),
    Flag(("--reasoning-preserve",), SWITCH, negated=("--no-reasoning-preserve",)),
    Flag(("--chat-template",), VALUE, field="chat_template"),
    Flag(("--chat-template-file",), VALUE, field="chat_template_file"),
    Flag(("--skip-chat-parsing",), SWITCH, negated=("--no-skip-chat-parsing",)),
    Flag(("--prefill-assistant",), SWITCH, negated=("--no-prefill-assistant",)),
    Flag(("--slot-prompt-similarity", "-sps"), NUMBER),
    Flag(("--lora-init-without-apply",), SWITCH),
    Flag(("--sleep-idle-seconds",), INTEGER, denied=SLEEP),
    Flag(("--log-prompts-dir",), VALUE, denied=WRITES),
    Flag(("--embd-gemma-default",), SWITCH, denied=DOWNLOADS),
    Flag(("--fim-qwen-1.5b-default",), SWITCH, denied=DOWNLOADS),
    Flag(("--fim-qwen-3b-default",), SWITCH, denied=DOWNLOADS),
    Flag(("--fim-qwen-7b-default",), SWITCH, denied=DOWNLOADS),
    Flag(("--fim-qwen-7b-spec",), SWITCH, denied=DOWNLOADS),
    Flag(("--fim-qwen-14b-spec",), SWITCH, denied=DOWNLOADS),
    Flag(("--fim-qwen-30b-default",), SWITCH, denied=DOWNLOADS),
    Flag(("--gpt-oss-20b-default",), SWITCH, denied=DOWNLOADS),
    Flag(("--gpt-oss-120b-default",), SWITCH, denied=DOWNLOADS),
    Flag(("--vision-gemma-4b-default",), SWITCH, denied=DOWNLOADS),
    Flag(("--vision-gemma-12b-default",), SWITCH, denied=DOWNLOADS),
    Flag(("--spec-default",), SWITCH),
)

DENIED_PREFIXES: tuple[tuple[str, str], ...] = (
    ("--agent", TOOLS),
    ("--api-", KEYS),
    ("--control-vector", READS),
    ("--cors-", CORS),
    ("--hf-", DOWNLOADS),
    ("--log-", LOG),
    ("--lookup-cache-", READS),
    ("--mcp-", TOOLS),
    ("--models-", ROUTER),
    ("--rpc", CONNECTS),
    ("--ssl-", KEYS),
    ("--tools", TOOLS),
    ("--ui-", UI),
    ("--webui", UI),
)
"""Beginnings of flags that are refused even when a newer build has one that `FLAGS` does not list."""

DENIED_SUFFIXES: tuple[tuple[str, str], ...] = (
    ("-default", DOWNLOADS),  # the presets of models
    ("-dir", READS),
    ("-file", READS),
    ("-hf", DOWNLOADS),
    ("-path", READS),
    ("-url", DOWNLOADS),
)
"""Ends of flags that are refused in the same way."""

_SPEC_NGRAM = "give it for one kind of n-gram, such as --spec-ngram-simple-"

RENAMED: Mapping[str, Renamed] = {
    # Upstream's own translation, from the builds (b10150 to b10734) that accepted both with a warning.
    "--mmap": Renamed("--load-mode", on="mmap", off="none"),
    "--no-mmap": Renamed("--load-mode", on="none"),
    "--mlock": Renamed("--load-mode", on="mlock"),
    "-dio": Renamed("--load-mode", on="dio"),
    "--dio": Renamed("--load-mode", on="dio"),
    "--direct-io": Renamed("--load-mode", on="dio"),
    "-ndio": Renamed("--load-mode", on="auto"),
    "--no-direct-io": Renamed("--load-mode", on="auto"),
    # Removed stubs: the help still lists them, giving one ends the server.
    "--draft": Renamed("--spec-draft-n-max", hint="n-gram drafts use --spec-ngram-mod-n-max"),
    "--draft-n": Renamed("--spec-draft-n-max", hint="n-gram drafts use --spec-ngram-mod-n-max"),
    "--draft-max": Renamed("--spec-draft-n-max", hint="n-gram drafts use --spec-ngram-mod-n-max"),
    "--draft-min": Renamed("--spec-draft-n-min", hint="n-gram drafts use --spec-ngram-mod-n-min"),
    "--draft-n-min": Renamed("--spec-draft-n-min", hint="n-gram drafts use --spec-ngram-mod-n-min"),
    "--spec-ngram-size-n": Renamed(None, hint=f"{_SPEC_NGRAM}size-n"),
    "--spec-ngram-size-m": Renamed(None, hint=f"{_SPEC_NGRAM}size-m"),
    "--spec-ngram-min-hits": Renamed(None, hint=f"{_SPEC_NGRAM}min-hits"),
    # Gone without a stub.
    "-cd": Renamed(None, hint="the draft model's context follows max_model_len"),
    "--ctx-size-draft": Renamed(None, hint="the draft model's context follows max_model_len"),
    "--spec-replace": Renamed(None, hint="use a draft model with the same vocabulary"),
}
"""Flags that other builds have and llama.cpp 0.7.0 has not, with what to use now."""

MERGED_LOAD_MODES: Mapping[frozenset[str], str] = {
    frozenset({"none", "mlock"}): "mlock",
    frozenset({"mmap", "mlock"}): "mmap+mlock",
    frozenset({"none", "dio"}): "dio",
    frozenset({"auto", "none"}): "none",
    frozenset({"auto", "mmap"}): "mmap",
    frozenset({"auto", "mlock"}): "mlock",
}
"""The one load mode that says what several of the old switches said together."""
