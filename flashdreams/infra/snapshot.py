"""Snapshots: a rollout in a folder of files, saved on some ranks and resumed on others."""

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashdreams.infra.config import quoted
from flashdreams.infra.identity import describe_config, hash_weights
from flashdreams.infra.rollout import Parts, StreamInferencePipelineCache
from flashdreams.infra.snapshot_header import (
    HEADER_NAME,
    SnapshotError,
    SnapshotHeader,
    StoredSlice,
    StoredTensor,
    check_identity,
    read_header,
)
from flashdreams.infra.state import Take, dtype_of
from flashdreams.parallel.environment import (
    from_rank_zero,
    group_rank,
    group_size,
    together,
)
from flashdreams.runtime.checkpoint import CheckpointError
from flashdreams.runtime.files import write_whole
from flashdreams.runtime.parts import (
    Entry,
    PartFile,
    read_part,
    sha256_of_file,
    sync_folder,
    write_part,
)
from flashdreams.runtime.region import (
    Region,
    intersect,
    positions_in,
    region_shape,
    select_region,
)
from flashdreams.runtime.text import reason_of


@dataclass(frozen=True)
class SnapshotReport:
    """Report of a save."""

    path: Path
    bytes: int
    """Total size of all files."""
    seconds: float
    """Time from the first tensor to the final name."""

    def __str__(self) -> str:
        rate = self.bytes / 2**20 / max(self.seconds, 1e-9)
        return f"{self.bytes / 2**20:.1f} MiB in {self.seconds:.2f} s ({rate:.0f} MiB/s)"


def save_snapshot(path: Path, header: SnapshotHeader, parts: Parts) -> SnapshotReport:
    """Write a rollout into a folder that gets its final name when complete; a collective call.

    Each rank writes its part, one tensor at a time; nothing is gathered.

    Args:
        path: of the folder; it must not exist.
        header: on rank zero, without the tensors and parts that the ranks will have written.
        parts: of this rank.

    Raises:
        ValueError: ``path`` exists.
        OSError: a file cannot be written; no partial snapshot remains.
        OtherRankError: the same on another rank.
    """
    start = time.perf_counter()
    folder = from_rank_zero(lambda: _new_folder(path))
    try:
        together(lambda: _write_own(folder, parts), "could not write its part of the snapshot")
        return from_rank_zero(lambda: _finish(folder, path, header, start))
    except BaseException:
        if group_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _new_folder(path: Path) -> Path:
    if path.exists():
        raise ValueError(f"{path} already exists; give the snapshot another name.")
    folder = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    folder.mkdir(parents=True)
    return folder


def remove_unfinished(parent: Path) -> None:
    """Delete the leftovers of killed saves in a folder of snapshots."""
    for folder in parent.glob(".*.tmp") if os.path.isdir(parent) else ():
        shutil.rmtree(folder, ignore_errors=True)


def _write_own(folder: Path, parts: Parts) -> None:
    """Write this rank's part and a description of its content."""
    if not folder.is_dir():
        raise OSError(
            f"rank {group_rank()} does not see {folder}, which rank zero has made: several nodes "
            "need a shared folder."
        )
    owned = {path: part for path, part in parts.items() if part.written is not None}
    entries = [
        Entry(path, region_shape(part.written or ()), part.dtype, part.read_written)
        for path, part in owned.items()
    ]
    file = folder / f"part-{group_rank():05d}.safetensors"
    written = write_part(file, entries)
    listed = {
        path: [
            list(p.shape),
            str(p.dtype)[6:],
            [[r.start, r.stop, r.step] for r in p.written or ()],
        ]
        for path, p in owned.items()
    }
    index = json.dumps({"part": asdict(written), "tensors": listed})
    (folder / f"rank-{group_rank():05d}.json").write_text(index, encoding="utf-8")


