"""The host of live sessions: calls of the web server, from any thread."""

import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import torch
from torch import Tensor

from flashdreams.infra.controller import Controller
from flashdreams.infra.session import REMEMBERED_IDS, Command
from flashdreams.runtime.stats import is_shortage
from flashdreams.serving.delivery import Delivery
from flashdreams.serving.engine import OrderError, SessionEngine
from flashdreams.serving.interface import (
    Figures,
    Full,
    Host,
    Listener,
    Offer,
    Opening,
    Refused,
)
from flashdreams.serving.limits import ServingLimits
from flashdreams.serving.live import LiveSession
from flashdreams.serving.prompts import Prompts

MAX_EVENTS = 256
"""Maximum number of a session's events that wait for its next chunk."""
MAX_PROMPTS = 8
"""Maximum number of prompts among these, because each one is work for the device."""
MAX_KEEPINGS = 16
"""Maximum number of a session's saves, forks, rewinds and resets that wait."""
_NAME = re.compile(r"[\w-]{1,64}")


class LiveHost(Host):
    """Accepts requests of clients and queues them for the `TurnLoop`; on rank zero.

    The lock guards all sessions. Listeners are never called while holding it.
    """

    def __init__(
        self,
        offer: Offer,
        limits: ServingLimits,
        places: int,
        prompts: Prompts,
        controller: Controller | None,
        engine: SessionEngine,
    ) -> None:
        """Store the arguments; starts nothing.

        Args:
            offer: what is served.
            limits: limits of the server.
            places: number of sessions that take turns on the device.
            prompts: encodes prompts.
            controller: checks events; None: no controls.
            engine: the sessions on rank zero.
        """
        self.offer = offer
        self.limits = limits
        self.places = places
        self.prompts = prompts
        self.controller = controller
        self.engine = engine
        self.lock = threading.Condition()
        self.sessions: dict[str, LiveSession] = {}
        self.queue: list[LiveSession] = []
        """Sessions that wait for a place, the next one first."""
        self.draining = False
        self.news = 0
        """Number of calls of ``wake``; if unchanged under the lock, none was missed."""
        self.delivery = Delivery()
        self.steps = 0
        """Number of AR steps of all sessions."""
        self.adopt: Callable[[str], LiveSession | None] = lambda session: None
        """Takes over a session from another server's folder; called without the lock."""

    def open(self, opening: Opening, listener: Listener) -> str:
        """See `Host`."""
        if opening.num_frames is not None and opening.num_frames < 1:
            raise Refused(f"num_frames={opening.num_frames} must be at least 1.")
        tensors = self._tensors_of(opening)
        live = LiveSession(
            id="-".join(filter(None, (self.limits.name, secrets.token_urlsafe(24)))),
            prompt=opening.prompt,
            seed=self.offer.seed if opening.seed is None else opening.seed,
            num_frames=opening.num_frames,
            tensors=tensors,
            listener=listener,
        )
        with self.lock:
            self._refuse_draining()
            if len(self.queue) >= self.free_places() + self.limits.max_waiting:
                raise Full(
                    f"All {self.places} places are taken and the queue of "
                    f"{self.limits.max_waiting} is full; try again later."
                )
            self.sessions[live.id] = live
            self.queue.append(live)
            self.tell_states()
            self.wake()
        return live.id

    def _tensors_of(self, opening: Opening) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if opening.prompt is not None and opening.prompt != self.offer.prompt:
            found |= self.prompts.encode(opening.prompt)
        if opening.image is not None:
            shape = (1, 3, self.offer.height, self.offer.width)
            if not self.offer.takes_image:
                raise Refused(f"{self.offer.model} starts from text; it takes no image.")
            if tuple(opening.image.shape) != shape:
                raise Refused(f"The image must be {list(shape)}; got {list(opening.image.shape)}.")
            if not bool(((opening.image >= -1) & (opening.image <= 1)).all()):
                raise Refused("The image must have values from -1 to 1.")
            found["image"] = opening.image.to("cpu", torch.float32)
        return found

    def attach(self, session: str, listener: Listener, from_frame: int = 0) -> int:
        """See `Host`."""
        if session not in self.sessions and not self.draining:
            adopted = self.adopt(session)
            if adopted is not None:
                with self.lock:
                    self.sessions.setdefault(session, adopted)
        with self.lock:
            self._refuse_draining()
            live = self._find(session)
            live.listener, live.told = listener, None
            live.detached_since = None
            if live.where == "disk":
                live.next_frame = max(live.next_frame, from_frame)
            self._go_on(live, "client", "detached", "idle")
            return live.next_frame

    def detach(self, session: str) -> None:
        """See `Host`."""
        with self.lock:
            live = self.sessions.get(session)
            if live is None:
                return
            live.detached_since = time.monotonic()
            self._pause(live, "detached")

    def control(self, session: str, values: Mapping[str, Any], event_id: str | None) -> None:
        """See `Host`."""
        if self.controller is None:
            raise Refused(f"{self.offer.model} has no controls.")
        try:
            self.controller.check(values)
            json.dumps(dict(values), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise Refused(str(error)) from error
        self._submit(session, Command(kind="control", id=event_id or "", values=dict(values)))

    def prompt(self, session: str, text: str, event_id: str | None) -> None:
        """See `Host`."""
        if not self.offer.prompts_change:
            raise Refused(f"The prompt of {self.offer.model} cannot change during a session.")
        with self.lock:
            _refuse_many_prompts(self._find(session))
        encoded = self.prompts.encode(text)
        command = Command(kind="prompt", id=event_id or "", values={"text": text}, tensors=encoded)
        self._submit(session, command)

    def _submit(self, session: str, command: Command) -> None:
        with self.lock:
            live = self._find(session)
            if len(live.commands) >= MAX_EVENTS:
                raise Refused(f"{MAX_EVENTS} events are pending for the next chunk; send fewer.")
            if command.kind == "prompt":
                _refuse_many_prompts(live)
            if command.id in live.ids:
                return
            if command.id:
                live.ids[command.id] = None
                if len(live.ids) > REMEMBERED_IDS:
                    del live.ids[next(iter(live.ids))]
            live.commands.append(command)
            self._go_on(live, "idle")

    def command(
        self, session: str, kind: str, event_id: str | None, values: Mapping[str, Any]
    ) -> None:
        """See `Host`."""
        if kind not in self.offer.commands:
            offered = ", ".join(self.offer.commands) or "none"
            raise Refused(f"{self.offer.model} has no {kind!r}; commands: {offered}.")
        given = {n: x for n, x in values.items() if n in ("name", "seed") and x is not None}
        seed = given.get("seed")
        whole = isinstance(seed, int) and not isinstance(seed, bool)
        if kind == "reset" and seed is not None and not (whole and 0 <= seed < 2**64):
            raise Refused(f"seed={seed!r} must be a whole number from 0 to 2**64 - 1.")
        with self.lock:
            live = self._find(session)
            if len(live.keepings) >= MAX_KEEPINGS:
                raise Refused(f"{MAX_KEEPINGS} commands are pending; send fewer.")
            if kind != "reset":
                self._check_name(live, kind, given.get("name"))
            live.keepings.append(Command(kind=kind, id=event_id or "", values=given))  # type: ignore[arg-type]
            self._go_on(live, "idle")

    def _check_name(self, live: LiveSession, kind: str, name: Any) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise Refused(f"A {kind} needs a name of 1 to 64 letters, digits, - and _.")
        saves = [*live.saves, *_names(live, "save")]
        forks = [*live.forks, *_names(live, "fork")]
        if kind == "rewind" and name not in saves + forks:
            there = ", ".join(live.forks + live.saves) or "nothing"
            raise Refused(f"There is no kept state {name!r}; available: {there}.")
        if kind != "rewind" and name in saves + forks:
            raise Refused(f"{name!r} already exists; use another name.")
        if kind == "save" and len(saves) >= self.limits.max_saves:
            raise Refused(f"A session keeps at most {self.limits.max_saves} snapshots.")
        if kind == "fork" and len(forks) >= self.limits.max_forks:
            raise Refused(f"A session keeps at most {self.limits.max_forks} forks.")

    def pause(self, session: str, paused: bool) -> None:
        """See `Host`."""
        with self.lock:
            live = self._find(session)
            if paused:
                live.last_input = time.monotonic()
                self._pause(live, "client")
            else:
                self._go_on(live, "client", "idle")

    def close(self, session: str) -> None:
        """See `Host`."""
        with self.lock:
            live = self.sessions.get(session)
            if live is not None:
                live.closing = True
                self.wake()

    def saved(self, session: str) -> list[str]:
        """See `Host`."""
        with self.lock:
            live = self.sessions.get(session)
            return [] if live is None else [*live.forks, *live.saves]

    def figures(self, session: str | None = None) -> Figures:
        """See `Host`."""
        device, now = self.engine.pipeline.target_device, time.monotonic()
        with self.lock:
            asked = [self._find(session)] if session else list(self.sessions.values())
            lives = list(self.sessions.values())
            last = max(asked, key=lambda live: live.last_turn, default=None)
            return Figures(
                state=last.state if session and last is not None else "running",
                frames_per_second=sum(live.frames_per_second(now) for live in asked),
                chunk_ms=dict(last.stage_ms) if last is not None else {},
                sessions=sum(live.where == "device" for live in lives),
                queued=len(self.queue),
                device_bytes=torch.cuda.memory_allocated(device) if device.type == "cuda" else None,
                host_bytes=psutil.Process().memory_info().rss,
                parked=sum(live.where in ("host", "disk") for live in lives),
                parked_bytes=self.engine.parked_bytes,
                steps=last.chunks if session and last is not None else self.steps,
                places=self.places,
            )

    def drain(self) -> None:
        """See `Host`."""
        # Also called by the handler of a signal, on the thread that may hold the lock.
        self.draining = True

    def attempt(self, live: LiveSession, task: Callable[[], Any]) -> bool:
        """Run a task for a session, called by the loop; if it fails, the session ends.

        Returns:
            Whether it succeeded.
        """
        try:
            task()
            return True
        except OrderError as error:
            cause = error.__cause__
            if isinstance(cause, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            with self.lock:
                live.failed = str(error)
                live.blameless = isinstance(cause, OSError) or is_shortage(cause or error)
            return False

    def wake(self) -> None:
        """Wake the loop after a change; the lock is held."""
        self.news += 1
        self.lock.notify_all()

    def free_places(self) -> int:
        """Number of free places; the lock is held."""
        return self.places - sum(live.where == "device" for live in self.sessions.values())

    def next_waiting(self) -> LiveSession | None:
        """The session for the next free place, skipping lost clients; the lock is held."""
        return next((live for live in self.queue if "detached" not in live.reasons), None)

    def tell_states(self) -> None:
        """Send state changes to listeners; the lock is held."""
        free = self.free_places()
        for live in list(self.sessions.values()):
            position = 0
            if live.waits:
                place = self.queue.index(live)
                if place < free:
                    continue  # it begins at once
                position = place - max(0, free) + 1
            news = (live.state, position)
            if live.listener is not None and live.told != news:
                live.told = news
                self.delivery.call(live.listener.on_state, *news)

    def _find(self, session: str) -> LiveSession:
        live = self.sessions.get(session)
        if live is None or live.closing:
            raise Refused("There is no such session, or it has ended; start a new one.")
        return live

    def _refuse_draining(self) -> None:
        if self.draining:
            raise Refused("The server accepts no more sessions: it is about to restart.")

    def pause_idle(self, live: LiveSession) -> None:
        """Pause a session whose client sends nothing."""
        with self.lock:
            self._pause(live, "idle")

    def _pause(self, live: LiveSession, reason: Any) -> None:
        live.pause(reason, time.monotonic())
        self.tell_states()
        self.wake()

    def _go_on(self, live: LiveSession, *reasons: Any) -> None:
        live.last_input = time.monotonic()
        live.go_on(*reasons)
        self.wait_again(live)
        self.tell_states()
        self.wake()

    def wait_again(self, live: LiveSession) -> None:
        """Queue a parked session for a place if it needs one; the lock is held.

        It does if it runs, or has to save, fork, rewind or reset. Sessions that had a place before
        precede those that had none.
        """
        wants = not live.reasons or (live.keepings and "detached" not in live.reasons)
        if not wants or live.waits or live.where not in ("host", "disk"):
            return
        live.waits = True
        ahead = sum(other.where != "nowhere" for other in self.queue)
        self.queue.insert(ahead, live)


def _names(live: LiveSession, kind: str) -> list[Any]:
    """Names of the pending commands of one kind."""
    return [command.values["name"] for command in live.keepings if command.kind == kind]


def _refuse_many_prompts(live: LiveSession) -> None:
    if sum(command.kind == "prompt" for command in live.commands) >= MAX_PROMPTS:
        raise Refused(f"{MAX_PROMPTS} prompts are pending for the next chunk; send fewer.")
