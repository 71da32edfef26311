"""A host that records the chunks of its sessions on their way to the web server."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flashdreams.serving.interface import Chunk, Figures, Host, Listener, Opening, State


class TappedHost(Host):
    """Forwards everything; ``chunks`` holds those of the session that was opened last."""

    def __init__(self, host: Host, fps: float | None = None) -> None:
        """Wrap another host.

        Args:
            host: the wrapped host.
            fps: frame rate to offer; None: that of the host.
        """
        self._host = host
        self.offer = host.offer if fps is None else replace(host.offer, fps=fps)
        self.chunks: list[Chunk] = []
        self.processor_s: list[float] = []
        """CPU time of this process, over all threads, when each chunk arrived."""

    def open(self, opening: Opening, listener: Listener) -> str:
        """See `Host`."""
        self.chunks, self.processor_s = [], []
        return self._host.open(opening, _Tap(listener, self.chunks, self.processor_s))

    def attach(self, session: str, listener: Listener, from_frame: int = 0) -> int:
        """See `Host`."""
        return self._host.attach(session, listener, from_frame)

    def detach(self, session: str) -> None:
        """See `Host`."""
        self._host.detach(session)

    def control(self, session: str, values: Mapping[str, Any], event_id: str | None) -> None:
        """See `Host`."""
        self._host.control(session, values, event_id)

    def prompt(self, session: str, text: str, event_id: str | None) -> None:
        """See `Host`."""
        self._host.prompt(session, text, event_id)

    def command(
        self, session: str, kind: str, event_id: str | None, values: Mapping[str, Any]
    ) -> None:
        """See `Host`."""
        self._host.command(session, kind, event_id, values)

    def pause(self, session: str, paused: bool) -> None:
        """See `Host`."""
        self._host.pause(session, paused)

    def close(self, session: str) -> None:
        """See `Host`."""
        self._host.close(session)

    def saved(self, session: str) -> list[str]:
        """See `Host`."""
        return self._host.saved(session)

    def figures(self, session: str | None = None) -> Figures:
        """See `Host`."""
        return self._host.figures(session)

    def drain(self) -> None:
        """See `Host`."""
        self._host.drain()


class _Tap(Listener):
    def __init__(self, listener: Listener, chunks: list[Chunk], processor_s: list[float]) -> None:
        self._listener, self._chunks, self._processor_s = listener, chunks, processor_s

    def on_state(self, state: State, position: int = 0) -> None:
        self._listener.on_state(state, position)

    def on_chunk(self, chunk: Chunk) -> None:
        self._chunks.append(chunk)
        self._processor_s.append(time.process_time())
        self._listener.on_chunk(chunk)

    def on_kept(self, command: str, name: str | None, event_id: str | None) -> None:
        self._listener.on_kept(command, name, event_id)

    def on_refused(self, event_id: str | None, message: str) -> None:
        self._listener.on_refused(event_id, message)

    def on_end(self, error: str | None, stopped: bool) -> None:
        self._listener.on_end(error, stopped)

    def unshown_seconds(self) -> float:
        return self._listener.unshown_seconds()
