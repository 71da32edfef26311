"""Local files of a checkpoint, and their download."""

import importlib.util
import json
import os
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from flashdreams.infra.config import quoted
from flashdreams.runtime.checkpoint.config import (
    CheckpointConfig,
    CheckpointError,
    MissingWeightsError,
)
from flashdreams.runtime.text import read_text, reason_of, shown

_REPOSITORY = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth")
_INDEX_SUFFIX = ".index.json"
_SHARD = re.compile(r"[A-Za-z0-9][\w.-]{0,200}", re.ASCII)

MAX_INDEX_BYTES = 2**24
"""Largest index of a sharded checkpoint: some 150,000 tensors."""
MAX_SHARDS = 2000
"""Most files that an index may name."""


@dataclass(frozen=True, kw_only=True)
class LocalCheckpoint:
    """Files of one checkpoint that are all on this machine."""

    files: tuple[Path, ...]
    """One file, or the shards in the order of their names."""

    tensor_files: dict[str, Path] | None = None
    """Tensor name to shard, from the index; ``None``: not sharded."""


def ensure_local(
    config: CheckpointConfig, *, allow_download: bool | None = None
) -> LocalCheckpoint:
    """Find the checkpoint on this machine, or download it if that is allowed.

    Downloads go to the Hugging Face cache, resume where an earlier one stopped and show a progress
    bar; a single file of an ``https://`` address goes to the folder of ``torch.hub``. Several
    processes on one node should take turns: let one run first, then the others find the files in
    place.

    Args:
        config: the checkpoint.
        allow_download: whether it may be downloaded; ``None``: ``config.download``.

    Raises:
        MissingWeightsError: missing and not to be downloaded, or the download failed.
        CheckpointError: an existing file is not a checkpoint.
    """
    local = find_local(config)
    if local is not None:
        return local
    allowed = config.download if allow_download is None else allow_download
    target = _repository(config)
    if not allowed or not can_download(config):
        raise MissingWeightsError(describe_missing(config))
    _refuse_download(config)
    if target is None:
        _download_address(config)
    else:
        _download(config, *target)
    local = find_local(config)
    if local is None:
        raise MissingWeightsError(
            f"{_title(config)}: the download ended but files are still missing in the cache. "
            f"Try: {_fetch_command(config, target)}"
        )
    return local


def find_local(config: CheckpointConfig) -> LocalCheckpoint | None:
    """Find the checkpoint without any network access.

    Returns:
        Its files; ``None`` if it, or one shard of it, is not on this machine.

    Raises:
        CheckpointError: a local index is damaged or names a missing shard; several files fit; or
            a folder may not be searched.
    """
    try:
        return _find_local(config)
    except OSError as error:
        place = error.filename or _title(config)
        raise CheckpointError(f"{place} cannot be read: {reason_of(error)}") from error


def _find_local(config: CheckpointConfig) -> LocalCheckpoint | None:
    if config.is_address:
        fetched = cached_file(config)
        return LocalCheckpoint(files=(fetched,)) if fetched.is_file() else None
    target = _repository(config)
    if target is None:
        path = _local_path(config)
        return None if path is None else _local_files(path)
    repo, file = target
    path = _cached(repo, file, config.revision)
    if path is None or not file.endswith(_INDEX_SUFFIX):
        return None if path is None else LocalCheckpoint(files=(path,))
    tensor_files, folder = _read_index(path), PurePosixPath(file).parent
    shards: dict[str, Path] = {}
    for name in set(tensor_files.values()):
        shard = _cached(repo, str(folder / name), config.revision)
        if shard is None:
            return None
        shards[name] = shard
    return _sharded(tensor_files, shards)


def can_download(config: CheckpointConfig) -> bool:
    """Whether a checkpoint has a place on the web; a path or a file of a package has none.

    Raises:
        CheckpointError: a repository without a file, or a damaged address.
    """
    return config.is_address or _repository(config) is not None


def describe_missing(config: CheckpointConfig, *, flag: str | None = None) -> str:
    """Describe a missing checkpoint and how to get it.

    Args:
        config: the checkpoint.
        flag: the command line option that allows the download, such as
            ``--pipeline.decoder.checkpoint.download``; ``None``: a generic one.

    Returns:
        Two or three lines: repository, file, size and licence if known, and commands.
    """
    target = _repository(config)
    facts = []
    if config.size_bytes is not None:
        facts.append(f"{describe_size(config.size_bytes)} on disk")
    if config.license is not None:
        facts.append(f"licence: {config.license}")
    extra = f" ({', '.join(facts)})" if facts else ""
    if config.is_address:
        place = f"{config.source}{extra}; looked for {cached_file(config)}."
    elif target is None:
        wanted = f", file {config.file}" if config.file else ""
        return (
            f"Not on this machine: {config.source}{wanted}{extra}.\n"
            "Name an existing file or folder, hf://org/repo or package:some.package/file "
            "with checkpoint.source."
        )
    else:
        repo, file = target
        from huggingface_hub import constants

        place = (
            f"{repo}, file {file}, revision {config.revision or 'main'}{extra}; "
            f"looked in the Hugging Face cache {constants.HF_HUB_CACHE}."
        )
    return (
        f"Not on this machine: {place}\n"
        f"Download it with: {_fetch_command(config, target)}\n"
        f"or let this program do it: {f'{flag} True' if flag else 'set checkpoint.download=True'}"
    )


