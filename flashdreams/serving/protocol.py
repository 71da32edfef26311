"""Messages of a live session over a WebSocket or a data channel, field by field.

``session.start``, ``session.interaction``, ``session.ping``, ``session.stop`` and their replies are
those of existing clients of ``/v1/realtime/video``; the others are specific to this server.
Every ``video.chunk_metadata`` is followed immediately by one binary frame of ``byte_length`` bytes;
over WebRTC the picture is on the media track instead.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

Name = Annotated[str, Field(pattern=r"^[\w-]{1,64}$")]
EventId = Annotated[str, Field(min_length=1, max_length=128)]
Text = Annotated[str, Field(max_length=20_000)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
Frame = Annotated[int, Field(ge=0, le=2**53)]
"""No larger than what JavaScript can represent."""


class Message(BaseModel):
    """Ignores unknown fields, because clients of later versions may send more."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


# ---------------------------------------------------------------- client to server


class ImageReference(Message):
    """The first frame."""

    image_url: str
    """``data:image/...;base64,...``; an ``https`` address only where the server allows it."""


class SessionOptions(Message):
    """Options of a new session. Absent fields and None mean the server's default."""

    model: str | None = None
    prompt: Text | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    num_frames: Annotated[Frame, Field(ge=1)] | None = None
    """Pixel frames after which the session is done; None: it continues until it is stopped."""
    seed: Seed | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    image_reference: ImageReference | None = None


class SessionStart(SessionOptions):
    """Start a session. Absent fields and None mean the server's default."""

    type: Literal["session.start"]
    format: Literal["m4s", "jpeg"] = "m4s"
    """``"m4s"``: fragmented MP4 with H.264. ``"jpeg"``: one picture per binary frame."""
    extra_params: dict[str, Any] = {}


class SessionResume(Message):
    """Resume a session whose socket was lost."""

    type: Literal["session.resume"]
    token: str
    """From ``video.start``."""
    from_frame: Frame = 0
    """The first pixel frame that was not shown; stored frames are sent from there on."""
    format: Literal["m4s", "jpeg"] = "m4s"


class CameraData(Message):
    """A motion or a pose."""

    translation: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rotation: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 1.0)
    """Quaternion x, y, z, w."""


class CameraMotion(Message):
    """A camera in metres and unit quaternions: +x right, +y up, +z forward."""

    mode: Literal["velocity", "target"]
    """``"velocity"`` holds a motion per frame until replaced; ``"target"`` moves to a pose."""
    data: CameraData


class MultiModalData(Message):
    """Content of an event other than text."""

    camera: CameraMotion | None = None


class InteractionEvent(Message):
    """A change of the prompt, of the camera, or of both."""

    prompt: Text | None = None
    multi_modal_data: MultiModalData | None = None


class Interaction(Message):
    """An event with its identifier."""

    event_id: EventId
    event: InteractionEvent
    transition_chunks: Annotated[int, Field(ge=0, le=64)] | None = None
    """Number of chunks over which a ``"target"`` is reached; None means one."""


class SessionInteraction(Message):
    """Change the prompt or the camera."""

    type: Literal["session.interaction"]
    request_id: str | None = None
    interaction: Interaction


class Control(Message):
    """Values for the controller, from the next step on."""

    values: dict[str, Any]
    """As ``controls`` of ``video.start`` describes."""
    event_id: EventId | None = None


class SessionControl(Control):
    """What the controller accepts: held keys, pointer motion, sliders."""

    type: Literal["session.control"]


class SessionPause(Message):
    """Pause or resume at the next chunk boundary."""

    type: Literal["session.pause"]
    paused: bool = True


class Reset(Message):
    """Begin the rollout again with the next step."""

    seed: Seed | None = None
    event_id: EventId | None = None


class SessionReset(Reset):
    """Restart the rollout."""

    type: Literal["session.reset"]


class Keep(Message):
    """Name for the state before the next step."""

    name: Name
    event_id: EventId | None = None


class SessionKeep(Keep):
    """Store the state under a name (``save`` on disk, ``fork`` on the device), or return to it."""

    type: Literal["session.save", "session.fork", "session.rewind"]


class SessionShown(Message):
    """A receipt: frames up to this one were shown."""

    type: Literal["session.shown"]
    frame: Frame
    key_to_photon_ms: list[Annotated[float, Field(ge=0, le=600_000)]] = Field([], max_length=64)
    """Times from an input event to the display of the first frame of the chunk it acted on."""
    dropped: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Frames that the client dropped since its last receipt."""


class SessionKey(Message):
    """Make the next picture a key picture, where decoding and thus a recording can start."""

    type: Literal["session.key"]


class SessionPing(Message):
    """Keep the connection alive."""

    type: Literal["session.ping"]


class SessionStop(Message):
    """End the session."""

    type: Literal["session.stop"]


ClientMessage = Annotated[
    SessionStart
    | SessionResume
    | SessionInteraction
    | SessionControl
    | SessionPause
    | SessionReset
    | SessionKeep
    | SessionShown
    | SessionKey
    | SessionPing
    | SessionStop,
    Field(discriminator="type"),
]
"""Any message of a client."""

# ---------------------------------------------------------------- server to client


class StartConfig(Message):
    """The parameters of a session."""

    model: str
    """The slug that the server serves."""
    prompt: str | None
    """None if the model takes no prompt."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    fps: float
    """Playback frame rate."""
    seed: int
    """Seed of the noise."""
    num_frames: int | None
    """Pixel frames after which the session is done; None: it continues until it is stopped."""
    num_inference_steps: int
    """Number of denoising steps."""
    guidance_scale: float | None
    """None: without guidance."""


