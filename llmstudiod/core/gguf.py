"""What a GGUF file says about itself: plain values, as `llmstudiod.adapters.gguf_file` reads them.

Sizes are in bytes, shapes have the row length first. Source: the GGUF specification and ggml/src/gguf.cpp.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class GgmlType:
    """How a tensor's numbers are stored: ``block_bytes`` for every ``block_size`` numbers of a row.

    None for both: a type of a newer llama.cpp. Whether it can be served is for the installed llama.cpp to say.
    """

    number: int
    name: str
    block_size: int | None
    block_bytes: int | None


# ggml.h and ggml.c (type_traits), spelled as ggml_type_name() does; q2_0 came after gguf-py 0.19.
GGML_TYPES: Mapping[int, GgmlType] = MappingProxyType({
    number: GgmlType(number, name, block_size, block_bytes)
    for number, name, block_size, block_bytes in (
        (0, "f32", 1, 4), (1, "f16", 1, 2), (2, "q4_0", 32, 18), (3, "q4_1", 32, 20), (6, "q5_0", 32, 22),
        (7, "q5_1", 32, 24), (8, "q8_0", 32, 34), (9, "q8_1", 32, 40), (10, "q2_K", 256, 84), (11, "q3_K", 256, 110),
        (12, "q4_K", 256, 144), (13, "q5_K", 256, 176), (14, "q6_K", 256, 210), (15, "q8_K", 256, 292),
        (16, "iq2_xxs", 256, 66), (17, "iq2_xs", 256, 74), (18, "iq3_xxs", 256, 98), (19, "iq1_s", 256, 50),
        (20, "iq4_nl", 32, 18), (21, "iq3_s", 256, 110), (22, "iq2_s", 256, 82), (23, "iq4_xs", 256, 136),
        (24, "i8", 1, 1), (25, "i16", 1, 2), (26, "i32", 1, 4), (27, "i64", 1, 8), (28, "f64", 1, 8),
        (29, "iq1_m", 256, 56), (30, "bf16", 1, 2), (34, "tq1_0", 256, 54), (35, "tq2_0", 256, 66),
        (39, "mxfp4", 32, 17), (40, "nvfp4", 64, 36), (41, "q1_0", 128, 18), (42, "q2_0", 64, 18),
    )
})  # fmt: skip
REMOVED_TYPES = {
    4: "q4_2", 5: "q4_3", 31: "q4_0_4_4", 32: "q4_0_4_8", 33: "q4_0_8_8",
    36: "iq4_nl_4_4", 37: "iq4_nl_4_8", 38: "iq4_nl_8_8",
}  # fmt: skip
# llama.h, enum llama_ftype; 1024 (LLAMA_FTYPE_GUESSED) is a flag beside them.
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4",
    40: "Q1_0", 41: "Q2_0",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ArraySummary:
    """A value that was stepped over: a string array, a long array, or (as ``char``) a very long string."""

    element_type: str
    length: int


Scalar = str | int | float | bool
MetadataValue = Scalar | tuple[int | float | bool, ...] | ArraySummary


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: ``shape`` with the row length first, ``offset`` from the file's ``data_offset``.

    ``n_bytes`` is None for a type whose size is unknown.
    """

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int
    n_bytes: int | None


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The header of one GGUF file, which is whole: the data that it describes is there, if its size can be told."""

    path: str
    file_bytes: int
    version: int
    metadata: Mapping[str, MetadataValue]
    tensors: tuple[TensorInfo, ...]
    data_offset: int

    @property
    def weights_bytes(self) -> int:
        """The tensors' bytes, without the padding between them; all data of the file where a size is unknown."""
        sizes = [tensor.n_bytes for tensor in self.tensors if tensor.n_bytes is not None]
        return sum(sizes) if len(sizes) == len(self.tensors) else max(0, self.file_bytes - self.data_offset)

    @property
    def expected_file_bytes(self) -> int | None:
        """The least size of a whole file with this header, or None where the size of a tensor is unknown.

        llama.cpp wants no padding after the last tensor.
        """
        ends = [tensor.offset + tensor.n_bytes for tensor in self.tensors if tensor.n_bytes is not None]
        return self.data_offset + max(ends, default=0) if len(ends) == len(self.tensors) else None

    @property
    def n_params(self) -> int:
        """The numbers in the tensors of this file."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def architecture(self) -> str | None:
        """llama.cpp's name for the kind of model, such as ``llama``; None in all shards but the first."""
        return self._text("general.architecture")

    @property
    def name(self) -> str | None:
        """The model's own name, for people."""
        return self._text("general.name")

    @property
    def context_length(self) -> int | None:
        """The context, in tokens, that the model was trained with."""
        return self._whole_number(f"{self.architecture}.context_length")

    @property
    def block_count(self) -> int | None:
        """The number of layers."""
        return self._whole_number(f"{self.architecture}.block_count")

    @property
    def split_no(self) -> int:
        """Which shard this is, from 0."""
        return self._whole_number("split.no") or 0

    @property
    def split_count(self) -> int:
        """How many shards the model has; 1 when it is not split."""
        return max(1, self._whole_number("split.count") or 1)

    @property
    def has_chat_template(self) -> bool:
        """Whether the file brings its own chat template."""
        return bool(self.metadata.get("tokenizer.chat_template"))

    @property
    def file_type(self) -> str | None:
        """The mix of tensor types as people know it, such as ``Q4_K_M``."""
        number = self._whole_number("general.file_type")
        return None if number is None else _FILE_TYPES.get(number & ~1024, f"ftype {number}")

    def _text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None

    def _whole_number(self, key: str) -> int | None:
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None


def is_auxiliary(header: GgufHeader) -> bool:
    """Tell whether a file only goes with a model: mmproj, LoRA adapter, control vector, imatrix, bare vocabulary."""
    if header.architecture in {"clip", "controlvector"}:
        return True
    if header.metadata.get("general.type") in {"mmproj", "adapter", "imatrix"}:
        return True
    # The first shard of a set may hold no tensors (llama-gguf-split --no-tensor-first-split).
    return not header.tensors and header.split_count == 1
