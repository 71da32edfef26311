"""Checkpoints that are one file at an address on the web, known by its checksum or commit."""

import shlex
from pathlib import Path, PurePosixPath

from flashdreams.runtime.checkpoint.config import CheckpointConfig, MissingWeightsError


def cached_file(config: CheckpointConfig) -> Path:
    """Where the file of an address is once it is downloaded: the folder of ``torch.hub``.

    The name carries the checksum, or the commit in the address where none is known, so another file
    under the same name is another one here.
    """
    import torch

    name = PurePosixPath(config.source).name
    stem, dot, suffix = name.partition(".")
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return folder / f"{stem}-{(config.sha256 or config.commit or '')[:8]}{dot}{suffix}"


def fetch_command(config: CheckpointConfig) -> str:
    """What to type to fetch the file by hand; the page of an HTTP error does not take its place."""
    return shlex.join(["curl", "--create-dirs", "-fLo", str(cached_file(config)), config.source])


def download_file(config: CheckpointConfig) -> None:
    """Fetch the file, compare its checksum and move it into place; never half a file.

    Raises:
        MissingWeightsError: the address cannot be reached, or holds another file.
    """
    import torch

    path = cached_file(config)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(config.source, str(path), hash_prefix=config.sha256)
    except (OSError, RuntimeError) as error:
        raise MissingWeightsError(
            f"Could not download {config.source}: {str(error).splitlines()[0]}. Without a network, "
            f"fetch it elsewhere: {fetch_command(config)}; then name the file with "
            "checkpoint.source"
        ) from error
