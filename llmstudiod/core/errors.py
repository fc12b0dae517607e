"""The error tree: one class for each kind, which fixes its HTTP status and exit code.

A message is one sentence ("cannot load 'qwen3': ..."); the hint is what to do next.
Kinds are a closed, documented set: clients branch on ``kind``, people read ``message`` and ``hint``.
"""

from collections.abc import Mapping
from typing import Any, ClassVar


class LlmstudioError(Exception):
    """Anything that a user is told; bugs raise other exceptions and give tracebacks."""

    kind: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1
    openai_type: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, hint: str | None = None, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details: dict[str, Any] = dict(details or {})

    def as_dict(self) -> dict[str, Any]:
        """Return what it says as JSON holds it."""
        return {"kind": self.kind, "message": self.message, "hint": self.hint, "details": self.details}

    @property
    def retry_after_s(self) -> int | None:
        """Seconds after which the same request may succeed, or None when waiting does not help."""
        value = self.details.get("retry_after_s")
        return None if value is None else max(1, int(value))


class BadRequestError(LlmstudioError):
    """The request itself is malformed."""

    kind, status, exit_code, openai_type = "bad_request", 400, 2, "invalid_request_error"


class AuthenticationError(LlmstudioError):
    """The request shows no key, or one that is not accepted."""

    kind, status, exit_code, openai_type = "authentication", 401, 5, "authentication_error"


class AccessDeniedError(LlmstudioError):
    """The caller may not do this here."""

    kind, status, exit_code, openai_type = "access_denied", 403, 5, "permission_error"


class NotFoundError(LlmstudioError):
    """There is no such route or resource."""

    kind, status, exit_code, openai_type = "not_found", 404, 4, "invalid_request_error"


class ModelNotFoundError(NotFoundError):
    """No recipe has this id, served name or alias."""

    kind = "model_not_found"


class MethodNotAllowedError(LlmstudioError):
    """The route takes another method; ``details['allow']`` says which."""

    kind, status, openai_type = "method_not_allowed", 405, "invalid_request_error"


class ConflictError(LlmstudioError):
    """What is asked for does not go with the state in which the model is."""

    kind, status, exit_code, openai_type = "conflict", 409, 2, "invalid_request_error"


class StaleError(LlmstudioError):
    """What was to be changed is not any more what the client has read."""

    kind, status, exit_code, openai_type = "stale", 412, 2, "invalid_request_error"


class BodyTooLargeError(LlmstudioError):
    """The request's body is over ``max_body``."""

    kind, status, exit_code, openai_type = "body_too_large", 413, 2, "invalid_request_error"


class QueueFullError(LlmstudioError):
    """More requests wait for this model than ``max_queue`` allows."""

    kind, status, exit_code, openai_type = "queue_full", 429, 6, "rate_limit_error"


class UpstreamCrashedError(LlmstudioError):
    """The model's server ended before it had answered."""

    kind, status, exit_code = "upstream_crashed", 502, 7


class UnavailableError(LlmstudioError):
    """The model cannot be started now."""

    kind, status, exit_code = "unavailable", 503, 7


class LoadFailedError(UnavailableError):
    """The model's server ended, or could not be started, while it was loading."""

    kind = "load_failed"


class DoesNotFitError(UnavailableError):
    """The model needs more memory than there is, whoever goes for it."""

    kind, exit_code = "does_not_fit", 7


class BackingOffError(UnavailableError):
    """The last start failed and the next attempt is not due yet."""

    kind = "backing_off"


class ShuttingDownError(UnavailableError):
    """The daemon, or this model, is being stopped on request."""

    kind = "shutting_down"


class LoadStalledError(LlmstudioError):
    """The load showed no progress for ``load_stall_timeout``."""

    kind, status, exit_code = "load_stalled", 504, 7


class ConfigError(LlmstudioError):
    """A settings file or recipe is faulty; ``details['faults']`` says where."""

    kind, status, exit_code, openai_type = "config", 400, 3, "invalid_request_error"


class BinaryError(LlmstudioError):
    """llama-server is not there, does not run, or refuses a command line."""

    kind, status, exit_code = "binary", 503, 3


class LauncherError(LlmstudioError):
    """The launcher could not start or stop a unit or process."""

    kind, status, exit_code = "launcher", 503, 7


class DaemonUnreachableError(LlmstudioError):
    """llmstudioctl found nobody at the admin socket."""

    kind, status, exit_code = "daemon_unreachable", 503, 8
