"""Limits of the numbers in a config."""

from typing import Any

LARGEST_SIZE = 2**31 - 1
"""Of anything that is counted: larger numbers are mistakes, and no tensor takes all of them."""


def check_range(
    config: Any,
    *names: str,
    least: float = 1,
    most: float = LARGEST_SIZE,
    as_flags: bool = False,
) -> None:
    """Refuse numbers that no config may hold; to be called from ``__post_init__``.

    Args:
        config: whose fields are looked at.
        names: the fields; one that is None is let pass.
        least: the smallest number allowed.
        most: the largest; NaN is never allowed.
        as_flags: the fields are options on the command line, so the message calls them that.

    Raises:
        ValueError: says which number it is and what is allowed.
    """
    for name in names:
        value = getattr(config, name)
        if value is None or least <= value <= most:
            continue
        allowed = f"at most {most}" if value > most else f"at least {least}"
        named = f"--{name.replace('_', '-')} {value}:" if as_flags else f"{name}={value}"
        raise ValueError(f"{named} must be {allowed}.")
