"""A loop of turns without a model: pictures that move, made at a stated speed."""

import math
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from flashdreams.serving.interface import (
    Chunk,
    Figures,
    Full,
    Host,
    Listener,
    Offer,
    Opening,
    Refused,
)

CONTROLS = {
    "type": "object",
    "properties": {
        "keys": {"type": "string", "x-keys": {"w": "forward", "s": "back"}},
        "look": {"type": "array", "items": {"type": "number"}},
        "camera": {"type": "object"},
    },
}


def offer(**changed: Any) -> Offer:
    """What the fake serves; small and fast unless it is changed."""
    values: dict[str, Any] = {
        **{"model": "fake", "width": 64, "height": 48, "fps": 50.0, "seed": 7, "prompt": "a cave"},
        **{"num_inference_steps": 4, "guidance_scale": None, "controls": CONTROLS},
        **{"prompts_change": True, "takes_image": True, "chunk_frames": 4},
        "commands": ("save", "fork", "rewind", "reset"),
    }
    return Offer(**(values | changed))


@dataclass
class _Session:
    opening: Opening
    listener: Listener | None
    told: list[tuple[Any, ...]] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    frame: int = 0
    index: int = 0
    epoch: int = 0
    paused: bool = False
    ended: bool = False
    begun: bool = False


