"""Checks of a method that run it on one rank."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashdreams.checking.report import Note, Problem, describe_error
from flashdreams.checking.subject import (
    PLAIN,
    Bench,
    Chunk,
    Subject,
    first_difference,
    relative_error,
    same_bits,
)
from flashdreams.infra.decoder.base import StreamingDecoder
from flashdreams.infra.saved_rollouts import new_state
from flashdreams.infra.state import StateError

SPLIT_ERROR = 1e-4
"""Largest difference, on a scale of -1 to 1, between decoding at once and in parts."""

LARGE = 100.0
"""Noise factor of the rollout with large values."""

RANGE_MARGIN = 1e-3
"""By how much frames may leave [-1, 1]; the video clips them."""


def check_shapes(subject: Subject, bench: Bench) -> str:
    """Shapes, types and frame counts of a rollout, at the method's size and at two others.

    Raises:
        Problem: what a chunk is and what it must be.
    """
    sizes = [_check_chunks(subject, bench, bench.roll())]
    transformer = subject.transformer
    patch = getattr(transformer, "patch_size", (1, 1, 1))
    height, width = transformer.latent_height, transformer.latent_width
    others = ((height + 2 * patch[1], width), (height, width - 2 * patch[2]))
    resizable = hasattr(subject.full, "height")
    for other in others:
        try:
            resized = subject.resized(*other)
            opened = resized.open()
            sizes.append(_check_chunks(resized, opened, opened.roll(steps=min(2, opened.steps))))
        except Problem:
            raise
        except Exception as error:
            if resizable:
                raise Problem(
                    f"a latent of {other[0]}x{other[1]} fails with {describe_error(error)}. "
                    "--height and --width allow other sizes: derive every size from the config."
                ) from error
            return f"{sizes[0]}; one size only (its config has no height and width)"
    return f"{sizes[0]}; also at latents of {', '.join(f'{h}x{w}' for h, w in others)}"


def _check_chunks(subject: Subject, bench: Bench, chunks: list[Chunk]) -> str:
    expected = bench.transformer.latent_shape(1)
    pictures = {c.pixels.shape[2:] for c in chunks if c.pixels is not None}
    for index, chunk in enumerate(chunks):
        latent, pixels = chunk.latent, chunk.pixels
        if latent is None or pixels is None:
            raise Problem(f"AR step {index} made no chunk: generate must return frames.")
        if tuple(latent.shape) != expected or latent.dtype != torch.float32:
            raise Problem(
                f"the latent of AR step {index} is {list(latent.shape)} {latent.dtype}, not "
                f"{list(expected)} torch.float32 as latent_shape says. predict_flow must return "
                "the shape that it is given, as float32."
            )
        if not bench.has_decoder:
            continue
        if pixels.ndim != 5 or pixels.shape[2] != 3 or len(pixels) != 1:
            raise Problem(
                f"the decoder returns {list(pixels.shape)} for AR step {index}; it must be "
                "[B, F, 3, height, width]: frames before channels."
            )
        if pixels.shape[1] != len(chunk.frames):
            raise Problem(
                f"the decoder makes {pixels.shape[1]} frames of AR step {index}, and its "
                f"frame_count gives {len(chunk.frames)} (frames {chunk.frames.start} to "
                f"{chunk.frames.stop - 1}). Override frame_count(latent_frames): pixel frames that "
                "the first latent frames of a rollout decode to. Controllers depend on it."
            )
        largest = float(pixels.abs().max())
        if largest > 1 + RANGE_MARGIN:
            raise Problem(
                f"AR step {index} has pixels of {largest:.3g}; they must be in [-1, 1]. Scale 0 to "
                "255 by x / 127.5 - 1, and clamp what may leave the range."
            )
    if len(pictures) > 1 and bench.has_decoder:
        raise Problem(f"the frame size changes within a rollout: {sorted(pictures)}.")
    count = sum(chunk.pixels.shape[1] for chunk in chunks if chunk.pixels is not None)
    return f"{len(chunks)} AR steps, {count} frames, latents {list(expected)}"


def check_determinism(bench: Bench, base: list[Chunk]) -> str:
    """The same seed gives the same bits, whatever the state of torch's own generator.

    Raises:
        Problem: from which AR step on the rollouts differ.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        before = _generator_states()
        again = bench.roll()
        kept = _generator_states() == before
        torch.manual_seed(54321)
        third = bench.roll()
    for other in (again, third):
        if not same_bits(base, other):
            raise Problem(
                f"two rollouts of seed 0 differ {first_difference(other, base)}. Take randomness "
                "from the noise that the pipeline passes, never from torch.rand, torch.randn, "
                "dropout or numpy; do not use sets or hash() in the computation, "
                "or global counters."
            )
    if not kept:
        raise Problem(
            "a rollout draws from or seeds a global generator (torch's, numpy's or "
            "random's), so the calling program gets other numbers, and a CUDA graph "
            "cannot be captured. Take randomness from the noise that the pipeline passes, or "
            "from your own torch.Generator."
        )
    return f"{len(base)} AR steps, the same bits three times"


