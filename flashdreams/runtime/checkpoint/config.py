"""Where a component's weights are and how their names are read: plain data."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from flashdreams.infra.config import quoted

WRAPPER_MARKERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""Name parts that training wrappers leave behind in saved tensor names."""


class CheckpointError(RuntimeError):
    """Weights are missing, damaged, refused or do not fit; names file, reason and remedy.

    Fields of the `CheckpointConfig` are named as ``checkpoint.source``; callers that know
    the option of a field insert it.
    """

    checkpoint: "CheckpointConfig | None" = None
    """The one that could not be read, if known."""


class MissingWeightsError(CheckpointError):
    """Weights are not on this machine, and could not or may not be downloaded."""


@contextmanager
def concerning(checkpoint: "CheckpointConfig") -> Iterator[None]:
    """Attach the checkpoint to a `CheckpointError` of the ``with`` block."""
    try:
        yield
    except CheckpointError as error:
        error.checkpoint = error.checkpoint or checkpoint
        raise


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """One checkpoint: its location, and the mapping of its tensor names to the module's.

    The rules apply in this order: ``select``, ``drop``, ``strip_prefixes``, ``rename``, ``ignore``.
    """

    source: str
    """A local file or folder, ``package:some.package/weights/x.safetensors`` (data of an installed
    package), a Hugging Face repository as ``hf://org/repo`` or ``org/repo``, or the ``https://``
    URL of one file together with its ``sha256``, which a URL that contains a commit may
    lack."""

    file: str | None = None
    """File, or ``...index.json`` of a sharded checkpoint, inside the repository or folder;
    ``None``: the only checkpoint found there."""

    revision: str | None = None
    """Branch, tag or commit of the repository; ``None``: ``main``. Local sources have none."""

    sha256: str | None = None
    """Checksum of the file at an ``https://`` address, 64 hex digits; a download that differs is
    thrown away. Other sources have none."""

    download: bool = False
    """Download weights that are not in the local cache; if off, their absence is an error that says
    how to get them."""

    select: tuple[str, ...] = ()
    """For ``.pt`` and ``.pth``: names of the sub-dictionary to take, the first that is there;
    a flat file is taken as it is."""

    strip_prefixes: tuple[str, ...] = ()
    """Prefixes of tensor names to drop; for each name, the first that matches, once."""

    drop: tuple[str, ...] = WRAPPER_MARKERS
    """Parts to drop wherever they occur in a tensor name."""

    rename: tuple[tuple[str, str], ...] = ()
    """Pairs of regular expression and replacement, applied in order to every tensor name."""

    ignore: tuple[str, ...] = ()
    """Regular expressions of tensor names (after renaming, matched at the start) that the file
    contains and the module does not need."""

    size_bytes: int | None = None
    """Size on disk in bytes, for the message about missing weights; ``None``: not stated."""

    license: str | None = None
    """Licence of the weights, for the same message; ``None``: not stated."""

    def __post_init__(self) -> None:
        # It becomes a path in the cache of downloads.
        revision = self.revision or "main"
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", revision) or ".." in revision:
            raise CheckpointError(
                f"checkpoint {self.source}: revision {quoted(revision)} must be a branch, tag or "
                "commit"
            )
        unknown = self.sha256 is None and self.commit is not None
        if self.is_address and not unknown and not re.fullmatch("[0-9a-f]{64}", self.sha256 or ""):
            raise CheckpointError(
                f"checkpoint {self.source}: a file on the web may change, so its sha256 is needed, "
                f"64 hex digits; got {self.sha256!r}"
            )

        for pattern, replacement in (*self.rename, *((ignored, "") for ignored in self.ignore)):
            try:
                re.sub(pattern, replacement, "")
            except (re.error, IndexError) as error:
                raise CheckpointError(
                    f"checkpoint {self.source}: {quoted(pattern)} with the replacement "
                    f"{quoted(replacement)} is not a regular expression: {error}"
                ) from error

    @property
    def commit(self) -> str | None:
        """The commit in a URL, which fixes the file's content."""
        named = re.search("/([0-9a-f]{40})/", self.source) if self.is_address else None
        return None if named is None else named[1]

    @property
    def is_address(self) -> bool:
        """Whether the source is a single file on the web."""
        return self.source.startswith("https://")


LORA_SELECT = ("generator_lora", "lora", "state_dict")
"""Sub-dictionaries of a ``.pt`` file of LoRA tensors; the first that is there."""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """One file of low-rank updates and its weight."""

    checkpoint: CheckpointConfig
    """Its location; of the rules for names, only ``select`` and ``ignore`` apply."""

    weight: float = 1.0
    """Factor on all of its updates."""

    part: str = ""
    """What the names of the part of the module that it is for begin with, such as
    ``low_noise.``; empty for the whole module."""


def parse_lora(text: str, *, download: bool = False, part: str = "") -> LoRA:
    """Read ``SOURCE`` or ``SOURCE:WEIGHT``.

    Args:
        text: source as `CheckpointConfig.source`; of a repository ``hf://org/repo/file``.
        download: whether it may be downloaded.
        part: as of `LoRA`.

    Raises:
        ValueError: no source, a repository without a file, or a weight that is not a number.
    """
    source, _, last = text.rpartition(":")
    if not source or "/" in last or last.endswith((".pt", ".pth", ".safetensors")):
        source, last = text, "1"
    try:
        weight = float(last)
    except ValueError:
        weight = math.nan
    if not source or not math.isfinite(weight):
        raise ValueError(
            f"LoRA {text!r} should read SOURCE or SOURCE:WEIGHT, such as style.safetensors:0.8"
        )
    if source.startswith("hf://") and source.count("/") < 4:
        raise ValueError(f"LoRA {text!r}: name its file: hf://org/repo/file.safetensors")
    checkpoint = CheckpointConfig(source=source, select=LORA_SELECT, download=download)
    return LoRA(checkpoint=checkpoint, weight=weight, part=part)