def describe_size(count: int) -> str:
    """A size in bytes, as text."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _title(config: CheckpointConfig) -> str:
    return f"{config.source} {config.file}" if config.file else config.source


def _repository(config: CheckpointConfig) -> tuple[str, str] | None:
    """Split a Hugging Face source into repository and file; ``None`` for every other source."""
    source, file = config.source, config.file
    if source.startswith("hf://"):
        parts = source.removeprefix("hf://").split("/")
        if len(parts) < 2 or not _REPOSITORY.match("/".join(parts[:2])):
            raise CheckpointError(f"checkpoint source {source!r} should read hf://org/repo")
        source, inside = "/".join(parts[:2]), "/".join(parts[2:])
        file = "/".join(part for part in (inside, file) if part) or None
    elif (
        source.startswith(("package:", "https://"))
        or source.endswith(_WEIGHT_SUFFIXES)
        or not _REPOSITORY.match(source)
        or _expanded(source).exists()
    ):
        return None
    if file is None:
        raise CheckpointError(
            f"checkpoint {config.source} is a Hugging Face repository: name its file with "
            "checkpoint.file, such as diffusion_pytorch_model.safetensors"
        )
    if ".." in file.split("/") or file.startswith("/"):
        raise CheckpointError(f"checkpoint {source}: {quoted(file)} is not inside the repository")
    return source, file


def _fetch_command(config: CheckpointConfig, target: tuple[str, str] | None) -> str:
    """What to type to fetch the file; the page of an HTTP error does not take its place."""
    if target is None:
        saved = str(cached_file(config))
        return shlex.join(["curl", "--create-dirs", "-fLo", saved, config.source])
    repo, file = target
    revision = ["--revision", config.revision] if config.revision else []
    names = [file]
    if file.endswith(_INDEX_SUFFIX):
        names = ["--include", file.removesuffix(_INDEX_SUFFIX).removesuffix(".safetensors") + "*"]
    return shlex.join(["hf", "download", repo, *names, *revision])


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


def _cached(repo: str, file: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file, revision=revision)
    if not isinstance(found, str):
        return None
    path = Path(found)
    return path if path.exists() else None


def _local_path(config: CheckpointConfig) -> Path | None:
    """Resolve a local or package source to an existing file; ``None`` if it does not exist.

    Raises:
        CheckpointError: it exists and is neither a file nor a folder with a checkpoint.
    """
    if config.source.startswith("package:"):
        package, _, inside = config.source.removeprefix("package:").partition("/")
        path = _package_folder(config, package) / inside
    else:
        path = _expanded(config.source)
    if path.is_file():
        return path
    if path.is_dir():
        return _inside_folder(path, config.file)
    if path.exists():
        raise CheckpointError(
            f"{path} is not a regular file; name another one by checkpoint.source"
        )
    return None


def _package_folder(config: CheckpointConfig, package: str) -> Path:
    """The folder of an installed package, which is not imported: a config file may name any."""
    top, *rest = package.split(".")
    try:
        spec = importlib.util.find_spec(top) if top else None
    except (ImportError, ValueError):
        spec = None
    folders = (spec.submodule_search_locations if spec is not None else None) or ()
    for folder in folders:
        path = Path(folder).joinpath(*rest)
        if path.is_dir():
            return path
    raise CheckpointError(
        f"checkpoint {config.source}: no package {quoted(package)} is installed, unpacked on disk"
    )


def _expanded(source: str) -> Path:
    """A local path with ``~`` resolved; unchanged where there is no such home."""
    try:
        return Path(source).expanduser()
    except RuntimeError:
        return Path(source)


def _inside_folder(folder: Path, file: str | None) -> Path:
    if file is not None:
        for candidate in (folder / file, folder / Path(file).name):
            if candidate.is_file():
                return candidate
    patterns = ("*" + _INDEX_SUFFIX, "*.safetensors", "*.pt", "*.pth")
    for pattern in () if file is not None else patterns:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found[:10])
            raise CheckpointError(
                f"checkpoint folder {folder} holds {len(found)} candidates: {names}. "
                "Choose one with checkpoint.file"
            )
        if found:
            return found[0]
    held = ", ".join(sorted(shown(path.name) for path in folder.iterdir())[:10]) or "nothing"
    raise CheckpointError(
        f"checkpoint folder {folder} has no {file or ' or '.join(patterns)}; it has: {held}. Name "
        "a file, or the folder of one network, with checkpoint.source"
    )


def _local_files(path: Path) -> LocalCheckpoint:
    if not path.name.endswith(_INDEX_SUFFIX):
        return LocalCheckpoint(files=(path,))
    tensor_files = _read_index(path)
    names = sorted(set(tensor_files.values()))
    absent = [name for name in names if not (path.parent / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{path}: the index names {len(names)} shards and {len(absent)} of them are missing: "
            f"{', '.join(absent[:10])}. Put them beside the index, or download the checkpoint again"
        )
    return _sharded(tensor_files, {name: path.parent / name for name in names})


def _sharded(tensor_files: dict[str, str], shards: dict[str, Path]) -> LocalCheckpoint:
    return LocalCheckpoint(
        files=tuple(shards[name] for name in sorted(shards)),
        tensor_files={tensor: shards[name] for tensor, name in tensor_files.items()},
    )


def _read_index(path: Path) -> dict[str, str]:
    """Read a shard index: tensor name to the name of a file in the same folder."""
    try:
        weight_map = json.loads(read_text(path, MAX_INDEX_BYTES))["weight_map"]
        names = set(weight_map.values())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason_of(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a shard index: it should be JSON with an object 'weight_map' "
            "(tensor name to file). Download it again"
        ) from error
    # The names become paths, and patterns of what a download fetches.
    strange = [n for n in names if not isinstance(n, str) or not _SHARD.fullmatch(n)]
    if strange or not names:
        raise CheckpointError(
            f"{path}: the index should name files in its own folder, found "
            f"{', '.join(map(quoted, strange[:3])) or 'none'}"
        )
    if len(names) > MAX_SHARDS:
        raise CheckpointError(f"{path} names {len(names)} files; at most {MAX_SHARDS} are read")
    return weight_map


def _refuse_download(config: CheckpointConfig) -> None:
    """Say so where downloads are off or the disk is too small."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        by_hand = "\n".join(describe_missing(config).splitlines()[:2])
        raise MissingWeightsError(
            f"{by_hand}\n"
            "The download is off: HF_HUB_OFFLINE is set. Unset it, or download the file elsewhere"
        )
    if config.is_address:
        _check_disk(config, cached_file(config), "TORCH_HOME")
    else:
        _check_disk(config, Path(constants.HF_HUB_CACHE), "HF_HOME")


