"""Checkpoints that are one file at a URL, identified by its checksum or commit."""

import shlex
from pathlib import Path, PurePosixPath

from flashdreams.runtime.checkpoint.config import CheckpointConfig, MissingWeightsError


def cached_file(config: CheckpointConfig) -> Path:
    """The local path of a downloaded file: in the folder of ``torch.hub``.

    The name contains the checksum or, without one, the commit in the URL, so another file
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
    """Download the file, compare its checksum and move it into place; never a partial file.

    Raises:
        MissingWeightsError: the URL cannot be reached, or has another file.
    """
    import torch

    path = cached_file(config)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(config.source, str(path), hash_prefix=config.sha256)
    except (OSError, RuntimeError) as error:
        raise MissingWeightsError(
            f"Could not download {config.source}: {str(error).splitlines()[0]}. Without a network, "
            f"download it elsewhere: {fetch_command(config)}; then name the file with "
            "checkpoint.source"
        ) from error