def _generator_states() -> tuple[bytes, str, Any]:
    """The states of the global generators."""
    return torch.get_rng_state().numpy().tobytes(), str(np.random.get_state()), random.getstate()


def check_inputs(bench: Bench, base: list[Chunk]) -> str:
    """The prompt, the image and the commands change the rollout.

    Raises:
        Note: what has no effect; a method may have a reason to ignore it.
    """
    others: dict[str, dict[str, Any]] = {}
    given = bench.conditions()
    text = given.get("text")
    if isinstance(text, list) and bench.pipeline.context_encoder.text_encoder is not None:
        text = bench.pipeline.encode_prompts(text)
    if isinstance(text, Tensor):
        others["prompt"] = {"text": 1 - text}  # the encoder may refuse another text
    if isinstance(image := given.get("image"), Tensor):
        others["image"] = {"image": -image}
    end = base[-1].frames.stop
    if bench.runner.controller() and any((c.at_frame or 0) < end for c in bench.runner.commands()):
        others["commands"] = {"steered": False}
    ignored = [what for what, start in others.items() if same_bits(bench.roll(**start), base)]
    if ignored:
        raise Note(
            f"the latents and frames do not depend on the {' nor on the '.join(ignored)}: another "
            "value gives the same bits."
        )
    tried = ", ".join(others)
    return f"the latents depend on: {tried}" if tried else "there is no prompt, image or command"


def check_interleaving(bench: Bench, base: list[Chunk]) -> str:
    """Two interleaved rollouts equal the same rollouts run alone.

    Raises:
        Problem: from which AR step on they differ.
    """
    alone = bench.roll(seed=1)
    sessions = (bench.begin(0), bench.begin(1))
    turns: tuple[list[Chunk], list[Chunk]] = ([], [])
    for _ in range(bench.steps):
        for session, chunks in zip(sessions, turns, strict=True):
            chunks.append(bench.step(session))
    for chunks, expected in zip(turns, (base, alone), strict=True):
        if not same_bits(chunks, expected):
            raise Problem(
                "two interleaved rollouts on one pipeline differ from rollouts run alone, "
                f"{first_difference(chunks, expected)}. Some rollout state is kept on a "
                "module, in a default argument or in a global: keep it in what initialize_cache "
                "returns."
            )
    return f"{bench.steps} AR steps of two interleaved rollouts"


