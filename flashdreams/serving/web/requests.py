"""Requests of clients to a running session: controls, prompts, commands."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from flashdreams.serving.interface import Host, Refused
from flashdreams.serving.protocol import (
    SessionControl,
    SessionInteraction,
    SessionKeep,
    SessionReset,
)
from flashdreams.serving.web.accounts import INTERNAL, Denied
from flashdreams.serving.web.events import Part
from flashdreams.serving.web.feed import Feed
from flashdreams.serving.web.gate import for_clients

logger = logging.getLogger(__name__)

MAX_SLOW_REQUESTS = 32
"""Maximum number of queued prompts and commands of one client."""


class Requests:
    """Passes the events of one client to the host.

    Controls are passed at once. Prompts and commands may take longer, so they have a separate queue
    and do not delay keys and pings.
    """

    def __init__(self, host: Host, session: str, feed: Feed) -> None:
        """Store the arguments, on the event loop's thread."""
        self.host, self.session, self.feed = host, session, feed
        self._slow: asyncio.Queue[tuple[str, Callable[..., None]]]
        self._slow = asyncio.Queue(MAX_SLOW_REQUESTS)

    def pause(self, paused: bool) -> None:
        """Pause at the next chunk boundary, or resume.

        Raises:
            Denied: the session has ended.
        """
        try:
            self.host.pause(self.session, paused)
        except Refused as error:
            raise _failed(None, for_clients(str(error))) from error

    def take(
        self, message: SessionControl | SessionInteraction | SessionReset | SessionKeep
    ) -> None:
        """Execute or queue a message; the client is told the result.

        Raises:
            Denied: it cannot be executed.
        """
        if isinstance(message, SessionControl):
            self._control(message)
        elif isinstance(message, SessionInteraction):
            self._interaction(message)
        else:
            self._command(message)

    def _control(self, message: SessionControl) -> None:
        if self.feed.offer.controls is None:
            raise _failed(message.event_id, "Nothing is controlled in this session.")
        ids = self.feed.accept(message.event_id, {"control": None})
        if ids is not None:
            self._carry_out(
                ids["control"], partial(self.host.control, self.session, message.values)
            )

    def _interaction(self, message: SessionInteraction) -> None:
        interaction, offer = message.interaction, self.feed.offer
        event_id, prompt = interaction.event_id, interaction.event.prompt
        media = interaction.event.multi_modal_data
        camera = None if media is None else media.camera
        known = (offer.controls or {}).get("properties", {})
        if prompt is None and camera is None:
            raise _failed(event_id, "The event changes neither prompt nor camera.")
        if prompt is not None and not offer.prompts_change:
            raise _failed(event_id, "Prompts cannot change in this session.")
        if camera is not None and "camera" not in known:
            takes = ", ".join(known) or "nothing"
            raise _failed(event_id, f"There is no camera here; session.control takes {takes}.")
        chunks = interaction.transition_chunks or 1
        parts: dict[Part, int | None] = {}
        if camera is not None:
            parts["camera"] = chunks if camera.mode == "target" else None
        if prompt is not None:
            parts["prompt"] = chunks
        ids = self.feed.accept(event_id, parts)
        if ids is None:
            return
        if camera is not None:
            values = {
                "mode": camera.mode,
                "translation": list(camera.data.translation),
                "rotation": list(camera.data.rotation),
                "transition_chunks": chunks,
            }
            self._carry_out(
                ids["camera"], partial(self.host.control, self.session, {"camera": values})
            )
        if prompt is not None:
            self._later(ids["prompt"], partial(self.host.prompt, self.session, prompt))

    def _command(self, message: SessionReset | SessionKeep) -> None:
        kind = message.type.removeprefix("session.")
        if kind not in self.feed.offer.commands:
            takes = ", ".join(self.feed.offer.commands) or "none"
            text = f"There is no {kind} in this session; commands are: {takes}."
            raise _failed(message.event_id, text)
        values: dict[str, Any] = message.model_dump(include={"name", "seed"}, exclude_none=True)
        ids = self.feed.accept(message.event_id, {"command": None})
        if ids is None:
            return
        if kind in ("reset", "rewind"):
            self.feed.hurry()
        self._later(ids["command"], partial(self.host.command, self.session, kind, values=values))

    def _carry_out(self, event: str, call: Callable[..., None]) -> None:
        """Pass an event to the host, with the host's identifier of it."""
        try:
            call(event_id=event)
        except Refused as error:
            self.feed.on_refused(event, str(error))
        except Exception:
            logger.exception("an event has failed")
            self.feed.on_refused(event, INTERNAL)

    def _later(self, event: str, call: Callable[..., None]) -> None:
        try:
            self._slow.put_nowait((event, call))
        except asyncio.QueueFull:
            self.feed.on_refused(event, f"More than {MAX_SLOW_REQUESTS} requests wait already.")

    async def work(self) -> None:
        """Execute queued prompts and commands one at a time; withdraw the rest at the end."""
        try:
            while True:
                await asyncio.to_thread(self._carry_out, *await self._slow.get())
        finally:
            while not self._slow.empty():
                event, _ = self._slow.get_nowait()
                self.feed.withdraw(event)


def _failed(event_id: str | None, text: str) -> Denied:
    return Denied(text, "interaction_failed", event_id=event_id)
