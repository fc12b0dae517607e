"""Small GGUF models of random weights, for the tour and the tests: ``write_tiny_gguf`` and ``write_big_gguf``.

A model answers with readable words and stops by itself.
The trick: no block writes to dimensions 0 and 1 of the residual stream, so they reach the output as embedded.
Dimension 0 is the same in every embedding, so column 0 of ``output.weight`` is a bias on the logits:
far below zero for bytes and special tokens, chosen for the end of the reply.
Dimension 1 tells words from the rest, which keeps a reply from ending before its first word.

Run it as ``python -m llmstudiod.demo.tiny_gguf OUT``. Needs the packages ``gguf`` and ``numpy`` (extra ``demo``).
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmstudiod.core.units import format_bytes, parse_size_bytes

if TYPE_CHECKING:
    import gguf
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_WORDS = """\
able about above across act add after again against age ago air all almost along also always among and animal answer
any appear apple area arm art ask away baby back ball band bank base be bear beat beauty bed before began begin behind
believe bell best better between big bird black blood blow blue board boat body bone book born both bottom bought box
boy branch bread break bright bring broad broke brother brought brown build burn busy but buy by call came camp can
capital captain car care carry case cat catch cause cell center century certain chair chance change chart check chief
child choose circle city claim class clean clear climb clock close cloth cloud coast coat cold collect color column
come common company compare complete condition consider contain continue control cook cool copper copy corn corner
correct cost cotton could count country course cover cow create crop cross crowd cry current cut dance danger dark day
dead deal dear decide deep degree depend describe desert design determine develop differ difficult direct discuss
distant divide do doctor dog dollar door double down draw dream dress drink drive drop dry during each ear early earth
ease east eat edge effect egg eight either electric element else end enemy energy engine enough enter equal even
evening event ever every exact example except excite exercise expect experience experiment eye face fact fair fall
family famous far farm fast fat father favor feed feel feet fell felt few field fight figure fill final find fine
finger finish fire first fish fit five flat floor flow flower fly follow food foot for force forest form forward found
four fraction free fresh friend from front fruit full fun game garden gas gather gave general gentle get girl give glad
glass go gold gone good got govern grand grass gray great green grew ground group grow guess guide gun had hair half
hand happen happy hard has hat have he head hear heart heat heavy held help her here high hill him his history hit hold
hole home hope horse hot hour house how huge human hundred hunt hurry ice idea if imagine inch include indicate
industry insect instant instrument interest invent iron is island it job join joy jump just keep kept key kill kind king
knew know lady lake land language large last late laugh law lay lead learn least leave led left leg length less let
letter level lie life lift light like line liquid list listen little live locate log lone long look lost lot loud love
low machine made magnet main make man many map mark market mass master match material matter may mean meant measure meat
meet melody men metal method middle might mile milk million mind mine minute miss mix modern molecule moment money month
moon more morning most mother motion mount mountain mouth move much multiply music must name nation natural nature near
"""

_FAR_BELOW = -40.0  # logit of a token that must never be sampled
_LOGIT_SPREAD = 1.5  # standard deviation of the words' logits
# Sharp attention makes a word depend on the whole text; with less, greedy sampling soon goes round in a circle.
_ATTENTION_GAIN = 4.0
_UNKNOWN, _BEGIN, _END = 0, 1, 2  # token ids; the 256 bytes follow, then the words
_MIB = 1 << 20


class WeightType(StrEnum):
    """How the matrices are stored; norms are always f32."""

    F32 = "f32"
    F16 = "f16"
    Q8_0 = "q8_0"


class Fault(StrEnum):
    """One thing that is wrong with the file; llama.cpp refuses each at load."""

    MISSING_KEY = "missing-key"  # no <architecture>.block_count
    MISSING_TENSOR = "missing-tensor"  # no blk.0.ffn_down.weight
    WRONG_SHAPE = "wrong-shape"  # blk.0.attn_q.weight has a row too many
    UNKNOWN_ARCHITECTURE = "unknown-architecture"  # general.architecture and its keys are "nosuch"
    TRUNCATED = "truncated"  # the last tensor is cut short, as by a broken download


@dataclass(frozen=True, slots=True)
class TinyModel:
    """What to write; the default is a 0.4 MB llama model that replies with some 30 words.

    Attributes:
        architecture: ``llama``, or ``qwen3`` (adds the norms on Q and K).
        n_ff: Width of the feed-forward layer; 0: twice ``n_embd``.
        eos_bias: Logit of the end of the reply where words have mean 0, deviation 1.5; each unit doubles
            or triples the odds of stopping, so 3.8 gives some 30 tokens and -40 never stops.
        pooling_type: ``mean``, ``cls``, ``last`` or ``rank`` for an embedding model; None leaves the key out.
        chat_template: Jinja text; None leaves the key out and llama.cpp uses ChatML.
    """

    name: str = "tiny"
    architecture: str = "llama"
    n_layers: int = 2
    n_embd: int = 64
    n_head: int = 4
    n_head_kv: int = 2
    n_ff: int = 0
    context_length: int = 2048
    weight_type: WeightType = WeightType.F16
    eos_bias: float = 3.8
    seed: int = 2
    chat_template: str | None = None
    pooling_type: str | None = None
    fault: Fault | None = None

    @property
    def ff(self) -> int:
        """Width of the feed-forward layer, never 0."""
        return self.n_ff or 2 * self.n_embd


def write_tiny_gguf(path: Path, model: TinyModel = TinyModel()) -> int:
    """Write the model and return the file's size in bytes; the same model always gives the same bytes."""
    return _write(path, model, layers_differ=True)