def _download_address(config: CheckpointConfig) -> None:
    """Download the file, compare its checksum and move it into place; never a partial file."""
    import torch

    path = cached_file(config)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(config.source, str(path), hash_prefix=config.sha256)
    except (OSError, RuntimeError) as error:
        raise MissingWeightsError(
            f"Could not download {config.source}: {str(error).splitlines()[0]}. Without a network, "
            f"download it elsewhere: {_fetch_command(config, None)}; then name the file with "
            "checkpoint.source"
        ) from error


def _download(config: CheckpointConfig, repo: str, file: str) -> None:
    import huggingface_hub

    try:
        path = huggingface_hub.hf_hub_download(repo, file, revision=config.revision)
        if file.endswith(_INDEX_SUFFIX):
            folder = PurePosixPath(file).parent
            shards = sorted({str(folder / name) for name in _read_index(Path(path)).values()})
            huggingface_hub.snapshot_download(repo, revision=config.revision, allow_patterns=shards)
    except CheckpointError:
        raise
    except Exception as error:
        raise MissingWeightsError(
            f"Could not download {file} of {repo}, revision {config.revision or 'main'}: "
            f"{_reason(error)}. Without a network, download it elsewhere: "
            f"{_fetch_command(config, (repo, file))}; then name the file with checkpoint.source"
        ) from error


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        return "the Hugging Face Hub cannot be reached"
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


def _check_disk(config: CheckpointConfig, cache: Path, variable: str) -> None:
    existing = next(place for place in (cache, *cache.parents) if os.path.exists(place))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise MissingWeightsError(
            f"{_title(config)} cannot be downloaded to {cache}: {existing} is not writable. Set "
            f"{variable} to another folder"
        )
    if config.size_bytes is None:
        return
    free = shutil.disk_usage(existing).free
    if free < config.size_bytes:
        raise MissingWeightsError(
            f"{_title(config)} needs {describe_size(config.size_bytes)} on disk and {existing} has "
            f"{describe_size(free)} left. Free some, or set {variable} to a folder on a larger disk"
        )
