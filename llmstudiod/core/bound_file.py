"""Which files may be bound into a model's unit, judged by their status and first bytes."""

import stat

from llmstudiod.core.errors import LoadFailedError

MAX_TEXT_BYTES = 1 << 20


def refuse_file(path: str, *, mode: int, start: bytes, is_text: bool) -> None:
    """Refuse what is neither a GGUF nor a text, or what the unit's own user could not read.

    ``mode`` is st_mode, ``start`` the first `MAX_TEXT_BYTES` + 1 bytes of a text, or 4 bytes of another file.

    Raises:
        LoadFailedError: What was found, and what was expected.
    """
    if not stat.S_ISREG(mode):
        raise LoadFailedError(f"'{path}': expected a regular file, found something else")
    if is_text and (b"\0" in start or len(start) > MAX_TEXT_BYTES):
        raise LoadFailedError(f"'{path}': expected a text of at most 1 MiB, found something else")
    if not is_text and start != b"GGUF":
        message = f"'{path}': expected a GGUF file, found another"
        raise LoadFailedError(
            message, hint="only GGUF files are given to a model", details={"failure": "bad_model_file"}
        )
    if not mode & stat.S_IROTH:  # told last: nobody is advised to open a file that is no model
        found = f"'{path}' has mode {stat.S_IMODE(mode):04o}: the model's own user may not read it"
        raise LoadFailedError(found, hint=f"chmod o+r '{path}'", details={"failure": "permission"})
