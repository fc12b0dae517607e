"""The table of ``llama-server``'s flags (0.7.0) that xllamacpp's ``CommonParams`` can express.

Read by ``command_line``. What is missing here is refused as unknown: it would be ignored in silence otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass

from llmstudiod.engine import values as v
from llmstudiod.engine.values import Reader, Settings

# What llama-server sets and CommonParams does not: the port, and -1 slots (auto: four that share one KV cache).
DEFAULTS: Settings = {"n_parallel": -1, "port": 9931}

_DRAFT = "speculative.draft"


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag with its spellings: ``read`` gets the value's text; a switch, which has no value, gets on or off."""

    names: tuple[str, ...]
    read: Reader | None = None
    switch: Callable[[bool], Settings] | None = None
    off_names: tuple[str, ...] = ()


def _value(names: str, read: Reader) -> Flag:
    return Flag(tuple(names.split()), read)


def _switch(names: str, off_names: str, path: str, *, inverted: bool = False) -> Flag:
    return Flag(tuple(names.split()), None, lambda on: {path: on is not inverted}, tuple(off_names.split()))


def _set(names: str, settings: Settings) -> Flag:
    return Flag(tuple(names.split()), None, lambda _on: settings)


def _no_effect(names: str, off_names: str) -> Flag:
    return Flag(tuple(names.split()), None, lambda _on: {}, tuple(off_names.split()))


