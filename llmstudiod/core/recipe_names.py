"""How recipes may spell things: llama.cpp's names for our fields, and other backends' keys that mean nothing here."""

from collections.abc import Mapping

ALIASES: Mapping[str, str] = {
    "engine": "backend",
    "n_ctx": "max_model_len",
    "ctx_size": "max_model_len",
    "n_parallel": "max_num_seqs",
    "parallel": "max_num_seqs",
    "tp": "tensor_parallel_size",
    "cuda_visible_devices": "gpus",
    "CUDA_VISIBLE_DEVICES": "gpus",
    "visible_devices": "gpus",
    "ngl": "n_gpu_layers",
    "gpu_layers": "n_gpu_layers",
    "kv_cache_dtype": "cache_type_k",
    "batch_size": "n_batch",
    "ubatch_size": "n_ubatch",
    "env": "env_vars",
    "envVars": "env_vars",
}
"""Other spellings of our fields. Dashes count as underscores, so they are not listed."""

IGNORED: Mapping[str, str] = {
    "host": "the daemon owns the endpoint's address; see `listen` and llmstudiod.socket",
    "port": "every model is served on the one endpoint; see `listen` and llmstudiod.socket",
    "python_path": "llama-server needs no Python",
    "venv_path": "llama-server needs no Python",
}
"""Keys of old recipes that are accepted, have no effect, and are told."""

FOREIGN: Mapping[str, str] = {
    "gpu_memory_utilization": "llama-server takes what it needs; use n_gpu_layers and max_model_len",
    "trust_remote_code": "a GGUF holds no code",
    "tool_call_parser": "llama-server parses tool calls by the model's chat template",
    "reasoning_parser": "use reasoning_format",
    "enable_auto_tool_choice": "llama-server offers tool calls by itself",
    "quantization": "the quantisation is part of the GGUF",
    "dtype": "the types are part of the GGUF; the KV cache has cache_type_k and cache_type_v",
    "pipeline_parallel_size": "use tensor_parallel_size (how many GPUs) and split_mode",
    "pp": "use tensor_parallel_size (how many GPUs) and split_mode",
    "max_thinking_tokens": "use extra_args: {reasoning_budget: N}",
    "thinking_mode": "use extra_args: {reasoning_budget: N}",
    "default_chat_template_kwargs": "use extra_args: {chat_template_kwargs: {…}}",
    "speculative_config": "use draft_model and the spec_ fields",
    "max_num_batched_tokens": "use n_batch",
    "cpu_offload_gb": "use n_gpu_layers or n_cpu_moe",
    "enable_prefix_caching": "llama-server reuses common prefixes by itself",
    "enable_chunked_prefill": "llama-server splits prompts by n_batch",
    "tokenizer": "the tokenizer is part of the GGUF",
    "load_format": "models are GGUF",
    "download_dir": "models are not downloaded; see model_dirs in the settings",
    "revision": "models are not downloaded; name the file by model_path",
    "block_size": "it belongs to vLLM",
    "swap_space": "it belongs to vLLM",
    "enforce_eager": "it belongs to vLLM",
}
"""Keys of other backends, each with what to use instead."""

PATH_FIELDS = frozenset({"model_path", "mmproj", "draft_model", "chat_template_file"})
SINGLE_LINE_FIELDS = PATH_FIELDS | {"id", "name", "served_model_name", "override_tensor", "spec_type"}

DENIED_ENVIRONMENT = (
    ("LD_", "it can load foreign code"),
    ("LLAMA_", "it changes llama-server behind the recipe's back; use the recipe's fields or extra_args"),
    ("PYTHON", "it can load foreign code"),
    ("CUDA_VISIBLE_DEVICES", "use gpus"),
    ("CUDA_DEVICE_ORDER", "the daemon sets it"),
    ("GGML_BACKEND_PATH", "it can load foreign code"),
    ("GCONV_PATH", "it can load foreign code"),
    ("CUDA_INJECTION", "it can load foreign code"),
    ("NVTX_INJECTION", "it can load foreign code"),
    ("OPENSSL_", "it can load foreign code"),
    ("BASH_ENV", "it can run foreign code"),
    ("PATH", "the binary is not a recipe's business"),
    ("HOME", "the daemon sets it"),
    ("HF_", "models are not downloaded by llama-server"),
    ("HTTP", "models have no network"),
    ("LLMSTUDIO_", "the daemon sets it"),
    ("NOTIFY_SOCKET", "it belongs to the daemon"),
    ("LISTEN_", "it belongs to the daemon"),
)
"""Beginnings of names of environment variables that no recipe may set, and why."""


def denied_environment(name: str) -> str | None:
    """Return why a recipe may not set this variable, or None when it may.

    >>> denied_environment("LD_PRELOAD")
    'it can load foreign code'
    """
    upper = name.upper()
    return next((why for start, why in DENIED_ENVIRONMENT if upper.startswith(start)), None)
