"""Keys and mouse of the Matrix-Game variants: live, as text, or from a file."""

import zipfile
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flashdreams.infra.camera_events import LOOK_SCHEMA, bounded, check_look
from flashdreams.infra.controller import (
    Controller,
    Event,
    KeyState,
    event_schema,
    keys_schema,
)
from flashdreams.runtime.actions import check_keys

from .encoder import Actions, check_columns

Variant = Literal["universal", "gta_drive", "temple_run"]
TURN = 0.1
"""Turn per pixel frame of a camera key, as in the official demo."""
TURN_DEGREES = 1.5
"""Degrees of pointer motion per pixel frame equal to a camera key; chosen by feel."""
MAX_POINTER_TURN = 3 * TURN
"""Largest turn per pixel frame from pointer motion."""
MAX_FILE_BYTES = 16 * 2**20
"""Most bytes that an action file may unpack to: more than a day of play."""


@dataclass(frozen=True, kw_only=True)
class ActionKeys:
    """The keys of a variant and their encoding for the model."""

    names: Mapping[str, str]
    """Key -> what it does."""
    columns: Mapping[str, int]
    """Key -> keyboard column that is 1 while it is held."""
    turns: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Key -> pitch and yaw per pixel frame while it is held."""
    keyboard_dim: int
    has_mouse: bool = True
    idle_column: int | None = None
    """Column that is 1 while no key is held; such a variant accepts one key at a time."""

    def check(self, keys: Set[str]) -> None:
        """Refuse held keys.

        Raises:
            ValueError: a key that the variant does not have, or several where it takes one.
        """
        check_keys(keys, self.names)
        if self.idle_column is not None and len(keys) > 1:
            raise ValueError(
                f"the keys {', '.join(sorted(keys))} are held together; this variant takes one key "
                "at a time."
            )

    def row(self, keys: Set[str]) -> list[float]:
        """The keyboard columns of one pixel frame."""
        row = [0.0] * self.keyboard_dim
        for key in keys & self.columns.keys():
            row[self.columns[key]] = 1.0
        if self.idle_column is not None and not keys:
            row[self.idle_column] = 1.0
        return row

    def turn(self, keys: Set[str]) -> tuple[float, float]:
        """Pitch and yaw of one pixel frame; opposite keys cancel."""
        turns = [self.turns[key] for key in keys & self.turns.keys()]
        return sum(t[0] for t in turns), sum(t[1] for t in turns)


# Source: SkyworkAI/Matrix-Game, Matrix-Game-2/inference_streaming.py and utils/conditions.py.
KEYS: dict[Variant, ActionKeys] = {
    "universal": ActionKeys(
        names={
            **{"w": "forward", "s": "back", "a": "left", "d": "right"},
            **{"i": "look up", "k": "look down", "j": "look left", "l": "look right"},
        },
        columns={"w": 0, "s": 1, "a": 2, "d": 3},
        turns={"i": (TURN, 0.0), "k": (-TURN, 0.0), "j": (0.0, -TURN), "l": (0.0, TURN)},
        keyboard_dim=4,
    ),
    "gta_drive": ActionKeys(
        names={"w": "forward", "s": "back", "a": "steer left", "d": "steer right"},
        columns={"w": 0, "s": 1},
        turns={"a": (0.0, -TURN), "d": (0.0, TURN)},
        keyboard_dim=2,
    ),
    "temple_run": ActionKeys(
        names={
            **{"w": "jump", "s": "slide", "z": "turn left", "c": "turn right"},
            **{"a": "side left", "d": "side right"},
        },
        columns={"w": 1, "s": 2, "z": 3, "c": 4, "a": 5, "d": 6},
        keyboard_dim=7,
        has_mouse=False,
        idle_column=0,
    ),
}
"""Keys of each variant."""


class ActionController(Controller):
    """Held keys and pointer motion, one pixel frame at a time.

    An event ``{"keys": "wl"}`` sets the keys that are held from its frame on. ``{"mouse": [pitch,
    yaw]}`` turns the view by so much in every frame from its own to the end of the chunk: a pointer
    at rest sends nothing. ``{"look": [yaw, pitch]}`` is the same in degrees since the last
    event, spread over the rest of the chunk. An event may have several of these.
    """

    def __init__(self, keys: ActionKeys) -> None:
        self.keys = keys

    def accepts(self) -> dict[str, Any]:
        """See the contract."""
        properties = {"keys": keys_schema(self.keys.names)}
        if self.keys.has_mouse:
            properties["look"] = LOOK_SCHEMA
            properties["mouse"] = {
                "title": "Mouse",
                "type": "array",
                "items": {"type": "number", "minimum": -1, "maximum": 1},
                "minItems": 2,
                "maxItems": 2,
                "description": "pitch and yaw per pixel frame, up and right positive",
            }
        return event_schema(properties)

    def check(self, values: Mapping[str, Any]) -> None:
        """See the contract."""
        known = {"keys", "mouse", "look"} if self.keys.has_mouse else {"keys"}
        keys, mouse = values.get("keys", ""), values.get("mouse", [0, 0])
        if not values or not known.issuperset(values) or not isinstance(keys, str):
            example = ', {"mouse": [0, 0.1]}' if self.keys.has_mouse else " (there is no mouse)"
            raise ValueError(f'This world takes {{"keys": "w"}}{example}; got {dict(values)!r}.')
        self.keys.check(set(keys))
        numbers = isinstance(mouse, list | tuple) and len(mouse) == 2
        if not numbers or not all(_is_turn(x) for x in mouse):
            raise ValueError(f"mouse: must be [pitch, yaw], both from -1 to 1; got {mouse!r}.")
        if "look" in values:
            check_look(values["look"])

    def new_state(self) -> KeyState:
        """No key is held."""
        return KeyState()

    def advance(self, state: KeyState, events: Sequence[Event], frames: range) -> Actions:
        """The actions of a chunk; see the contract."""
        pitch, yaw = 0.0, 0.0
        look = (0.0, 0.0)
        keyboard, mouse, waiting = [], [], list(events)
        for offset in range(len(frames)):
            while waiting and waiting[0].frame <= offset:
                values = waiting.pop(0).values
                state.keys = values.get("keys", state.keys)
                pitch, yaw = values.get("mouse", (pitch, yaw))
                if "look" in values:
                    more = pointer_turn(values["look"], len(frames) - offset)
                    look = (look[0] + more[0], look[1] + more[1])
            held = set(state.keys)
            keyboard.append(self.keys.row(held))
            turn = self.keys.turn(held)
            pointer = [bounded(part, MAX_POINTER_TURN) for part in look]
            mouse.append([turn[0] + pitch + pointer[0], turn[1] + yaw + pointer[1]])
        keys = torch.tensor(keyboard, dtype=torch.float32, device="cpu")
        turns = torch.tensor(mouse, dtype=torch.float32, device="cpu")
        return Actions(keys, turns if self.keys.has_mouse else None)


def pointer_turn(look: Sequence[float], frames: int) -> tuple[float, float]:
    """Pitch and yaw per pixel frame of pointer motion.

    Args:
        look: degrees to the right and up.
        frames: over which they are spread.
    """
    yaw, pitch = (TURN * degrees / TURN_DEGREES / frames for degrees in look)
    return pitch, yaw


class RecordedActions(Controller):
    """Returns actions that are known in advance; takes no events."""

    def __init__(self, actions: Actions) -> None:
        """Take ``[F, columns]``."""
        self.actions = actions

    def accepts(self) -> dict[str, Any]:
        """See the contract: nothing."""
        return {"type": "object", "maxProperties": 0}

    def check(self, values: Mapping[str, Any]) -> None:
        """See the contract."""
        raise ValueError("This world follows the actions of a file and takes no control.")

    def new_state(self) -> None:
        """See the contract: the position follows from the frames."""
        return None

    def advance(self, state: None, events: Sequence[Event], frames: range) -> Actions:
        """The actions over the frames; see the contract.

        Raises:
            ValueError: the file is too short.
        """
        if frames.stop > self.actions.keyboard.shape[-2]:
            raise ValueError(
                f"The action file ends at frame {self.actions.keyboard.shape[-2]}; this AR step "
                f"needs frames to {frames.stop}."
            )
        return self.actions.part(slice(frames.start, frames.stop))


def read_actions(path: Path, keys: ActionKeys) -> Actions:
    """The actions of an ``.npz`` file with ``keyboard`` and, where there is a mouse, ``mouse``.

    Args:
        path: the file; arrays are ``[frames, columns]``.
        keys: of the variant.

    Raises:
        ValueError: no such file, other arrays, or arrays of another width, length or type, with
            values that are not finite or out of range.
    """
    flag = f"--action-path {path}"
    arrays = _read_arrays(path, flag)
    wanted = {"keyboard": keys.keyboard_dim} | ({"mouse": 2} if keys.has_mouse else {})
    if arrays.keys() != wanted.keys():
        raise ValueError(
            f"{flag}: holds {', '.join(sorted(arrays)) or 'nothing'}; this variant needs "
            f"{' and '.join(f'{name} [frames, {n}]' for name, n in wanted.items())}."
        )
    found = {}
    for name, columns in wanted.items():
        array = arrays[name]
        if array.ndim != 2:
            raise ValueError(
                f"{flag}: {name} must be [frames, {columns}]; got {list(array.shape)}."
            )
        found[name] = check_columns(f"{flag}: {name}", _to_tensor(array), columns, None)[0]
        least = 0 if name == "keyboard" else -1
        if found[name].amin() < least or found[name].amax() > 1:
            raise ValueError(f"{flag}: {name} must be from {least} to 1 throughout.")
    counts = {name: len(x) for name, x in found.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"{flag}: keyboard has {counts['keyboard']} frames and mouse {counts['mouse']}; both "
            "need one row per pixel frame."
        )
    return Actions(found["keyboard"], found.get("mouse"))


def _read_arrays(path: Path, flag: str) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as packed:
            if sum(info.file_size for info in packed.infolist()) > MAX_FILE_BYTES:
                raise ValueError(f"it unpacks to more than {MAX_FILE_BYTES} bytes")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # damaged archives raise all kinds of errors
        reason = getattr(error, "strerror", None) or "it is not an .npz file of numbers"
        raise ValueError(f"{flag}: cannot be read: {reason}.") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
            raise ValueError(f"{flag}: {name} does not hold numbers.")
    return arrays


def _to_tensor(array: np.ndarray) -> Tensor:
    with np.errstate(over="ignore"):  # becomes infinite, which is refused
        return torch.from_numpy(array.astype(np.float32))


def _is_turn(x: Any) -> bool:
    number = isinstance(x, int | float) and not isinstance(x, bool)
    return number and abs(x) <= 1
