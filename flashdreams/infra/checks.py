"""What a rollout may be asked for, and in which order."""

import difflib
from collections.abc import Collection, Iterable


def check_order(call: str, index: int, next_index: int, pending: bool) -> None:
    """Refuse an AR step out of turn.

    Args:
        call: ``"generate"`` or ``"finalize"``.
        index: the AR step asked for.
        next_index: the AR step that the next ``generate`` makes.
        pending: whether the chunk before it is not finalized yet.

    Raises:
        ValueError: says what was expected and what was got.
    """
    if pending == (call == "generate"):
        first = (
            f"finalize(autoregressive_index={next_index - 1})"
            if pending
            else f"generate(autoregressive_index={next_index})"
        )
        raise ValueError(f"{call}(autoregressive_index={index}): expected {first} first.")
    expected = next_index - 1 if pending else next_index
    if index != expected:
        raise ValueError(
            f"{call}: expected autoregressive_index={expected}, got {index}. "
            "AR steps of a rollout come in order."
        )


def refuse_unknown(names: Iterable[str], known: Collection[str], method: str) -> None:
    """Refuse context that no component takes.

    Args:
        names: keywords that were given.
        known: keywords that some component declares.
        method: how the message calls what was called.

    Raises:
        TypeError: names the nearest and all that are known.
    """
    for name in names:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise TypeError(
            f"No component of {method} takes the context {name!r}.{hint} "
            f"Known: {', '.join(sorted(known))}."
        )
