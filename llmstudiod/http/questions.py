"""The shapes of the admin interface's requests: what they are checked by. The answers' are in `schema`.

Imported when the first such request comes: pydantic is slow to import.
"""

import json
from typing import Literal, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from llmstudiod.core.errors import BadRequestError
from llmstudiod.core.keys import MAX_KEYS, NAME
from llmstudiod.core.recipe import CacheType
from llmstudiod.core.units import parse_duration_s
from llmstudiod.http.json_body import json_object

M = TypeVar("M", bound=BaseModel)
DAY_S = 86400.0
MAX_VALID_S = 36500 * DAY_S
"""For how long a key may count that has an end: what the keys file takes is far more."""


async def parsed(kind: type[M], request: web.Request) -> M:
    """Return a request's JSON body as a ``kind``.

    Raises:
        BadRequestError: It is none; the message names each field, what was found and what was expected.
    """
    return validated(kind, await request.read() or b"{}")


def validated(kind: type[M], raw: bytes | bytearray) -> M:
    """Return JSON as a ``kind``.

    Raises:
        BadRequestError: It is none.
    """
    values = json_object(raw)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        told = [
            f"{'.'.join(map(str, item['loc'])) or 'body'}: {_said(item['msg'])}, found {json.dumps(item['input'])[:60]}"
            for item in error.errors(include_url=False, include_context=False)[:5]
        ]
        raise BadRequestError("; ".join(told)) from None


def _said(message: str) -> str:
    """Return the words of a check of ours without pydantic's before them."""
    return message.removeprefix("Value error, ")


class Question(BaseModel):
    """What a request's body holds; nothing else may be in it, and no value is turned into another."""

    model_config = ConfigDict(extra="forbid", strict=True)


class VramQuestion(Question):
    """What would a file need with these settings?"""

    model: str = Field(min_length=1, max_length=4096, description="a GGUF below a model directory, or its whole path")
    context_length: int | None = Field(None, ge=1, le=1 << 24, description="tokens of one request")
    tp_size: int = Field(1, ge=1, le=64, description="GPUs")
    kv_dtype: Literal["auto", "fp16", "fp8"] | CacheType | None = None
    max_num_seqs: int | None = Field(None, ge=1, le=256, description="slots")
    n_gpu_layers: int | None = Field(None, ge=0, le=1024)

    def cache_type(self) -> str | None:
        """Return llama.cpp's name of the cache's type; fp8 is vllm-studio's, and Q8_0 the nearest."""
        names: dict[str | None, str | None] = {"auto": None, "fp16": "f16", "fp8": "q8_0"}
        return names.get(self.kv_dtype, self.kv_dtype)


class NewKey(Question):
    """An API key that is to be made."""

    name: str = Field(pattern=f"^{NAME.pattern}$")
    admin: bool = False
    metrics: bool = False
    models: list[str] | None = Field(None, min_length=1, max_length=MAX_KEYS, description="nothing: all of them")
    expires: str | int | float | None = Field(None, description="a duration, or never")

    @field_validator("models", mode="before")
    @classmethod
    def _names_some(cls, value: object) -> object:
        """Nothing means all models, so an empty list must not."""
        is_list = isinstance(value, list) and value and all(isinstance(name, str) and name for name in value)
        if value is not None and not is_list:
            raise ValueError("expected a list of at least one name, or nothing for all models")
        return value

    @field_validator("expires")
    @classmethod
    def _is_duration(cls, value: str | float | None) -> str | float | None:
        if value is not None and parse_duration_s(value) > MAX_VALID_S:
            raise ValueError(f"expected {MAX_VALID_S / DAY_S:.0f}d at most, or never")
        return value

    def valid_s(self) -> float:
        """Return for how many seconds it counts; 0: for ever."""
        return 0.0 if self.expires is None else parse_duration_s(self.expires)


class CommandLine(Question):
    """A llama-server command that somebody has already."""

    command: str = Field(min_length=1, max_length=20_000)


class Proof(Question):
    """Who signs in: a one-time code, or a key with the admin right."""

    code: str | None = None
    key: str | None = None