def check_chunk_split(bench: Bench) -> str:
    """A streaming decoder gives the same frames for few or many parts.

    Raises:
        Problem: the largest difference.
        Note: there is no streaming decoder.
    """
    decoder = bench.pipeline.decoder
    if not isinstance(decoder, StreamingDecoder):
        return "the decoder has no state: every chunk is decoded separately"
    shape = list(bench.transformer.latent_shape(1))
    shape[2] = 4 * max(1, shape[2])
    latent = torch.randn(shape, **PLAIN, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    session = bench.begin()
    context = session.cache.context
    decoded = {}
    for part in (shape[2], shape[2] // 4, shape[2] // 2, 1):
        cache = new_state(decoder, context)
        with torch.no_grad():
            pieces = [
                decoder(piece, autoregressive_index=index, cache=cache)
                for index, piece in enumerate(latent.split(part, dim=2))
            ]
        decoded[part] = torch.cat(pieces, dim=1)
    whole = decoded[shape[2]]
    for part, frames in decoded.items():
        if frames.shape != whole.shape:
            raise Problem(
                f"{shape[2]} latent frames decode to {whole.shape[1]} frames at once and to "
                f"{frames.shape[1]} in parts of {part}. A streaming decoder keeps the trailing "
                "frames of its causal layers in its cache, so that the parts match."
            )
        error = float((frames - whole).abs().max())
        if not error <= SPLIT_ERROR:
            raise Problem(
                f"{shape[2]} latent frames decoded in parts of {part} differ by {error:.1e} from a "
                "decode at once: there are seams between chunks. Keep in the cache what the next "
                "chunk's first frames depend on, and count frames there, not chunks."
            )
    return f"{shape[2]} latent frames at once and in parts of {', '.join(map(str, decoded))}"


def check_snapshot(bench: Bench, base: list[Chunk]) -> str:
    """A rollout that is saved half-way, loaded and cloned continues with the same bits.

    Raises:
        Problem: what is lost.
        Note: the state declares no styles, so that it cannot be saved.
    """
    half = bench.steps // 2
    session = bench.begin()
    for _ in range(half):
        bench.step(session)
    try:
        state = session.cache.state_dict()
        copy = session.cache.clone()
    except StateError as error:
        raise Note(f"rollouts run, but cannot be saved, forked or resumed. {error}") from error
    loaded = bench.pipeline.load_cache(state, controller=session.controller)
    for cache, how in ((loaded, "saved and loaded"), (copy, "cloned")):
        other = bench.begin()
        other.cache = cache
        found = [bench.step(other) for _ in range(half, bench.steps)]
        expected = base[half:]
        if not same_bits(found, expected):
            raise Problem(
                f"a rollout that is {how} after {half} AR steps continues differently, "
                f"{first_difference(found, expected)} of the rest. Some state is not in the fields "
                'of what initialize_cache returns, or is declared "rebuilt" and is not rebuilt by '
                "begin_step."
            )
    if not half:
        return "saved and loaded before its only AR step"
    return f"saved, loaded and cloned after {half} AR steps, then {bench.steps - half} more"


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check_default_dtype(subject: Subject, bench: Bench, base: list[Chunk]) -> str:
    """The calling program may have set torch's default dtype.

    Raises:
        Problem: where the rollout differs.
    """
    for dtype in (torch.float64, torch.bfloat16):
        with _default_dtype(dtype):
            try:
                found = bench.roll()
            except Exception as error:
                raise Problem(
                    f"under torch.set_default_dtype({dtype}) a rollout fails with "
                    f"{describe_error(error)}. {_SAY_DTYPE}"
                ) from error
        if not same_bits(found, base):
            raise Problem(
                f"under torch.set_default_dtype({dtype}) the rollout differs by "
                f"{relative_error(found, base):.1e} {first_difference(found, base)}. {_SAY_DTYPE}"
            )
    return "the same bits with float64 and bfloat16 as default dtype"


def check_bfloat16(subject: Subject) -> str:
    """The transformer runs in bfloat16, as on a GPU; everything else is in float32.

    Raises:
        Problem: it fails, or its latents are not finite float32.
        Note: the same for a method that is registered in float32.
    """
    typed = subject.full.pipeline.diffusion_model.transformer.dtype
    try:
        bench = subject.in_dtype("bfloat16").open()
        chunks = bench.roll(steps=min(2, bench.steps))
    except Exception as error:
        text = (
            f"in bfloat16 a rollout fails with {describe_error(error)}. Make tensors in the type "
            "of their operands (dtype=x.dtype, .to(self.dtype)), and cast once after what needs "
            "float32."
        )
        raise (Note if typed == "float32" else Problem)(text) from error
    for chunk in chunks:
        if chunk.latent is None or chunk.latent.dtype != torch.float32:
            raise Problem("in bfloat16 the latent is not float32; return .float() in predict_flow.")
    return f"{len(chunks)} AR steps"


_SAY_DTYPE = (
    "Pass dtype= where tensors are made (torch.arange, linspace, zeros, tensor, full), and divide "
    "integers only after .float()."
)


def check_large_noise(bench: Bench) -> str:
    """Large values do not become NaN.

    Raises:
        Note: they do.
    """
    session = bench.begin()
    drawn = session.cache.diffusion.noise
    session.cache.diffusion.noise = lambda *where: LARGE * drawn(*where)
    try:
        chunk = bench.step(session)
        finite = chunk.latent is None or bool(chunk.latent.isfinite().all())
        text = "latents that are not finite" if not finite else ""
    except (ValueError, FloatingPointError) as error:
        text = describe_error(error)
    if text:
        raise Note(
            f"noise {LARGE:g} times as large as usual gives {text}. Latents of a long rollout "
            "may grow: keep exp, powers and divisions in range (norms, clamp, softmax)."
        )
    return f"noise {LARGE:g} times as large gives finite latents"


def check_bad_input(bench: Bench, base: list[Chunk]) -> str:
    """NaN stays in its rollout, and invalid input is refused with a clear message.

    Raises:
        Problem: what was accepted.
        Note: an input that causes an error of torch instead of a clear message.
    """
    _check_nan_stays(bench, base)
    conditions = bench.conditions()
    _expect_refusal(
        lambda: bench.pipeline.initialize_cache(**{**conditions, "txet": ["a"]}),
        "an unknown keyword of initialize_cache",
    )
    if bench.pipeline.encoder is None:
        session = bench.begin()
        _expect_refusal(
            lambda: bench.pipeline.generate(0, session.cache, torch.zeros(1, **PLAIN)),
            "a control input for a method that takes none",
        )
        return "NaN does not outlive its rollout; unknown context and control are refused"
    unclear = []
    for value, what in (
        (object(), "an object()"),
        (torch.zeros(0, 3, **PLAIN), "an empty tensor [0, 3]"),
    ):
        session = bench.begin()
        text = _refusal(lambda s=session, v=value: bench.pipeline.generate(0, s.cache, v))
        if text is None:
            raise Problem(
                f"{what} as control input is accepted. Check its type and shape in the encoder's "
                "forward and raise a ValueError that says what is allowed."
            )
        if not text.startswith(("ValueError", "TypeError")):
            unclear.append(f"{what} ends in {text}")
    if unclear:
        raise Note(
            f"as control input {'; '.join(unclear)}. Check type and shape in the encoder's forward "
            "and raise a ValueError that says what is allowed."
        )
    return "NaN does not outlive its rollout; unknown context and wrong control are refused"


def _check_nan_stays(bench: Bench, base: list[Chunk]) -> None:
    session = bench.begin()

    def noise(index: int, step: int, shape: Any) -> Tensor:
        return torch.full(tuple(shape), float("nan"), **PLAIN)

    session.cache.diffusion.noise = noise
    with contextlib.suppress(ValueError, FloatingPointError):  # refusing it is fine, too
        for _ in range(min(2, bench.steps)):
            bench.step(session)
    after = bench.roll()
    if not same_bits(after, base):
        raise Problem(
            "after a rollout with NaN in its noise, the next rollout differs "
            f"{first_difference(after, base)}. A computed value stays on a module."
        )


def _refusal(call: Any) -> str | None:
    try:
        call()
    except Exception as error:
        return describe_error(error)
    return None


def _expect_refusal(call: Any, what: str) -> None:
    text = _refusal(call)
    if text is None:
        raise Problem(f"{what} is accepted. Name context in the signature of initialize_cache.")
    if not text.startswith(("ValueError", "TypeError")):
        raise Problem(f"{what} causes {text} instead of a ValueError that says what is allowed.")
