"""``POST /v1/realtime/webrtc``: live sessions over WebRTC."""

import asyncio
import contextlib
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from flashdreams.serving.web.accounts import Accounts
from flashdreams.serving.web.conversation import Conversation
from flashdreams.serving.web.peer import Peer

NOT_INSTALLED = "WebRTC is not installed here: pip install 'flashdreams[webrtc]'"
_RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"description": "No offer that can be answered."},
    501: {"description": "aiortc is not installed."},
    503: {"description": "Not now."},
}


class PeerOffer(BaseModel):
    """The offer of a client's ``RTCPeerConnection``, with all candidates."""

    sdp: str
    type: Literal["offer"]


class PeerAnswer(BaseModel):
    """The answer: its remote description."""

    sdp: str
    type: Literal["answer"] = "answer"


def add_peers(app: FastAPI, accounts: Accounts) -> None:
    """Add the route."""
    tasks: set[asyncio.Task[None]] = set()

    @app.post("/v1/realtime/webrtc", tags=["live sessions"], responses=_RESPONSES)
    async def realtime_webrtc(request: Request, offer: PeerOffer) -> PeerAnswer:
        """Open a peer connection; its data channel uses the protocol of the WebSocket."""
        accounts.host()
        if accounts.full:
            text = f"All {accounts.settings.max_sockets} connections are taken."
            return _refusal(503, "queue_full", text)
        try:
            peer = Peer(request.scope, accounts.settings)
        except ImportError:
            return _refusal(501, "not_installed", NOT_INSTALLED)
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        conversation, place = Conversation(peer, accounts), contextlib.ExitStack()
        place.enter_context(accounts.counted(conversation))  # before the next offer is looked at
        task = asyncio.create_task(_carry_on(peer, offer.sdp, answer, conversation, place))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        try:
            return PeerAnswer(sdp=await answer)
        except ValueError as error:
            return _refusal(400, "bad_message", str(error))


async def _carry_on(
    peer: Peer,
    sdp: str,
    answer: asyncio.Future[str],
    conversation: Conversation,
    place: contextlib.ExitStack,
) -> None:
    """Answer an offer, then run its session; at the end its place is free."""
    with place:
        try:
            text = await peer.answer(sdp)
            if not answer.cancelled():
                answer.set_result(text)
                await conversation.run()
        except ValueError as error:
            if not answer.done():
                answer.set_exception(error)
        finally:
            answer.cancel()
            await peer.hang_up()


def _refusal(status: int, code: str, message: str) -> Any:
    return JSONResponse({"code": code, "message": message}, status)