def _finish(folder: Path, path: Path, header: SnapshotHeader, start: float) -> SnapshotReport:
    """Merge the ranks' descriptions into one header, and rename the folder."""
    files: list[PartFile] = []
    tensors: dict[str, StoredTensor] = {}
    for index in sorted(folder.glob("rank-*.json")):
        written = json.loads(index.read_bytes())
        files.append(PartFile(**written["part"]))
        for name, (shape, dtype, bounds) in written["tensors"].items():
            found = tensors.get(name, StoredTensor(tuple(shape), dtype, ()))
            own = StoredSlice(files[-1].file, tuple(range(*bound) for bound in bounds))
            if own.region not in [other.region for other in found.slices]:
                tensors[name] = replace(found, slices=(*found.slices, own))
        index.unlink()
    header = replace(header, tensors=tensors, parts=tuple(files))
    with write_whole(folder / HEADER_NAME, sync=True) as file:
        file.write(header.to_bytes())
    sync_folder(folder)
    folder.rename(path)
    sync_folder(path.parent)
    size = sum(entry.stat().st_size for entry in path.iterdir())
    return SnapshotReport(path, size, time.perf_counter() - start)


def open_snapshot(
    folder: Path, config: Any, check: Callable[[Mapping[str, Any]], object]
) -> SnapshotHeader:
    """The header of a snapshot whose files are intact; a collective call.

    The ranks share the work of checking the files.

    Args:
        folder: of the snapshot, seen by all ranks.
        config: of the pipeline that will continue.
        check: raises for values that cannot be used here; called on rank zero, before the tensors
            are looked at.

    Raises:
        SnapshotError: a damaged file, another config or other weights; or what ``check`` raises.
        OtherRankError: the same on another rank.
    """

    def checked() -> SnapshotHeader:
        header = read_header(folder)
        check_identity(header, describe_config(config), hash_weights(config), folder)
        with readable_damage(folder):
            check(header.values)
        return header

    header = from_rank_zero(checked)
    own = header.parts[group_rank() :: group_size()]
    together(lambda: _verify(folder, own), "found a damaged part")
    return header


def _verify(folder: Path, parts: Sequence[PartFile]) -> None:
    for part in parts:
        path = folder / part.file
        if path.exists() and not path.is_file():
            raise SnapshotError(f"{path} is not a file. Use another snapshot.")
        try:
            size = path.stat().st_size
            whole = size == part.bytes and sha256_of_file(path) == part.sha256
        except OSError as error:
            raise SnapshotError(f"{path} cannot be read: {reason_of(error)}.") from error
        if not whole:
            raise SnapshotError(
                f"{path} is damaged: it has {size} of {part.bytes} bytes, or another checksum than "
                f"{HEADER_NAME} states. Use another snapshot."
            )


def read_from(folder: Path, header: SnapshotHeader) -> Take:
    """A reader of regions of the tensors of a snapshot, from the mapped files to the CPU.

    It raises `SnapshotError` for a tensor that the snapshot does not have.
    """
    mapped: dict[str, dict[str, Tensor]] = {}

    def stored_slice(piece: StoredSlice, path: str) -> Tensor:
        if piece.file not in mapped:
            try:
                mapped[piece.file] = read_part(folder / piece.file)
            except CheckpointError as error:
                raise SnapshotError(str(error)) from error
        x = mapped[piece.file].get(path)
        if x is None or tuple(x.shape) != region_shape(piece.region):
            raise SnapshotError(f"{folder / piece.file} does not hold its part of {path}.")
        return x

    def take(path: str, shape: tuple[int, ...], region: Region, dtype: torch.dtype) -> Tensor:
        stored = header.tensors.get(path)
        if stored is None or (stored.shape, dtype_of(stored.dtype)) != (shape, dtype):
            raise SnapshotError(f"The snapshot has no tensor {path} {dtype} {list(shape)}.")
        out = torch.empty(region_shape(region), dtype=dtype, device="cpu")
        for piece in stored.slices:
            shared = intersect(region, piece.region)
            if shared is not None:
                places = positions_in(piece.region, shared)
                theirs = select_region(stored_slice(piece, path), places)
                select_region(out, positions_in(region, shared)).copy_(theirs)
        return out

    return take


def fill_together(cache: StreamInferencePipelineCache, work: Callable[[], None]) -> None:
    """Fill a fresh rollout; if that fails on any rank, it fails on all. A collective call."""
    try:
        together(work, "could not read the snapshot")
    except BaseException:
        with suppress(Exception):
            cache.release()
        raise


@contextmanager
def readable_damage(source: Path | str) -> Iterator[None]:
    """Turn what values that make no sense lead to into one line.

    Args:
        source: what the line calls where the values are from.

    Raises:
        SnapshotError: the line.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError) as error:
        raise SnapshotError(
            f"{source} holds values that make no rollout of this method "
            f"({type(error).__name__}: {quoted(str(error))}). Use another one."
        ) from error
