"""Scenes of the courtyard: ten categorical slots, their colours, and the text that names them.

A batch of scenes is an int64 tensor ``[B, NUM_SLOTS]``. Slot values run from 0 to
``NUM_OPTIONS - 1``; ``HIDDEN`` (= ``NUM_OPTIONS``) stands for "not told" in a prompt and cannot be
rendered.
"""

from __future__ import annotations

import difflib
import re

import torch
from torch import Tensor

from flashdreams.infra.config import quoted

SLOTS = (
    "north wall",
    "east wall",
    "south wall",
    "west wall",
    "northeast pillar",
    "southeast pillar",
    "southwest pillar",
    "northwest pillar",
    "floor",
    "sky",
)
"""What each of the slots describes, in order."""
COLOURS = ("red", "orange", "gold", "green", "teal", "blue", "purple", "white")
"""Options of the walls, pillars and the floor, in order."""
SKIES = ("noon", "dawn", "dusk", "night", "overcast", "desert", "aurora", "storm")
"""Options of the sky, in order."""

NUM_SLOTS = len(SLOTS)
NUM_OPTIONS = len(COLOURS)
HIDDEN = NUM_OPTIONS
"""Slot value of "unknown"; a prompt table therefore needs ``NUM_OPTIONS + 1`` rows per slot."""
FLOOR_SLOT = 8
SKY_SLOT = 9

DEFAULT_SCENE = (5, 4, 1, 7, 2, 0, 3, 6, 2, 1)
"""Slot values of everything a text does not mention."""

WALL_RGB = torch.tensor(
    [
        [0.78, 0.32, 0.28],
        [0.88, 0.54, 0.28],
        [0.90, 0.76, 0.42],
        [0.44, 0.64, 0.36],
        [0.27, 0.62, 0.62],
        [0.32, 0.46, 0.76],
        [0.56, 0.40, 0.70],
        [0.88, 0.86, 0.82],
    ],
    dtype=torch.float32,
    device="cpu",
)
"""``[NUM_OPTIONS, 3]`` colours of the walls in [0, 1]."""
PILLAR_RGB = torch.tensor(
    [
        [0.84, 0.20, 0.22],
        [0.94, 0.50, 0.16],
        [0.96, 0.78, 0.24],
        [0.28, 0.66, 0.32],
        [0.14, 0.64, 0.66],
        [0.20, 0.40, 0.84],
        [0.58, 0.30, 0.76],
        [0.94, 0.93, 0.90],
    ],
    dtype=torch.float32,
    device="cpu",
)
"""``[NUM_OPTIONS, 3]`` colours of the pillars in [0, 1]."""
FLOOR_RGB = torch.tensor(
    [
        [0.60, 0.33, 0.29],
        [0.70, 0.48, 0.32],
        [0.74, 0.64, 0.44],
        [0.42, 0.54, 0.34],
        [0.32, 0.52, 0.52],
        [0.36, 0.44, 0.60],
        [0.48, 0.40, 0.56],
        [0.72, 0.71, 0.69],
    ],
    dtype=torch.float32,
    device="cpu",
)
"""``[NUM_OPTIONS, 3]`` colours of the floor in [0, 1]."""
SKY_RGB = torch.tensor(
    [
        [[0.26, 0.52, 0.88], [0.74, 0.87, 0.96], [0.22, 0.16, 0.06], [1.00, 1.00, 0.98]],
        [[0.46, 0.56, 0.84], [0.98, 0.80, 0.70], [0.24, 0.14, 0.02], [1.00, 0.96, 0.92]],
        [[0.24, 0.22, 0.50], [0.94, 0.52, 0.40], [0.30, 0.20, 0.06], [0.96, 0.84, 0.82]],
        [[0.04, 0.06, 0.18], [0.16, 0.22, 0.42], [0.12, 0.14, 0.18], [0.58, 0.64, 0.84]],
        [[0.58, 0.62, 0.66], [0.80, 0.82, 0.83], [0.08, 0.08, 0.07], [0.90, 0.92, 0.94]],
        [[0.42, 0.66, 0.78], [0.96, 0.88, 0.66], [0.22, 0.14, 0.02], [1.02, 0.97, 0.86]],
        [[0.06, 0.16, 0.30], [0.22, 0.60, 0.54], [0.10, 0.22, 0.14], [0.68, 0.84, 0.82]],
        [[0.22, 0.26, 0.32], [0.48, 0.54, 0.58], [0.14, 0.13, 0.10], [0.76, 0.80, 0.84]],
    ],
    dtype=torch.float32,
    device="cpu",
)
"""``[NUM_OPTIONS, 4, 3]``: zenith, horizon (also the fog), glow near the sun, tint of the light."""