class VideoStart(Message):
    """The session has started or resumed."""

    type: Literal["video.start"] = "video.start"
    request_id: str
    format: Literal["m4s", "jpeg", "webrtc"]
    """``"webrtc"``: the pictures are on the media track of the peer connection."""
    config: StartConfig
    token: str
    """For ``session.resume``."""
    resumed: bool = False
    first_frame: int = 0
    """Pixel frame of the first picture that follows."""
    codec: str | None = None
    """Codec name for browsers, such as ``"avc1.42c01f"``; None for JPEG."""
    controls: dict[str, Any] | None
    """JSON Schema of ``values`` of ``session.control``; None: no controls."""
    prompts_change: bool
    """Whether ``session.interaction`` may carry a prompt."""
    commands: list[str]
    saved: list[str] = []
    """Names that ``session.rewind`` accepts."""


class VideoQueued(Message):
    """All places are taken; the session starts when one is free."""

    type: Literal["video.queued"] = "video.queued"
    request_id: str
    position: int
    """1 is next."""


class VideoChunk(Message):
    """Metadata of the next binary frame, or of the next picture of a media track."""

    type: Literal["video.chunk_metadata"] = "video.chunk_metadata"
    request_id: str
    kind: Literal["media"] = "media"
    transport_chunk_index: int
    """Counts the pictures of this connection."""
    generation_chunk_index: int
    """The AR step that generated it."""
    num_frames: int
    byte_length: int
    """Size of the binary frame; 0 over WebRTC."""
    started_event_ids: list[str] = []
    active_event_ids: list[str] = []
    completed_event_ids: list[str] = []
    first_frame: int
    """Pixel frame of its first picture, counted from the start of the session's video."""
    key: bool = True
    """Whether decoding can start here."""
    epoch: int = 0
    """Incremented by reset and rewind; pictures of earlier epochs are outdated."""
    media_timestamp: int | None = None
    """Over WebRTC: the picture's RTP timestamp minus that of the connection's first picture."""


class Queued(Message):
    """An event was accepted but not yet applied."""

    type: Literal["session.interaction.queued"] = "session.interaction.queued"
    request_id: str
    event_id: str


class Applied(Message):
    """Events act from this chunk on."""

    type: Literal["session.interaction.applied"] = "session.interaction.applied"
    request_id: str
    event_ids: list[str]
    generation_chunk_index: int
    first_frame: int


class Kept(Message):
    """A ``save``, ``fork``, ``rewind`` or ``reset`` was carried out."""

    type: Literal["session.kept"] = "session.kept"
    request_id: str
    event_id: str | None
    command: Literal["save", "fork", "rewind", "reset"]
    name: str | None
    saved: list[str]


class Status(Message):
    """Figures, about once a second."""

    type: Literal["session.status"] = "session.status"
    request_id: str
    state: Literal["running", "paused", "parked", "waiting"]
    frames_per_second: float
    """Frames generated per second, over the last seconds."""
    chunk_ms: dict[str, float]
    """Time of each stage of the last chunk, in milliseconds."""
    key_to_photon_p50_ms: float | None
    key_to_photon_p99_ms: float | None
    unshown_frames: int
    """Frames sent for which there is no receipt yet."""
    sessions: int
    """Sessions that share the device."""
    queued: int
    device_bytes: int | None
    """Memory in use on the device; None on a CPU."""
    host_bytes: int


class Pong(Message):
    """Reply to a ping."""

    type: Literal["session.pong"] = "session.pong"


class Done(Message):
    """The session is over."""

    type: Literal["session.done"] = "session.done"
    request_id: str
    chunks: int
    stopped: bool
    """Whether it was stopped, rather than having reached ``num_frames``."""


class Error(Message):
    """Something failed; unless the socket closes, the stream continues."""

    type: Literal["error"] = "error"
    message: str
    code: Literal[
        "bad_message",
        "unauthorized",
        "not_allowed",
        "interaction_failed",
        "queue_full",
        "unknown_session",
        "timeout",
        "too_slow",
        "session_failed",
        "not_ready",
        "draining",
    ]
    request_id: str | None = None
    event_id: str | None = None
    allowed: Any = None
    """The values that would have been accepted."""


ServerMessage = Annotated[
    VideoStart | VideoQueued | VideoChunk | Queued | Applied | Kept | Status | Pong | Done | Error,
    Field(discriminator="type"),
]
"""Any text message of the server."""

CLIENT_MESSAGE: TypeAdapter[Any] = TypeAdapter(ClientMessage)
SERVER_MESSAGE: TypeAdapter[Any] = TypeAdapter(ServerMessage)


def schema() -> dict[str, Any]:
    """JSON Schema of all messages of both directions."""
    return {
        "client": CLIENT_MESSAGE.json_schema(),
        "server": SERVER_MESSAGE.json_schema(mode="serialization"),
    }