def write_big_gguf(path: Path, *, size_bytes: int) -> int:
    """Write an f16 llama model of about this size (within a layer of 71 MB) for tests of loading; return its size.

    Layers share their weights, which are computed once and held one layer at a time.
    """
    model = TinyModel(name="big", n_embd=2048, n_head=16, n_head_kv=4, context_length=8192)
    layer_bytes = 2 * sum(math.prod(shape) for name, shape in _shapes(model).items() if name.startswith("blk.0."))
    n_layers = max(1, round(size_bytes / layer_bytes))
    return _write(path, replace(model, n_layers=n_layers), layers_differ=False)


def _write(path: Path, model: TinyModel, *, layers_differ: bool) -> int:
    import gguf

    part = path.with_name(f".{path.name}.part")
    shapes = _shapes(model)
    architecture = "nosuch" if model.fault is Fault.UNKNOWN_ARCHITECTURE else model.architecture
    writer = gguf.GGUFWriter(part, architecture)
    try:
        _add_metadata(writer, model)
        for name, shape in shapes.items():
            kind = gguf.GGMLQuantizationType[_type_of(model, shape).name]
            n_bytes = math.prod(gguf.quant_shape_to_byte_shape(shape, kind))
            writer.add_tensor_info(name, shape, _no_dtype(), n_bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for array in _tensors(model, shapes, layers_differ=layers_differ):
            writer.write_tensor_data(array)
        writer.close()
        if model.fault is Fault.TRUNCATED:
            with part.open("r+b") as file:
                file.truncate(part.stat().st_size - 64)
        return part.rename(path).stat().st_size
    finally:
        part.unlink(missing_ok=True)


def _no_dtype() -> "np.dtype[Any]":
    # add_tensor_info wants a dtype, but uses it only where raw_dtype is not given.
    import numpy as np

    return np.dtype(np.float32)


def _shapes(model: TinyModel) -> dict[str, tuple[int, ...]]:
    """Return each tensor's shape, rows first as numpy has it (llama.cpp prints them the other way round)."""
    embd, ff, head = model.n_embd, model.ff, model.n_embd // model.n_head
    n_vocab = len(_tokens())
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (n_vocab, embd)}
    for layer in range(model.n_layers):
        block = {
            "attn_norm": (embd,),
            "attn_q": (embd, embd),
            "attn_k": (head * model.n_head_kv, embd),
            "attn_v": (head * model.n_head_kv, embd),
            "attn_output": (embd, embd),
            "ffn_norm": (embd,),
            "ffn_gate": (ff, embd),
            "ffn_up": (ff, embd),
            "ffn_down": (embd, ff),
        }
        if model.architecture == "qwen3":
            block |= {"attn_q_norm": (head,), "attn_k_norm": (head,)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    shapes |= {"output_norm.weight": (embd,), "output.weight": (n_vocab, embd)}
    if model.fault is Fault.MISSING_TENSOR:
        del shapes["blk.0.ffn_down.weight"]
    if model.fault is Fault.WRONG_SHAPE:
        shapes["blk.0.attn_q.weight"] = (embd + 1, embd)
    return shapes


def _type_of(model: TinyModel, shape: tuple[int, ...]) -> WeightType:
    return WeightType.F32 if len(shape) == 1 else model.weight_type


def _tensors(model: TinyModel, shapes: dict[str, tuple[int, ...]], *, layers_differ: bool) -> "Iterator[Array]":
    """Yield the stored form of each tensor in the order of ``shapes``."""
    import gguf
    import numpy as np

    random = np.random.default_rng(model.seed)
    shared: dict[str, Array] = {}
    for name, shape in shapes.items():
        key = name.split(".", 2)[-1] if name.startswith("blk.") else name
        array = shared.get(key)
        if array is None:
            values = _values(random, model, name, shape)
            array = gguf.quants.quantize(values, gguf.GGMLQuantizationType[_type_of(model, shape).name])
            if key != name and not layers_differ:
                shared[key] = array
        yield array


def _values(random: "np.random.Generator", model: TinyModel, name: str, shape: tuple[int, ...]) -> "Array":
    """Return a tensor's values in f32; the module's docstring explains dimensions 0 and 1."""
    import numpy as np

    if len(shape) == 1:
        return np.ones(shape, np.float32)
    values = random.standard_normal(shape, np.float32)
    # The other dimensions have variance 1, and so has the constant's share: each norm divides by sqrt(2) or so.
    constant = math.sqrt(model.n_embd)
    if name == "token_embd.weight":
        values[:, 0] = constant
        values[:, 1] = -1.0
        values[_END + 257 :, 1] = 1.0
    elif name == "output.weight":
        values *= _LOGIT_SPREAD * math.sqrt(2 / model.n_embd)
        values[: _END + 257] = 0.0
        values[:, :2] = 0.0
        values[: _END + 257, 0] = _FAR_BELOW
        # The sum of the two after a word is eos_bias, their difference after anything else is far below.
        values[_END, :2] = (model.eos_bias + _FAR_BELOW) / 2, (model.eos_bias - _FAR_BELOW) / 2
        values[:, 0] /= constant
        values[:, :2] *= math.sqrt(2)
    else:
        values *= 1 / math.sqrt(shape[1])
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            values *= _ATTENTION_GAIN
        if name.endswith(("attn_output.weight", "ffn_down.weight")):
            values[:2] = 0.0
            values *= 1 / math.sqrt(2 * model.n_layers)
    return values


def _tokens() -> list[str]:
    return [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *("\u2581" + word for word in _WORDS.split()),
    ]


def _add_metadata(writer: "gguf.GGUFWriter", model: TinyModel) -> None:
    import gguf

    mostly = {WeightType.F32: "ALL_F32", WeightType.F16: "MOSTLY_F16", WeightType.Q8_0: "MOSTLY_Q8_0"}
    tokens = _tokens()
    kinds = [gguf.TokenType.NORMAL] * len(tokens)
    kinds[: _END + 1] = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds[_END + 1 : _END + 257] = [gguf.TokenType.BYTE] * 256
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(model.name)
    writer.add_file_type(gguf.LlamaFileType[mostly[model.weight_type]])
    if model.fault is not Fault.MISSING_KEY:
        writer.add_block_count(model.n_layers)
    writer.add_context_length(model.context_length)
    writer.add_embedding_length(model.n_embd)
    writer.add_feed_forward_length(model.ff)
    writer.add_head_count(model.n_head)
    writer.add_head_count_kv(model.n_head_kv)
    writer.add_rope_dimension_count(model.n_embd // model.n_head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    if model.pooling_type is not None:
        writer.add_pooling_type(gguf.PoolingType[model.pooling_type.upper()])
    writer.add_tokenizer_model("llama")  # SentencePiece, with bytes for what is not a word
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_unk_token_id(_UNKNOWN)
    writer.add_bos_token_id(_BEGIN)
    writer.add_eos_token_id(_END)
    writer.add_add_bos_token(True)
    if model.chat_template is not None:
        writer.add_chat_template(model.chat_template)


def main(argv: list[str] | None = None) -> None:
    """Write a model as the command line asks, and print its path and size."""
    default = TinyModel()
    parser = argparse.ArgumentParser(
        prog="python -m llmstudiod.demo.tiny_gguf", description="Write a small GGUF model."
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--big", type=parse_size_bytes, metavar="SIZE", help="about this size (2.5GiB), for load tests")
    parser.add_argument("--embedding", action="store_true", help="an embedding model: pooling type mean")
    parser.add_argument("--name", default=default.name)
    parser.add_argument("--architecture", default=default.architecture, choices=["llama", "qwen3"])
    parser.add_argument("--n-layers", type=int, default=default.n_layers)
    parser.add_argument("--n-embd", type=int, default=default.n_embd)
    parser.add_argument("--n-head", type=int, default=default.n_head)
    parser.add_argument("--n-head-kv", type=int, default=default.n_head_kv)
    parser.add_argument("--n-ff", type=int, default=default.n_ff)
    parser.add_argument("--context-length", type=int, default=default.context_length)
    parser.add_argument("--weight-type", type=WeightType, choices=list(WeightType), default=default.weight_type)
    parser.add_argument("--eos-bias", type=float, default=default.eos_bias, help="higher: shorter replies")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--chat-template", default=default.chat_template, metavar="JINJA")
    parser.add_argument("--fault", type=Fault, choices=list(Fault), help="plant a fault")
    options = vars(parser.parse_args(argv))
    out, big, embedding = options.pop("out"), options.pop("big"), options.pop("embedding")
    if big is not None:
        size = write_big_gguf(out, size_bytes=big)
    else:
        size = write_tiny_gguf(out, TinyModel(**options, pooling_type="mean" if embedding else None))
    print(f"{out}: {format_bytes(size)}")


if __name__ == "__main__":
    main()
