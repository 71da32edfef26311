"""What a rollout is conditioned on, encoded once at its begin."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flashdreams.infra.checks import refuse_unknown
from flashdreams.infra.component import declared_context
from flashdreams.infra.encoder.base import Encoder
from flashdreams.parallel.environment import from_rank_zero

if TYPE_CHECKING:
    from flashdreams.infra.pipeline import StreamInferencePipeline

OWN_CONTEXT = ("text", "negative_text", "image", "seed", "noise")
"""Context that the pipeline itself understands."""


def encode_context(
    pipeline: "StreamInferencePipeline",
    text: Sequence[str] | Tensor | None,
    negative_text: Sequence[str] | Tensor | None,
    image: Any,
    context: Mapping[str, Any],
) -> tuple[dict[str, Any], Any]:
    """Check and encode the arguments of `StreamInferencePipeline.initialize_cache`.

    Returns:
        The context by name, ``batch_size`` among it; and the encoded negative prompt, None without
        guidance.

    Raises:
        TypeError: a keyword that no component declares, or an image that none of them takes.
        ValueError: a prompt that the text encoder refuses, another number of negative prompts, or
            any without guidance.
    """
    _check_names(pipeline, context, image)
    batch_size = _batch_size(text, image)
    encoded = {**context, "batch_size": batch_size}
    if image is not None:
        encoded |= _encode_image(pipeline, image)
    if text is not None:
        encoded["text"] = encode_text(pipeline, text)
    if pipeline.config.diffusion_model.guidance_scale is None:
        if negative_text is not None:
            raise ValueError(
                f"{pipeline.config.name} runs without guidance, so it takes no negative_text; set "
                "diffusion_model.guidance_scale, or leave it away."
            )
        return encoded, None
    prompts = [""] * batch_size if negative_text is None else negative_text
    if not isinstance(prompts, str) and len(prompts) != batch_size:
        raise ValueError(
            f"negative_text holds {len(prompts)} prompts for a batch of {batch_size}: give one for "
            "each, or None."
        )
    return encoded, encode_text(pipeline, prompts)


def encode_text(pipeline: "StreamInferencePipeline", text: Sequence[str] | Tensor) -> Any:
    """Embeddings ``[B, S, text_dim]`` of prompts; what is encoded already is handed on.

    Raises:
        ValueError: one string in place of a list, or prompts after the text encoder was released.
    """
    if pipeline.config.text_encoder is None or isinstance(text, Tensor):
        return text
    if isinstance(text, str):
        raise ValueError(f"text must be a list of prompts; got one string. Try text=[{text!r}].")
    if not pipeline.text_from_rank_zero:
        return _run_text_encoder(pipeline, text)
    # The other ranks have no text encoder: it may be larger than the transformer.
    embeddings = from_rank_zero(lambda: _run_text_encoder(pipeline, text).cpu())
    return embeddings.to(pipeline.target_device)


def refuse_prompts(pipeline: "StreamInferencePipeline", prompts: Mapping[str, str]) -> None:
    """Refuse prompts that the text encoder would refuse; needs no weights.

    Collective where several ranks share the pipeline: rank zero, which runs the text encoder, asks.

    Args:
        pipeline: built, whether loaded or not.
        prompts: each by its name in the message, such as the option that gives it.

    Raises:
        ValueError: names the prompt and says what is wrong with it, the same on all ranks.
        CheckpointError: what reads prompts is not on this machine.
        ImportError: a package for text is not installed.
        RankZeroError: on the other ranks, if rank zero has raised one of the last two.
    """

    def refusal() -> str | None:
        encoder = pipeline.text_encoder
        for name, prompt in prompts.items() if isinstance(encoder, Encoder) else ():
            try:
                encoder.check_input([prompt])
            except ValueError as error:
                return f"{name}: {error}"
        return None

    found = from_rank_zero(refusal) if pipeline.text_from_rank_zero else refusal()
    if found is not None:
        raise ValueError(found)


def _run_text_encoder(pipeline: "StreamInferencePipeline", text: Sequence[str]) -> Tensor:
    if pipeline.text_encoder is None:
        raise ValueError(
            "The text encoder was released after the first prompt. Give text as embeddings "
            "[B, S, text_dim], or set release_text_encoder=False."
        )
    return pipeline.text_encoder(list(text))


def _encode_image(pipeline: "StreamInferencePipeline", image: Any) -> dict[str, Any]:
    """What the image conditions, by context name; an encoder may give several tensors."""
    encoded = pipeline.image_encoder(image) if pipeline.image_encoder else image
    return dict(encoded) if isinstance(encoded, Mapping) else {"image": encoded}


def _check_names(
    pipeline: "StreamInferencePipeline", context: Mapping[str, Any], image: Any
) -> None:
    taken = set(pipeline.diffusion_model.known_context())
    for part in (pipeline.encoder, pipeline.decoder):
        if part is not None and hasattr(part, "initialize_cache"):
            taken |= declared_context(part.initialize_cache)
    encoded = pipeline.image_encoder is not None or isinstance(image, Mapping)
    stamped = pipeline.config.diffusion_model.first_latent_from_image
    name = pipeline.config.name
    if image is not None and not (encoded or stamped or "image" in taken):
        raise TypeError(f"{name} takes no image, so image must be None.")
    refuse_unknown(context, (taken | set(OWN_CONTEXT)) - {"batch_size"}, name)


def _batch_size(text: Any, image: Any) -> int:
    if text is not None:
        return len(text)
    return len(image) if isinstance(image, Tensor) and image.ndim >= 4 else 1
