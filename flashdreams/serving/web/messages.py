"""Parsing and validation of client messages."""

import math
from typing import Any

from pydantic import ValidationError

from flashdreams.serving.protocol import CLIENT_MESSAGE, SessionResume, SessionStart
from flashdreams.serving.web.accounts import Denied

MAX_DEPTH = 8
LARGEST = 2**53
"""Largest integer in values; JavaScript cannot represent all larger ones exactly."""
FORMATS = ["m4s", "jpeg"]
FIRST = (SessionStart, SessionResume)


def read_message(text: str) -> Any:
    """Parse a message of `flashdreams.serving.protocol`.

    Raises:
        Denied: it is invalid; names the wrong field.
    """
    try:
        message = CLIENT_MESSAGE.validate_json(text)
    except ValidationError as error:
        raise _explained(error) from None
    if hasattr(message, "values"):
        check_values(message.values)
    return message


def check_values(values: Any, depth: int = 0) -> None:
    """Refuse NaN, infinite or too large numbers and deeply nested values.

    Raises:
        Denied: describes what is wrong.
    """
    if isinstance(values, float) and not math.isfinite(values):
        raise Denied("A value is NaN or infinite.", "bad_message")
    if isinstance(values, int) and abs(values) > LARGEST:
        raise Denied(f"A whole number is larger than {LARGEST}.", "bad_message")
    if isinstance(values, dict | list):
        if depth >= MAX_DEPTH:
            raise Denied(f"Values are nested more than {MAX_DEPTH} deep.", "bad_message")
        for value in values.values() if isinstance(values, dict) else values:
            check_values(value, depth + 1)


def _explained(error: ValidationError) -> Denied:
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    shown = repr(first.get("input"))[:80]
    text = f"{place}: {first['msg']}; got {shown}" if place else first["msg"]
    if first["loc"][-1:] == ("format",):
        return Denied(text, "not_allowed", allowed={"format": FORMATS})
    return Denied(f"Unknown message. {text}", "bad_message")