class FakeHost(Host):
    """Makes chunks in a thread of its own, as the contract says: no earlier than needed."""

    def __init__(
        self,
        places: int = 2,
        queue: int = 1,
        step_s: float = 0.01,
        noise: bool = False,
        **changed: Any,
    ):
        """``noise`` makes pictures that no encoder makes small."""
        self.offer = offer(**changed)
        self.places, self.queue, self.step_s = places, queue, step_s
        self.noise = noise
        self.sessions: dict[str, _Session] = {}
        self.openings: list[Opening] = []
        self.calls: list[tuple[Any, ...]] = []
        self.chunks = 0
        self.fail: str | None = None
        self._changed = threading.Condition(threading.RLock())
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(10)

    def open(self, opening: Opening, listener: Listener) -> str:
        with self._changed:
            alive = [s for s in self.sessions.values() if not s.ended]
            if len(alive) >= self.places + self.queue:
                raise Full(f"All {self.places} places and {self.queue} places to wait are taken.")
            if opening.prompt == "refuse":
                raise Refused("This prompt is refused; see /srv/models/secret.txt.")
            if opening.prompt == "crash":
                raise RuntimeError("/srv/models/secret.txt is broken")
            id = secrets.token_urlsafe(16)
            self.sessions[id] = _Session(opening, listener)
            self.openings.append(opening)
            self.calls.append(("open", opening.prompt, opening.seed))
            self._changed.notify_all()
            return id

    def attach(self, session: str, listener: Listener, from_frame: int = 0) -> int:
        with self._changed:
            found = self._find(session)
            found.listener, found.paused = listener, False
            self.calls.append(("attach",))
            listener.on_state("running")
            self._changed.notify_all()
            return found.frame

    def detach(self, session: str) -> None:
        with self._changed:
            self.calls.append(("detach",))
            found = self.sessions[session]
            found.paused = True
            if found.listener is not None:
                found.listener.on_state("paused")

    def control(self, session: str, values: Mapping[str, Any], event_id: str | None) -> None:
        unknown = set(values) - set(CONTROLS["properties"])  # type: ignore[call-overload]
        if unknown:
            raise Refused(f"Unknown controls {sorted(unknown)}; allowed: keys, look, camera.")
        self._tell(session, ("control", dict(values), event_id))

    def prompt(self, session: str, text: str, event_id: str | None) -> None:
        if text == "refuse":
            raise Refused("This prompt is refused.")
        self._tell(session, ("prompt", text, event_id))

    def command(
        self, session: str, kind: str, event_id: str | None, values: Mapping[str, Any]
    ) -> None:
        if kind == "rewind" and values["name"] not in self._find(session).saved:
            raise Refused(f"Nothing was kept as {values['name']!r}.")
        self._tell(session, (kind, dict(values), event_id))

    def pause(self, session: str, paused: bool) -> None:
        with self._changed:
            self.calls.append(("pause", paused))
            self._find(session).paused = paused
            self._changed.notify_all()

    def close(self, session: str) -> None:
        with self._changed:
            self.calls.append(("close",))
            found = self.sessions.get(session)
            if found is not None and not found.ended:
                self._end(found, None, True)

    def saved(self, session: str) -> list[str]:
        found = self.sessions.get(session)
        return [] if found is None or found.ended else list(found.saved)

    def figures(self, session: str | None = None) -> Figures:
        if session is not None:
            self._find(session)
        alive = [s for s in self.sessions.values() if not s.ended]
        return Figures(
            state="running",
            frames_per_second=self.offer.fps,
            chunk_ms={"network": 1e3 * self.step_s},
            sessions=min(len(alive), self.places),
            places=self.places,
            queued=max(0, len(alive) - self.places),
            device_bytes=None,
            host_bytes=2**20,
        )

    def drain(self) -> None:
        self.stop()

    def _find(self, session: str) -> _Session:
        found = self.sessions.get(session)
        if found is None or found.ended:
            raise Refused("There is no such session.")
        return found

    def _tell(self, session: str, what: tuple[Any, ...]) -> None:
        with self._changed:
            self.calls.append(what[:2])
            self._find(session).told.append(what)
            self._changed.notify_all()

    def _end(self, session: _Session, error: str | None, stopped: bool) -> None:
        session.ended = True
        if session.listener is not None:
            session.listener.on_end(error, stopped)
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._stopped:
                    return
                alive = [s for s in self.sessions.values() if not s.ended]
                for place, session in enumerate(alive):
                    assert session.listener is not None
                    if place >= self.places:
                        session.listener.on_state("waiting", place - self.places + 1)
                    elif not session.begun:
                        session.begun = True
                        session.listener.on_state("running")
                due = [
                    (s.listener.unshown_seconds(), i)
                    for i, s in enumerate(alive[: self.places])
                    if not s.paused and s.listener is not None
                ]
                due = [(left, i) for left, i in due if left <= self.step_s + 0.01]
                if not due:
                    self._changed.wait(0.002)
                    continue
                session = alive[min(due)[1]]
                told, session.told = session.told, []
            time.sleep(self.step_s)
            with self._changed:
                if not session.ended:
                    self._step(session, told)

    def _step(self, session: _Session, told: list[tuple[Any, ...]]) -> None:
        listener = session.listener
        assert listener is not None
        if self.fail is not None:
            self._end(session, self.fail, False)
            return
        applied = []
        for kind, values, event_id in told:
            if kind in ("control", "prompt"):
                applied.append(event_id)
                continue
            if kind in ("save", "fork"):
                session.saved.append(values["name"])
            else:
                session.epoch, session.index = session.epoch + 1, 0
            listener.on_kept(kind, values.get("name"), event_id)
        count = self.offer.chunk_frames
        first, session.frame = session.frame, session.frame + count
        wanted = session.opening.num_frames
        count = count if wanted is None else min(count, wanted - first)
        frames = picture(range(first, first + count), self.offer.height, self.offer.width)
        if self.noise:
            frames = torch.randint_like(frames, 256)
        self.chunks += 1
        listener.on_chunk(
            Chunk(
                session="fake",
                index=session.index,
                epoch=session.epoch,
                first_frame=first,
                frames=frames,
                applied=tuple(applied),
                stage_ms={"network": 1e3 * self.step_s},
                finished_at=time.monotonic(),
            )
        )
        session.index += 1
        if wanted is not None and session.frame >= wanted:
            self._end(session, None, False)


def picture(frames: range, height: int, width: int) -> torch.Tensor:
    """``[F, height, width, 3]`` uint8: each frame is one grey that tells its number modulo 32."""
    greys = [16 + 7 * (frame % 32) for frame in frames]
    values = torch.tensor(greys, dtype=torch.uint8, device="cpu")
    return values[:, None, None, None].expand(len(greys), height, width, 3).contiguous()


def frame_of(grey: float) -> int:
    """The number modulo 32 of a picture of this grey."""
    return round((grey - 16) / 7)


assert math.isclose(frame_of(16 + 7 * 31), 31)
