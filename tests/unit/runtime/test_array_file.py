"""Arrays from files of strangers."""

import os
import random
import time
from pathlib import Path

import numpy as np
import pytest

from flashdreams.runtime.array_file import load_array
from flashdreams.runtime.latents import read_latent_parts


def test_numbers_come_back(tmp_path: Path) -> None:
    for number, dtype in enumerate(("<f4", ">f8", "i2", "u1", "?")):
        array = np.arange(6).reshape(2, 3).astype(dtype)
        np.save(tmp_path / f"{number}.npy", array)
        assert np.array_equal(load_array(tmp_path / f"{number}.npy"), array)
    np.save(tmp_path / "f.npy", np.asfortranarray(np.eye(3)))
    assert np.array_equal(load_array(tmp_path / "f.npy"), np.eye(3))


def write(path: Path, header: bytes, data: bytes = b"", version: int = 1) -> Path:
    size = len(header).to_bytes(2 if version == 1 else 4, "little")
    path.write_bytes(b"\x93NUMPY" + bytes([version, 0]) + size + header + data)
    return path


def header(shape: str, descr: str = "'<f8'") -> bytes:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()


@pytest.mark.parametrize(
    "head",
    [
        header("(1000000000000,)"), header("(2, -1)"), header("(99999999999999999999999,)"),
        header("(True,)"), header("(1,) * 3"), header(f"({'1, ' * 3000})"), header("(1,)", "'O'"),
        header("(1,)", "[('a', '<f8')]"), header("(1,)", "'<c16'"), header("(1,)", "'V0'"),
        header("(1,)", "'" + "<f8," * 2000 + "'"), header("1"), header("None"),
        b"(" * 5000, b"-" * 9000 + b"1\n", b"{", b"\xff\n", b"", b"\x00\n", b"{'a'\n", b"9" * 9000,
        b"[" * 9000 + b"]" * 900,
    ],
)  # fmt: skip
@pytest.mark.parametrize("version", [1, 2, 3])
def test_headers_that_promise_something_else_are_refused(tmp_path, head, version) -> None:
    path = write(tmp_path / "a.npy", head, bytes(8), version)
    begin = time.process_time()
    with pytest.raises(ValueError) as caught:
        load_array(path)
    assert time.process_time() - begin < 5 and len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_a_long_header_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npy", b"", version=2)
    with path.open("r+b") as file:
        file.seek(8)
        file.write((2**31).to_bytes(4, "little"))
        file.truncate(2**32)  # sparse
    begin = time.process_time()
    with pytest.raises(ValueError, match=r"not a \.npy file of numbers"):
        load_array(path)
    assert time.process_time() - begin < 1


def test_large_arrays_devices_and_archives_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npy", header("(20000000,)"))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 160_000_000)
    with pytest.raises(ValueError, match="at most 67108864 are read"):
        load_array(path)
    assert load_array(path, most_bytes=None).shape == (20_000_000,)
    np.savez(tmp_path / "b.npz", np.eye(2))
    with pytest.raises(ValueError, match=r"not a \.npy file of numbers"):
        load_array(tmp_path / "b.npz")
    with pytest.raises(ValueError, match="not a regular file"):
        load_array(os.devnull)


def test_damage_anywhere_ends_in_one_line_or_in_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.eye(4))
    whole, refusals = path.read_bytes(), 0
    random.seed(0)
    for at in range(len(whole)):
        turned = bytearray(whole)
        turned[at] ^= 1 << random.randrange(8)
        for content in (whole[:at], bytes(turned), whole[:at] + b"\xff" * 4 + whole[at + 4 :]):
            path.write_bytes(content)
            try:
                load_array(path)
            except ValueError as error:
                refusals += 1
                assert str(error).isprintable() and len(str(error)) < 500
            else:
                assert content != whole[:at]
    assert refusals > len(whole)


def test_no_file_of_latents_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 1, 3, 4, 5), np.float32))
    assert read_latent_parts(tmp_path / "a.npy").shape == (1, 3, 2, 4, 5)
    for array in (np.eye(2, dtype=np.float32), np.zeros((1, 1, 1, 1, 1))):
        np.save(tmp_path / "b.npy", array)
        with pytest.raises(ValueError, match=r"b\.npy is not a file of latents: it holds float"):
            read_latent_parts(tmp_path / "b.npy")
    write(tmp_path / "c.npy", b"{")
    with pytest.raises(ValueError, match=r"c\.npy is not a file of latents"):
        read_latent_parts(tmp_path / "c.npy")
