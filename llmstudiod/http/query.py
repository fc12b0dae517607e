"""Reads the parameters of a query."""

from aiohttp import web

from llmstudiod.core.errors import BadRequestError

_YES, _NO = frozenset({"true", "1", "yes", "on"}), frozenset({"false", "0", "no", "off", ""})


def whole_number(request: web.Request, name: str, *, default: int, least: int, most: int) -> int:
    """Return a whole number.

    Raises:
        BadRequestError: It is none, or out of bounds.
    """
    text = request.query.get(name)
    if text is None:
        return default
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise BadRequestError(f"{name}: expected a number from {least} to {most}, found '{text[:40]}'")
    return value


def truth(request: web.Request, name: str, *, default: bool = False) -> bool:
    """Return yes or no.

    Raises:
        BadRequestError: It is neither.
    """
    text = request.query.get(name)
    if text is None:
        return default
    word = text.lower()
    if word not in _YES | _NO:
        raise BadRequestError(f"{name}: expected true or false, found '{text[:40]}'")
    return word in _YES
