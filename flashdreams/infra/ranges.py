"""Limits of the numbers in a config."""

from typing import Any

LARGEST_SIZE = 2**31 - 1
"""Largest count of anything: larger numbers are mistakes, and some tensors cannot hold them."""


def check_range(
    config: Any,
    *names: str,
    least: float = 1,
    most: float = LARGEST_SIZE,
    as_flags: bool = False,
) -> None:
    """Refuse out-of-range numbers of a config; call from ``__post_init__``.

    Args:
        config: whose fields are checked.
        names: the fields; None passes.
        least: the smallest number allowed.
        most: the largest; NaN is never allowed.
        as_flags: name the fields as command-line options in the message.

    Raises:
        ValueError: names the number and the allowed range.
    """
    for name in names:
        value = getattr(config, name)
        if value is None or least <= value <= most:
            continue
        allowed = f"at most {most}" if value > most else f"at least {least}"
        named = f"--{name.replace('_', '-')} {value}:" if as_flags else f"{name}={value}"
        raise ValueError(f"{named} must be {allowed}.")
