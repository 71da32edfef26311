"""Parsing and validation of client messages."""

import math
from typing import Any

from pydantic import ValidationError

from flashdreams.serving.protocol import CLIENT_MESSAGE, Error, SessionResume, SessionStart
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
        if hasattr(message, "values"):
            check_values(message.values)
        return message
    except ValidationError as error:
        raise Denied(_explained(error)) from None


def check_values(values: Any, depth: int = 0) -> None:
    """Refuse NaN, infinite or too large numbers and deeply nested values.

    Raises:
        Denied: describes what is wrong.
    """
    if isinstance(values, float) and not math.isfinite(values):
        raise Denied(Error(message="A value is NaN or infinite.", code="bad_message"))
    if isinstance(values, int) and abs(values) > LARGEST:
        text = f"A whole number is larger than {LARGEST}."
        raise Denied(Error(message=text, code="bad_message"))
    if isinstance(values, dict | list):
        if depth >= MAX_DEPTH:
            text = f"Values are nested more than {MAX_DEPTH} deep."
            raise Denied(Error(message=text, code="bad_message"))
        for value in values.values() if isinstance(values, dict) else values:
            check_values(value, depth + 1)


def _explained(error: ValidationError) -> Error:
    details = error.errors(include_url=False, include_context=False)
    first = details[0]
    place = ".".join(str(part) for part in first["loc"])
    shown = repr(first.get("input"))[:80]
    text = f"{place}: {first['msg']}; got {shown}" if place else first["msg"]
    if first["loc"][-1:] == ("format",):
        return Error(message=text, code="not_allowed", allowed={"format": FORMATS})
    return Error(message=f"Unknown message. {text}", code="bad_message")