_ALIASES = {
    "golden": "gold",
    "yellow": "gold",
    "violet": "purple",
    "turquoise": "teal",
    "cyan": "teal",
    "day": "noon",
    "midday": "noon",
    "sunrise": "dawn",
    "sunset": "dusk",
    "cloudy": "overcast",
    "stormy": "storm",
    "walls": "wall",
    "pillars": "pillar",
    "column": "pillar",
    "columns": "pillar",
    "ground": "floor",
}
_FILLERS = frozenset({"a", "an", "the", "with", "of", "at", "in", "on"})
_PLACES = ("wall", "pillar", "floor", "sky")
_SIDES = ("north", "east", "south", "west")
_UNKNOWN = "unknown"


def random_scene(batch: int, generator: torch.Generator) -> Tensor:
    """Draw scenes uniformly.

    Args:
        batch: number of scenes B.
        generator: source of randomness; its device is the device of the result.

    Returns:
        ``[B, NUM_SLOTS]`` int64 in [0, NUM_OPTIONS).
    """
    shape = (batch, NUM_SLOTS)
    return torch.randint(
        NUM_OPTIONS, shape, generator=generator, device=generator.device, dtype=torch.int64
    )


def scene_from_text(text: str) -> Tensor:
    """Read a scene from words such as ``"red floor, blue north wall, golden pillars, dusk sky"``.

    Phrases are separated by commas, semicolons, full stops or "and". Each names one place (wall,
    pillar, floor, sky), for walls and pillars optionally a side, and one colour, or "unknown" to
    hide the slot. Without a side all walls or all pillars are meant; of two phrases about one slot
    the later one counts; what is not mentioned takes its value from ``DEFAULT_SCENE``.

    Args:
        text: the description; an empty one gives the default scene.

    Returns:
        ``[NUM_SLOTS]`` int64 in [0, HIDDEN].

    Raises:
        ValueError: an unknown word, or a phrase without exactly one place and one colour.
    """
    scene = torch.tensor(DEFAULT_SCENE, dtype=torch.int64, device="cpu")
    for phrase in re.split(r"[,;.\n]|\band\b", text.lower()):
        if phrase.strip():
            slots, value = _parse_phrase(phrase.strip())
            scene[slots] = value
    return scene


def scene_to_text(scene: Tensor) -> str:
    """Describe a scene in words that ``scene_from_text`` reads back exactly.

    Args:
        scene: ``[NUM_SLOTS]`` int64 in [0, HIDDEN].

    Returns:
        One phrase per slot; walls of one colour, and pillars of one colour, share a phrase.

    Raises:
        ValueError: wrong shape, or a value outside [0, HIDDEN].
    """
    if scene.shape != (NUM_SLOTS,):
        raise ValueError(f"scene has shape {tuple(scene.shape)}, expected ({NUM_SLOTS},)")
    check_scene(scene[None], HIDDEN)
    words = [
        _UNKNOWN if value == HIDDEN else (SKIES if slot == SKY_SLOT else COLOURS)[value]
        for slot, value in enumerate(scene.tolist())
    ]
    phrases = []
    for first, last, name in ((0, 4, "walls"), (4, 8, "pillars")):
        if len(set(words[first:last])) == 1:
            phrases.append(f"{words[first]} {name}")
        else:
            phrases += [f"{words[slot]} {SLOTS[slot]}" for slot in range(first, last)]
    phrases += [f"{words[slot]} {SLOTS[slot]}" for slot in (FLOOR_SLOT, SKY_SLOT)]
    return ", ".join(phrases)


