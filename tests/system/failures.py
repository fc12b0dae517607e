"""Ways in which a llama-server can end that is started for somebody, brought about through the real one."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from llmstudiod.demo.tiny_gguf import Fault, TinyModel, write_tiny_gguf

# Relative: without tests/__init__.py the absolute name differs between pytest and python -m.
from .daemon import MODELS  # noqa: TID252

SERVER = "/usr/bin/llama-server"
ENDLESS = "/srv/endless"  # a FIFO that nobody writes: a llama-server that opens it loads for ever
TALKATIVE = TinyModel(name="talkative", n_layers=8, n_embd=512, context_length=8192, eos_bias=-40)
LARGE = TinyModel(n_layers=16, n_embd=256, n_head_kv=4)  # half a GiB of KV cache for 32,768 tokens


@dataclass(frozen=True)
class Failing:
    """What is wrong, and what the client must be told.

    Attributes:
        kind: The failure's category.
        says: What its message must hold.
        model: What the model's file holds.
        fields: Of the recipe, beside id and path.
        unit: What an administrator's drop-in adds to the unit.
        signal: What the process gets, in the middle of an answer or, where that is endless, of its load.
        patch: What is changed in the model's file.
        may_be_mute: llama-server may not write what the message must hold: 0.7.0 ends for a bad argument without
            waiting for the thread that writes its log, and on a busy machine one run in twelve loses that line.
    """

    kind: str
    says: str
    model: TinyModel = field(default_factory=TinyModel)
    fields: dict[str, object] = field(default_factory=dict)
    unit: str = ""
    signal: str = ""
    patch: Callable[[bytes], bytes] = bytes
    may_be_mute: bool = False

    @property
    def loading(self) -> bool:
        """Whether it is hit while it loads."""
        return ENDLESS in self.unit

    def write(self, path: Path) -> None:
        """Write the model's file."""
        write_tiny_gguf(path, self.model)
        path.write_bytes(self.patch(path.read_bytes()))


def _runs(*words: str) -> str:
    """Return a drop-in that runs llama-server with another command line."""
    line = f"{SERVER} -m /run/llmstudio-model/0/%%.gguf --host /run/llmstudio-models/%%/llama.sock --offline "
    return "ExecStart=\nExecStart=" + line + " ".join(words)


def _shows(path: str) -> str:
    """Return a drop-in that puts another file in the model's place."""
    return f"BindReadOnlyPaths=\nBindReadOnlyPaths={path}:/run/llmstudio-model/0/%%.gguf"


def _tiny(**changes: object) -> TinyModel:
    return dataclasses.replace(TinyModel(), **changes)  # type: ignore[arg-type]


FAILURES: dict[str, Failing] = {
    # The model's file
    "shape": Failing("bad_model_file", "blk.0.attn_q.weight", _tiny(fault=Fault.WRONG_SHAPE)),
    "tensor": Failing("bad_model_file", "blk.0.ffn_down.weight", _tiny(fault=Fault.MISSING_TENSOR)),
    "key": Failing("bad_model_file", "block_count", _tiny(fault=Fault.MISSING_KEY)),
    "vocabulary": Failing(
        "bad_model_file", "vocab", patch=lambda data: data.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.nothin")
    ),
    "architecture": Failing("unsupported_arch", "nosuch", _tiny(fault=Fault.UNKNOWN_ARCHITECTURE)),
    "template": Failing("chat_template", "Unexpected token: }", _tiny(chat_template="{% if }")),
    "template-file": Failing(
        "chat_template", "Unexpected token: }", fields={"chat_template_file": f"{MODELS}/bad.jinja"}, may_be_mute=True
    ),
    # What belongs to it
    "draft": Failing("draft", f"'{MODELS}/shape.gguf'", fields={"draft_model": f"{MODELS}/shape.gguf"}),
    "mmproj": Failing(
        "mmproj", f"Failed to load CLIP model from {MODELS}/tiny.gguf", fields={"mmproj": f"{MODELS}/tiny.gguf"}
    ),
    "lora": Failing("lora", f"'{MODELS}/tiny.gguf'", fields={"lora": [f"{MODELS}/tiny.gguf"]}),
    # Settings
    "v-cache": Failing(
        "bad_args", "flash_attn", _tiny(n_embd=128), fields={"cache_type_v": "q8_0", "flash_attn": False}
    ),
    "k-cache": Failing("bad_args", "block size", fields={"cache_type_k": "q8_0"}),
    "unknown-flag": Failing("bad_args", "--no-such-flag", unit=_runs("--no-such-flag")),
    "removed-flag": Failing("bad_args", "--draft-max", unit=_runs("--draft-max", "3")),
    "value": Failing("bad_args", "q9_9", unit=_runs("-ctk", "q9_9")),
    "usage": Failing("bad_args", "sm", unit=_runs("-sm", "foo")),
    "no-device": Failing("bad_args", "CUDA0", unit=_runs("--device", "CUDA0")),
    "assertion": Failing("crash", "GGML_ASSERT(n_outputs >= 1)", unit=_runs("-c", "-5")),
    # Its surroundings
    "unreadable": Failing("permission", "may not be read", unit=_shows("/etc/shadow")),
    "absent": Failing("model_not_found", f"'{MODELS}/absent.gguf'", unit="BindReadOnlyPaths="),
    "other-file": Failing("bad_model_file", "invalid magic", unit=_shows("/etc/passwd")),
    "memory": Failing(
        "oom_host",
        "attempted to allocate 512.00 MB",
        LARGE,
        {"max_model_len": 2048, "max_num_seqs": 16},
        "LimitDATA=700M",
    ),
    "socket": Failing("socket", "listen", unit="ReadOnlyPaths=/run/llmstudio-models/%%"),
    "threads": Failing("crash", "Resource temporarily unavailable", unit="LimitAS=200M"),
    "system-call": Failing("crash", "SIGSYS", unit="SystemCallFilter=~mremap mmap\nSystemCallErrorNumber=\n"),
    "program": Failing("launcher", "is not executable inside the unit (203/EXEC)", unit="ExecPaths="),
    # Somebody's hand
    "killed-loading": Failing("killed", "SIGKILL", unit=_shows(ENDLESS), signal="KILL"),
    "ended-loading": Failing("exited", "it was told to end", unit=_shows(ENDLESS), signal="TERM"),
    "crashed-loading": Failing("crash", "signal 11", unit=_shows(ENDLESS), signal="SEGV"),
    "killed": Failing("killed", "SIGKILL", TALKATIVE, signal="KILL"),
    "crashed": Failing("crash", "signal 11", TALKATIVE, signal="SEGV"),
    "aborted": Failing("crash", "signal 6", TALKATIVE, signal="ABRT"),
}
