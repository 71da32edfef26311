"""The conditions of a rollout, encoded once at its start."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashdreams.infra.checks import refuse_non_finite, refuse_other_pixels, refuse_unknown
from flashdreams.infra.config import quoted
from flashdreams.infra.encoder.base import Encoder
from flashdreams.parallel.environment import from_rank_zero

AFTER_CUT = "text_after_cut"
"""Context: embeddings of the prompt from the second chunk of a shot on."""

OWN_CONTEXT = frozenset({"text", "negative_text", "image", "seed", "noise", AFTER_CUT})
"""Context that the pipeline itself handles."""


@dataclass(frozen=True, kw_only=True)
class ContextEncoder:
    """Checks and encodes prompts, images and other context of a rollout."""

    config: Any
    """The `StreamInferencePipelineConfig`."""
    text_encoder: Any
    """None: ``text`` is passed through, unless the encoder was released or is on another rank."""
    image_encoder: Any
    """None: ``image`` is passed through."""
    text_from_rank_zero: bool
    """Only rank zero has the text encoder: it may be larger than the transformer."""
    device: torch.device
    """The device of the embeddings."""
    known: frozenset[str]
    """Context that the components declare."""

    def encode(
        self,
        text: Sequence[str] | Tensor | None,
        negative_text: Sequence[str] | Tensor | None,
        image: Any,
        context: Mapping[str, Any],
    ) -> tuple[dict[str, Any], Any]:
        """Check and encode the arguments of `StreamInferencePipeline.initialize_cache`.

        Returns:
            The context by name, ``batch_size`` among it; and the encoded negative prompt, None
            without guidance.

        Raises:
            TypeError: a keyword that no component declares, or an image that none of them takes.
            ValueError: no prompt, or one that the text encoder refuses; another number of negative
                prompts, any without guidance, pixels beyond [-1, 1], or values that are not finite.
        """
        self._check_names(context, image)
        (refuse_non_finite if self.image_encoder is None else refuse_other_pixels)("image", image)
        for name, value in context.items():
            refuse_non_finite(name, value)
        batch_size = _batch_size(text, image, context.get("image_tokens"))
        if batch_size < 1:
            raise ValueError("text or image is of no video: give a prompt or an image for each.")
        encoded = {**context, "batch_size": batch_size}
        if image is not None:
            found = self.image_encoder(image) if self.image_encoder is not None else image
            encoded |= dict(found) if isinstance(found, Mapping) else {"image": found}
        if text is not None:
            shot = self.prompts_of_shot(text)
            encoded |= {name: self.encode_text(x) for name, x in shot.items()}
        if self.config.diffusion_model.guidance_scale is None:
            if negative_text is not None:
                raise ValueError(
                    f"{self.config.name} runs without guidance, so it takes no negative_text; set "
                    "diffusion_model.guidance_scale, or omit it."
                )
            return encoded, None
        prompts = [""] * batch_size if negative_text is None else negative_text
        if not isinstance(prompts, str) and len(prompts) != batch_size:
            raise ValueError(
                f"negative_text holds {len(prompts)} prompts for a batch of {batch_size}: give one "
                "for each, or None."
            )
        return encoded, self.encode_text(prompts)

    def encode_text(self, text: Sequence[str] | Tensor) -> Any:
        """Embeddings ``[B, S, text_dim]`` of prompts; embeddings are returned unchanged.

        A collective call if only rank zero has the text encoder.

        Raises:
            ValueError: one string instead of a list, embeddings that are not finite, or prompts
                after the text encoder was released.
        """
        refuse_non_finite("text", text)
        if self.config.text_encoder is None:
            return text
        if isinstance(text, Tensor):
            if not text.is_floating_point():
                raise ValueError(
                    f"text must be prompts or floating-point embeddings; got {text.dtype}."
                )
            return text
        _refuse_string(text)
        if not self.text_from_rank_zero:
            return self.encode_here(text)
        embeddings = from_rank_zero(lambda: self.encode_here(text).cpu())
        return embeddings.to(self.device)

    def prompts_of_shot(self, text: Sequence[str] | Tensor) -> dict[str, Sequence[str] | Tensor]:
        """Prompts by the name of their embeddings: ``text`` and, where they cut to another scene,
        ``text_after_cut``, the prompts from the second chunk on, without the prefix.

        Source: NVlabs/LongLive, utils/dataset.py, MultiTextConcatDataset.
        """
        prefix = self.config.scene_cut_prefix
        if prefix is None or isinstance(text, Tensor | str):
            return {"text": text}
        if not any(prompt.startswith(prefix) for prompt in text):
            return {"text": text}
        return {"text": text, AFTER_CUT: [prompt.removeprefix(prefix) for prompt in text]}

    def encode_here(self, text: Sequence[str]) -> Any:
        """Embeddings of prompts by the text encoder of this rank.

        Raises:
            ValueError: there is none any more, or one string in place of a list.
        """
        _refuse_string(text)
        if self.text_encoder is None:
            raise ValueError(
                "The text encoder was released after the first prompt. Give text as embeddings "
                "[B, S, text_dim], or set release_text_encoder=False."
            )
        return self.text_encoder(list(text))

    def refuse_prompts(self, prompts: Mapping[str, str]) -> None:
        """Refuse prompts that the text encoder would refuse; works without weights.

        Collective where several ranks share the pipeline: rank zero, which runs the text encoder,
        asks.

        Args:
            prompts: each by its name in the message, such as the option that gives it.

        Raises:
            ValueError: names the prompt and what is wrong with it, the same on all ranks.
            CheckpointError: the tokenizer is not on this machine.
            ImportError: a package for text is not installed.
            RankZeroError: on the other ranks, if rank zero has raised one of the last two.
        """

        def refusal() -> str | None:
            encoder = self.text_encoder
            for name, prompt in prompts.items() if isinstance(encoder, Encoder) else ():
                try:
                    encoder.check_input([prompt])
                except ValueError as error:
                    return f"{name}: {error}"
            return None

        found = from_rank_zero(refusal) if self.text_from_rank_zero else refusal()
        if found is not None:
            raise ValueError(found)

    def _check_names(self, context: Mapping[str, Any], image: Any) -> None:
        encoded = self.image_encoder is not None or isinstance(image, Mapping)
        taken = self.config.diffusion_model.begins_with_image or "image" in self.known
        if image is not None and not (encoded or taken):
            raise TypeError(f"{self.config.name} takes no image, so image must be None.")
        refuse_unknown(context, (self.known | OWN_CONTEXT) - {"batch_size"}, self.config.name)


def _refuse_string(text: Any) -> None:
    """Refuse one prompt in place of a list, which would be one of letters."""
    if isinstance(text, str):
        raise ValueError(
            f"text must be a list of prompts; got one string. Try text=[{quoted(text)}]."
        )


def _batch_size(text: Any, image: Any, image_tokens: Any) -> int:
    for given in (text, image_tokens):
        if given is not None:
            return len(given)
    return len(image) if isinstance(image, Tensor) and image.ndim >= 4 else 1
