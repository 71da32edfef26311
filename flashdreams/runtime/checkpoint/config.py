"""Where a component's weights are and how their names are read: plain data."""

import re
from dataclasses import dataclass

WRAPPER_MARKERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""Name parts that training wrappers leave behind in saved tensor names."""


class CheckpointError(RuntimeError):
    """Weights are missing, damaged, refused or do not fit: says which file, why, what to type.

    Fields of the `CheckpointConfig` are named as ``checkpoint.source``; whoever knows the option of
    a field on the command line puts that in.
    """

    checkpoint: "CheckpointConfig | None" = None
    """The one that could not be read, where that is known."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """One checkpoint: its place, and the rules from its tensor names to the module's.

    The rules apply in this order: ``select``, ``drop``, ``strip_prefixes``, ``rename``, ``ignore``.
    """

    source: str
    """A local file or folder, ``package:some.package/weights/x.safetensors`` (data of an installed
    package), a Hugging Face repository as ``hf://org/repo`` or ``org/repo``, or the ``https://``
    address of one file together with its ``sha256``."""

    file: str | None = None
    """File, or ``...index.json`` of a sharded checkpoint, inside the repository or folder;
    ``None``: the only checkpoint found there."""

    revision: str | None = None
    """Branch, tag or commit of the repository; ``None``: ``main``. Local sources have none."""

    sha256: str | None = None
    """Checksum of the file at an ``https://`` address, 64 hex digits; a download that differs is
    thrown away. Other sources have none."""

    download: bool = False
    """Fetch weights that are not in the local cache; if off, their absence is an error that says
    how to get them."""

    select: tuple[str, ...] = ()
    """For ``.pt`` and ``.pth``: names of the sub-dictionary to take, the first that is there;
    a flat file is taken as it is."""

    strip_prefixes: tuple[str, ...] = ()
    """Leading parts of tensor names to drop; of each name, the first that matches, once."""

    drop: tuple[str, ...] = WRAPPER_MARKERS
    """Parts to drop wherever they occur in a tensor name."""

    rename: tuple[tuple[str, str], ...] = ()
    """Pairs of regular expression and replacement, applied in order to every tensor name."""

    ignore: tuple[str, ...] = ()
    """Regular expressions of tensor names (after renaming, matched at the start) that the file
    holds and the module does not want."""

    size_bytes: int | None = None
    """Size on disk in bytes, for the message about missing weights; ``None``: not stated."""

    license: str | None = None
    """Licence of the weights, for the same message; ``None``: not stated."""

    def __post_init__(self) -> None:
        if self.is_address and not re.fullmatch("[0-9a-f]{64}", self.sha256 or ""):
            raise CheckpointError(
                f"checkpoint {self.source}: a file on the web may change, so its sha256 is needed, "
                f"64 hex digits; got {self.sha256!r}"
            )

    @property
    def is_address(self) -> bool:
        """Whether the source is a single file on the web."""
        return self.source.startswith("https://")
