"""The shapes of the admin interface's requests: what they are checked by. The answers' are in `schema`.

Imported when the first such request comes: pydantic is slow to import.
"""

import json
from typing import Literal, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmstudiod.core.errors import BadRequestError
from llmstudiod.core.recipe import CacheType

M = TypeVar("M", bound=BaseModel)


async def parsed(kind: type[M], request: web.Request) -> M:
    """Return a request's JSON body as a ``kind``.

    Raises:
        BadRequestError: It is none; the message names each field, what was found and what was expected.
    """
    try:
        values = json.loads(await request.read() or b"{}")
    except ValueError as error:
        raise BadRequestError(f"not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise BadRequestError(f"expected a JSON object, found {type(values).__name__}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        told = [
            f"{'.'.join(map(str, item['loc'])) or 'body'}: {item['msg']}, found {json.dumps(item['input'])[:60]}"
            for item in error.errors(include_url=False, include_context=False)[:5]
        ]
        raise BadRequestError("; ".join(told)) from None


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

    name: str
    admin: bool = False
    metrics: bool = False
    models: list[str] | None = None
    expires: str | None = None


class CommandLine(Question):
    """A llama-server command that somebody has already."""

    command: str = Field(min_length=1, max_length=20_000)


class Proof(Question):
    """Who signs in: a one-time code, or a key with the admin right."""

    code: str | None = None
    key: str | None = None