def check_scene(scene: Tensor, highest: int = NUM_OPTIONS - 1) -> None:
    """Refuse scenes of the wrong shape or with values out of range.

    Args:
        scene: expected ``[B, NUM_SLOTS]`` int64.
        highest: largest allowed slot value; ``HIDDEN`` admits hidden slots.

    Raises:
        ValueError: wrong shape, or a value outside [0, highest].
    """
    if scene.ndim != 2 or scene.shape[1] != NUM_SLOTS:
        raise ValueError(f"scene has shape {tuple(scene.shape)}, expected [B, {NUM_SLOTS}]")
    if scene.numel() and (int(scene.min()) < 0 or int(scene.max()) > highest):
        raise ValueError(
            f"scene values span [{int(scene.min())}, {int(scene.max())}], allowed [0, {highest}]; "
            f"{HIDDEN} hides a slot in a prompt and cannot be drawn"
        )


def _parse_phrase(phrase: str) -> tuple[list[int], int]:
    """Slots that a phrase names, and the value it gives them."""
    words = [_ALIASES.get(word, word) for word in re.findall(r"[a-z]+", phrase)]
    words = [word for word in words if word not in _FILLERS]
    for word in words:
        _check_word(word, phrase)
    places = [word for word in words if word in _PLACES]
    if len(places) != 1:
        raise ValueError(
            f"{quoted(phrase)} names {len(places)} places, expected one of {', '.join(_PLACES)}; "
            "put a comma between phrases, as in 'red floor, dusk sky'"
        )
    place = places[0]
    options = SKIES if place == "sky" else COLOURS
    values = [word for word in words if word in options or word == _UNKNOWN]
    sides = [word for word in words if _sides_in(word)]
    left_over = [word for word in words if word not in (place, *values, *sides)]
    if len(values) != 1 or left_over:
        raise ValueError(
            f"{quoted(phrase)} does not give the {place} one value; allowed: "
            f"{', '.join((*options, _UNKNOWN))}"
        )
    value = HIDDEN if values[0] == _UNKNOWN else options.index(values[0])
    return _slots_at(place, sides, phrase), value


def _slots_at(place: str, sides: list[str], phrase: str) -> list[int]:
    """Slots of one place, narrowed to the sides named."""
    wanted = {side for word in sides for side in _sides_in(word)}
    slots = [
        slot
        for slot, name in enumerate(SLOTS)
        if name.split()[-1] == place and wanted <= set(_sides_in(name.split()[0]))
    ]
    if not slots or (wanted and place in ("floor", "sky")):
        allowed = ", ".join(name for name in SLOTS if name.endswith(place))
        raise ValueError(f"{quoted(phrase)} names no {place} of the courtyard; allowed: {allowed}")
    return slots


def _sides_in(word: str) -> tuple[str, ...]:
    """Sides of the compass in a word: "northeast" -> ("north", "east"); () for any other word."""
    found = tuple(side for side in _SIDES if side in word)
    return found if "".join(found) == word or "".join(reversed(found)) == word else ()


def _check_word(word: str, phrase: str) -> None:
    """Refuse a word outside the vocabulary, naming the nearest."""
    corners = tuple(name.split()[0] for name in SLOTS[4:8])
    vocabulary = (*COLOURS, *SKIES, _UNKNOWN, *_SIDES, *corners, *_PLACES)
    if word in vocabulary:
        return
    near = difflib.get_close_matches(word, (*vocabulary, *_ALIASES), n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise ValueError(
        f"unknown word {quoted(word)} in {quoted(phrase)}{hint} Colours: {', '.join(COLOURS)}. "
        f"Skies: {', '.join(SKIES)}. Places: {', '.join(SLOTS)}. Or "
        f"'{_UNKNOWN}', to leave a place to the model."
    )