FLAGS: tuple[Flag, ...] = (
    # Model
    _value("-m --model", v.text("model.path")),
    _value("-a --alias", v.texts("model_alias")),
    _value("--tags", v.texts("model_tags")),
    _value("-mm --mmproj", v.text("mmproj.path")),
    _switch("--mmproj-auto", "--no-mmproj --no-mmproj-auto", "no_mmproj", inverted=True),
    _switch("--mmproj-offload", "--no-mmproj-offload", "mmproj_use_gpu"),
    _value("-mmdev --mmproj-device", v.device_none("mmproj_device")),
    _value("--image-min-tokens", v.integer("image_min_tokens")),
    _value("--image-max-tokens", v.integer("image_max_tokens")),
    _value("--mtmd-batch-max-tokens", v.integer("mtmd_batch_max_tokens")),
    _value("--lora", v.lora),
    _value("--lora-scaled", v.lora_scaled),
    _set("--lora-init-without-apply", {"lora_init_without_apply": True}),
    _set("--check-tensors", {"check_tensors": True}),
    _set("--offline", {"offline": True}),
    # Threads
    _value("-t --threads", v.threads("cpuparams.n_threads")),
    _value("-tb --threads-batch", v.threads("cpuparams_batch.n_threads")),
    _value("--prio", v.integer("cpuparams.priority", low=-1, high=3)),
    _value("--prio-batch", v.integer("cpuparams_batch.priority", low=0, high=3)),
    _value("--poll", v.integer("cpuparams.poll", low=0, high=100)),
    _value("--poll-batch", v.integer("cpuparams_batch.poll", low=0, high=100)),
    _value("--numa", v.enum("numa", "ggml_numa_strategy", "distribute", "isolate", "numactl")),
    # Context and KV cache
    _value("-c --ctx-size", v.ctx_size),
    _value("-np --parallel", v.n_parallel),
    _value("-b --batch-size", v.integer("n_batch")),
    _value("-ub --ubatch-size", v.integer("n_ubatch")),
    _value("-n --predict --n-predict", v.integer("n_predict")),
    _value("--keep", v.integer("n_keep")),
    _value("-ctk --cache-type-k", v.cache_type("cache_type_k")),
    _value("-ctv --cache-type-v", v.cache_type("cache_type_v")),
    _switch("-kvu --kv-unified", "-no-kvu --no-kv-unified", "kv_unified"),
    _value("--kv-unified-per-slot", v.integer("kv_unified_per_slot")),
    _switch("-kvo --kv-offload", "-nkvo --no-kv-offload", "no_kv_offload", inverted=True),
    _value("-ctxcp --ctx-checkpoints --swa-checkpoints", v.integer("n_ctx_checkpoints")),
    _value("-cms --checkpoint-min-step", v.integer("checkpoint_min_step")),
    _value("-cram --cache-ram", v.integer("cache_ram_mib")),
    _value("--cache-reuse", v.integer("n_cache_reuse")),
    _switch("--cache-prompt", "--no-cache-prompt", "cache_prompt"),
    _switch("--cache-idle-slots", "--no-cache-idle-slots", "cache_idle_slots"),
    _switch("--context-shift", "--no-context-shift", "ctx_shift"),
    _switch("-cb --cont-batching", "-nocb --no-cont-batching", "cont_batching"),
    _set("--swa-full", {"swa_full": True}),
    _value("--rope-scaling", v.enum("rope_scaling_type", "llama_rope_scaling_type", "none", "linear", "yarn")),
    _value("--rope-scale", v.rope_scale),
    _value("--rope-freq-base", v.number("rope_freq_base")),
    _value("--rope-freq-scale", v.number("rope_freq_scale")),
    _value("--yarn-orig-ctx", v.integer("yarn_orig_ctx")),
    _value("--yarn-ext-factor", v.number("yarn_ext_factor")),
    _value("--yarn-attn-factor", v.number("yarn_attn_factor")),
    _value("--yarn-beta-slow", v.number("yarn_beta_slow")),
    _value("--yarn-beta-fast", v.number("yarn_beta_fast")),
    # Where weights and work go
    _value("-ngl --gpu-layers --n-gpu-layers", v.gpu_layers("n_gpu_layers")),
    _value("-sm --split-mode", v.enum("split_mode", "llama_split_mode", "none", "layer", "row", "tensor")),
    _value("-ts --tensor-split", v.proportions("tensor_split")),
    _value("-mg --main-gpu", v.integer("main_gpu")),
    _value("-dev --device", v.device_none()),
    _value("-ot --override-tensor", v.override_tensor(v.OVERRIDES)),
    _set("-cmoe --cpu-moe", v.cpu_moe(v.OVERRIDES)),
    _value("-ncmoe --n-cpu-moe", v.n_cpu_moe(v.OVERRIDES)),
    _value("-fa --flash-attn", v.flash_attention),
    _value("-fit --fit", v.on_off("fit_params", "--fit")),
    _value("-fitt --fit-target", v.mebibytes("fit_params_target")),
    _value("-fitc --fit-ctx", v.integer("fit_params_min_ctx")),
    _value("-lm --load-mode", v.load_mode),
    _value("-lzm --lazy-mode", v.enum("lazy_mode", "llama_lazy_mode", "on", "auto", "off")),
    _switch("--repack", "-nr --no-repack", "no_extra_bufts", inverted=True),
    _switch("--op-offload", "--no-op-offload", "no_op_offload", inverted=True),
    _set("--no-host", {"no_host": True}),
    _switch("--warmup", "--no-warmup", "warmup"),
    # Chat
    _switch("--jinja", "--no-jinja", "use_jinja"),
    _value("--chat-template", v.text("chat_template")),
    _value("--chat-template-file", v.file_text("chat_template")),
    _value("--chat-template-kwargs", v.template_kwargs),
    _value("--reasoning-format", v.reasoning_format),
    _value("-rea --reasoning", v.reasoning),
    _value("--reasoning-budget", v.integer("sampling.reasoning_budget_tokens", low=-1)),
    _value("--reasoning-budget-message", v.text("sampling.reasoning_budget_message")),
    _switch("--skip-chat-parsing", "--no-skip-chat-parsing", "force_pure_content_parser"),
    _switch("--prefill-assistant", "--no-prefill-assistant", "prefill_assistant"),
    _set("-sp --special", {"special": True}),
    # Embeddings
    _set("--embedding --embeddings", {"embedding": True}),
    _set("--rerank --reranking", {"embedding": True, **v.enum("pooling_type", "llama_pooling_type", "rank")("rank")}),
    _value("--pooling", v.enum("pooling_type", "llama_pooling_type", "none", "mean", "cls", "last", "rank")),
    _value("--embd-normalize", v.integer("embd_normalize")),
    # Sampling where a request does not say
    _value("--samplers", v.user_set("SAMPLERS", v.text("sampling.samplers"))),
    _value("-s --seed", v.seed),
    _set("--ignore-eos", {"sampling.ignore_eos": True}),
    _value("--temp --temperature", v.user_set("TEMP", v.number("sampling.temp", low=0))),
    _value("--top-k", v.user_set("TOP_K", v.integer("sampling.top_k"))),
    _value("--top-p", v.user_set("TOP_P", v.number("sampling.top_p"))),
    _value("--min-p", v.user_set("MIN_P", v.number("sampling.min_p"))),
    _value("--xtc-probability", v.user_set("XTC_PROBABILITY", v.number("sampling.xtc_probability"))),
    _value("--xtc-threshold", v.user_set("XTC_THRESHOLD", v.number("sampling.xtc_threshold"))),
    _value("--typical --typical-p", v.number("sampling.typ_p")),
    _value("--repeat-last-n", v.user_set("PENALTY_LAST_N", v.integer("sampling.penalty_last_n", low=-1))),
    _value("--repeat-penalty", v.user_set("PENALTY_REPEAT", v.number("sampling.penalty_repeat"))),
    _value("--presence-penalty", v.number("sampling.penalty_present")),
    _value("--frequency-penalty", v.number("sampling.penalty_freq")),
    _value("--dry-multiplier", v.number("sampling.dry_multiplier")),
    _value("--dry-base", v.number("sampling.dry_base")),
    _value("--dry-allowed-length", v.integer("sampling.dry_allowed_length")),
    _value("--dry-penalty-last-n", v.integer("sampling.dry_penalty_last_n", low=-1)),
    _value("--adaptive-target", v.number("sampling.adaptive_target")),
    _value("--adaptive-decay", v.number("sampling.adaptive_decay")),
    _value("--dynatemp-range", v.number("sampling.dynatemp_range")),
    _value("--dynatemp-exp", v.number("sampling.dynatemp_exponent")),
    _value("--mirostat", v.user_set("MIROSTAT", v.integer("sampling.mirostat"))),
    _value("--mirostat-lr", v.user_set("MIROSTAT_ETA", v.number("sampling.mirostat_eta"))),
    _value("--mirostat-ent", v.user_set("MIROSTAT_TAU", v.number("sampling.mirostat_tau"))),
    _set("-bs --backend-sampling", {"sampling.backend_sampling": True}),
    # Speculation
    _value("--spec-type", v.speculative_types),
    _value("--spec-draft-model -md --model-draft", v.text(f"{_DRAFT}.mparams.path")),
    _value("--spec-draft-threads -td --threads-draft", v.threads(f"{_DRAFT}.cpuparams.n_threads")),
    _value("--spec-draft-threads-batch -tbd --threads-batch-draft", v.threads(f"{_DRAFT}.cpuparams_batch.n_threads")),
    _value("--spec-draft-type-k -ctkd --cache-type-k-draft", v.cache_type(f"{_DRAFT}.cache_type_k")),
    _value("--spec-draft-type-v -ctvd --cache-type-v-draft", v.cache_type(f"{_DRAFT}.cache_type_v")),
    _value("--spec-draft-n-max", v.integer(f"{_DRAFT}.n_max")),
    _value("--spec-draft-n-min", v.integer(f"{_DRAFT}.n_min")),
    _value("--spec-draft-p-split --draft-p-split", v.number(f"{_DRAFT}.p_split")),
    _value("--spec-draft-p-min --draft-p-min", v.number(f"{_DRAFT}.p_min")),
    _value("--spec-draft-ngl -ngld --gpu-layers-draft --n-gpu-layers-draft", v.gpu_layers(f"{_DRAFT}.n_gpu_layers")),
    _value("--spec-draft-device -devd --device-draft", v.device_none(f"{_DRAFT}.devices")),
    _value("--spec-draft-override-tensor -otd --override-tensor-draft", v.override_tensor(f"{_DRAFT}.{v.OVERRIDES}")),
    _set("--spec-draft-cpu-moe -cmoed --cpu-moe-draft", v.cpu_moe(f"{_DRAFT}.{v.OVERRIDES}")),
    _switch("--spec-draft-backend-sampling", "--no-spec-draft-backend-sampling", f"{_DRAFT}.backend_sampling"),
    _value("--spec-ngram-mod-n-min", v.integer("speculative.ngram_mod.n_min")),
    _value("--spec-ngram-mod-n-max", v.integer("speculative.ngram_mod.n_max")),
    _value("--spec-ngram-mod-n-match", v.integer("speculative.ngram_mod.n_match")),
    _value("--spec-ngram-simple-size-n", v.integer("speculative.ngram_simple.size_n")),
    _value("--spec-ngram-simple-size-m", v.integer("speculative.ngram_simple.size_m")),
    _value("--spec-ngram-simple-min-hits", v.integer("speculative.ngram_simple.min_hits")),
    # HTTP
    _value("--host", v.texts("hostnames")),
    _value("--port", v.integer("port", low=0, high=65535)),
    _set("--reuse-port", {"reuse_port": True}),
    _value("--api-prefix", v.text("api_prefix")),
    _value("--api-key", v.texts("api_keys")),
    _value("--api-key-file", v.api_key_file),
    _value("--ssl-key-file", v.text("ssl_file_key")),
    _value("--ssl-cert-file", v.text("ssl_file_cert")),
    _value("--cors-origins", v.text("cors_origins")),
    _value("--cors-methods", v.text("cors_methods")),
    _value("--cors-headers", v.text("cors_headers")),
    _switch("--cors-credentials", "--no-cors-credentials", "cors_credentials"),
    _value("-to --timeout", v.integer("timeout_read", "timeout_write")),
    _value("--sse-ping-interval", v.integer("sse_ping_interval")),
    _value("--threads-http", v.integer("n_threads_http")),
    _set("--metrics", {"endpoint_metrics": True}),
    _set("--props", {"endpoint_props": True}),
    _switch("--slots", "--no-slots", "endpoint_slots"),
    _switch("--ui --webui", "--no-ui --no-webui", "ui"),
    _value("--path", v.text("public_path")),
    _value("--slot-save-path", v.directory("slot_save_path")),
    _value("--media-path", v.directory("media_path")),
    _value("-sps --slot-prompt-similarity", v.number("slot_prompt_similarity")),
    _value("--sleep-idle-seconds", v.integer("sleep_idle_seconds", low=-1)),
    # Log
    _value("-lv --verbosity --log-verbosity", v.integer("verbosity")),
    _set("-v --verbose --log-verbose", {"verbosity": 2**31 - 1}),
    _set("--log-disable", {"verbosity": -1}),
    # xllamacpp writes both always; who asks for less gets lines with a prefix.
    _no_effect("--log-prefix", "--no-log-prefix"),
    _no_effect("--log-timestamps", "--no-log-timestamps"),
)
