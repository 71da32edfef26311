"""Tensors written into a file one at a time."""

import hashlib
import weakref

import pytest
import torch

from flashdreams.runtime.parts import SMALL_BYTES, Entry, read_part, write_part

COUNT = 6


@pytest.mark.parametrize("size", [1024, SMALL_BYTES])
def test_host_memory_holds_one_tensor_at_a_time(size, tmp_path):
    alive, most = [], 0

    def read(number):
        nonlocal most
        x = torch.full((size,), float(number))
        alive.append(weakref.ref(x.untyped_storage()))
        most = max(most, sum(storage() is not None for storage in alive))
        return x

    entries = [Entry(f"{n}", (size,), torch.float32, lambda n=n: read(n)) for n in range(COUNT)]
    written = write_part(tmp_path / "part", entries)
    assert most == 1 and len(alive) == COUNT
    assert written.sha256 == hashlib.sha256((tmp_path / "part").read_bytes()).hexdigest()
    found = read_part(tmp_path / "part")
    assert all(bool((found[f"{n}"] == n).all()) for n in range(COUNT))
    kept = [entry.read() for entry in entries]  # negative control: all at once are counted
    assert most == len(kept) == COUNT
