"""A served method, assembled on every rank from its runner."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flashdreams.infra.controller import Controller
from flashdreams.infra.diffusion.transformer import Transformer
from flashdreams.infra.pipeline import StreamInferencePipeline
from flashdreams.infra.runner import Runner
from flashdreams.parallel.messages import MessageChannel
from flashdreams.serving.admission import Trial, count_places, streams, try_session
from flashdreams.serving.engine import SessionEngine
from flashdreams.serving.host import LiveHost
from flashdreams.serving.interface import Offer
from flashdreams.serving.keeper import Keeper
from flashdreams.serving.limits import ServingLimits
from flashdreams.serving.loop import TurnLoop
from flashdreams.serving.prompts import Prompts
from flashdreams.serving.restart import SessionFolder
from flashdreams.serving.session_log import SessionLogs
from flashdreams.serving.turns import Turns


def check_served(config: Any) -> None:
    """Refuse a method that cannot be served; called before anything is loaded.

    Raises:
        ValueError: its runner lacks something, which the message names.
    """
    kind, name = getattr(config, "_target", None), getattr(config, "runner_name", "it")
    if not isinstance(kind, type) or not issubclass(kind, Runner):
        raise ValueError(f"{name}: a served method has a runner made of flashdreams' Runner.")
    own_run = kind.run is not Runner.run
    if own_run and kind.conditions is Runner.conditions and kind.controller is Runner.controller:
        raise ValueError(
            f"{name} cannot be served: {kind.__name__} defines run() alone, which nobody can "
            "steer. Give it conditions(), which returns the keywords of "
            "pipeline.initialize_cache, and controller(), which returns a Controller or None."
        )


class Server:
    """The sessions of one method on this rank; on rank zero also their host.

    ``host`` is for the web server; it is None on other ranks.
    """

    def __init__(self, runner: Runner[Any, Any], limits: ServingLimits) -> None:
        """Run the trial session and prepare for others; a collective call.

        Args:
            runner: set up; its recorder is removed.
            limits: limits of the server.

        Raises:
            ValueError: too little memory for the requested sessions, the method needs a control
                input and its runner has no controller, or the folder of snapshots cannot be written
                or another server uses it.
        """
        self.runner = runner
        runner.serve()
        pipeline, config = runner.pipeline, runner.config
        controller = runner.controller()
        if pipeline.encoder is not None and controller is None:
            raise ValueError(
                f"{config.runner_name} cannot be served as it is set: its AR steps need a control "
                f"input, and {type(runner).__name__}.controller() returns None."
            )
        own = runner.conditions()
        conditions = encode_texts(pipeline, own)
        channel = MessageChannel(runner.environment.store)
        self.trial = try_session(pipeline, conditions, controller, channel)
        pool = pipeline.diffusion_model.pool
        places = count_places(
            self.trial, pipeline.target_device, limits.max_sessions, pool.size if pool else 0
        )
        folder = limits.folder_of(config)
        self.engine = SessionEngine(
            pipeline, conditions, runner.controller, channel, folder, config.seed
        )
        self.host: LiveHost | None = None
        if runner.is_rank_zero:
            prompts = Prompts(pipeline)
            offer = make_offer(runner, own, self.trial, prompts.change, controller)
            self.host = LiveHost(offer, limits, places, prompts, controller, self.engine)
            keeper = Keeper(
                self.host,
                SessionFolder(folder, pipeline.config),
                self.trial.rollout_bytes,
                keeps=self.trial.keeps and streams(pipeline),
            )
            keeper.take_over()  # before a client can ask for its session
            self.host.adopt = keeper.adopt
            if limits.max_logs:
                logs = (limits.adopt_from or folder) / "logs"
                self.engine.logs = SessionLogs(runner, logs, limits.max_logs)
            self._loop = TurnLoop(self.host, keeper, Turns(self.host, streams=streams(pipeline)))

    def run(self) -> None:
        """Serve until the host is told to drain; a collective call."""
        if self.host is None:
            self.engine.follow()
        else:
            self._loop.run()

    def drain(self) -> None:
        """Let ``run`` return once all sessions are on disk; other ranks follow rank zero."""
        if self.host is not None:
            self.host.drain()


def encode_texts(
    pipeline: StreamInferencePipeline, conditions: Mapping[str, Any]
) -> dict[str, Any]:
    """Encode the prompts of conditions, so that no session has to; a collective call."""
    encoder = pipeline.context_encoder
    found = dict(conditions)
    for name in ("text", "negative_text"):
        if found.get(name) is not None:
            found[name] = encoder.encode_text(found[name])
    return found


def make_offer(
    runner: Runner[Any, Any],
    conditions: Mapping[str, Any],
    trial: Trial,
    prompts_change: bool,
    controller: Controller | None,
) -> Offer:
    """Describe what is served.

    Args:
        runner: runner of the method.
        conditions: initial conditions of its sessions, before encoding.
        trial: measurements of one session.
        prompts_change: whether other prompts can be encoded.
        controller: controller of its sessions.
    """
    pipeline, config = runner.pipeline, runner.config
    model = pipeline.diffusion_model
    text = conditions.get("text")
    prompt = None if text is None or isinstance(text, Tensor) else text[0]
    updates = type(model.transformer).update_context is not Transformer.update_context
    going_on = streams(pipeline)
    kept = ("save", "fork", "rewind") if trial.keeps else ()
    has_image_encoder = pipeline.image_encoder is not None and model.config.begins_with_image
    return Offer(
        model=config.runner_name,
        width=trial.width,
        height=trial.height,
        fps=float(config.fps),
        seed=config.seed,
        prompt=prompt,
        num_inference_steps=len(model.scheduler.timesteps),
        guidance_scale=model.config.guidance_scale,
        controls=None if controller is None else controller.accepts(),
        prompts_change=prompts_change and updates and text is not None and going_on,
        takes_image="image" in conditions or has_image_encoder,
        commands=(*kept, "reset") if going_on else (),
        chunk_frames=trial.chunk_frames,
    )
