"""Files with one owner, and what an error about them advises."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashdreams.runtime.files import (
    InUseError,
    open_owned,
    open_partial,
    readable_write_errors,
    write_whole,
)


def test_a_file_has_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with open_owned(path) as file:
        file.write(b"mine")
        file.flush()
        with pytest.raises(InUseError, match="file is being written by another run"):
            open_owned(path)
        assert path.read_bytes() == b"mine", "the refused one has not emptied it"
    with open_owned(path):  # free again, and empty
        assert path.read_bytes() == b""


def test_a_renamed_file_keeps_its_owner_and_frees_its_name(tmp_path: Path) -> None:
    first = open_owned(tmp_path / "partial")
    first.write(b"first")
    first.flush()
    (tmp_path / "partial").rename(tmp_path / "final")
    with open_owned(tmp_path / "partial") as second:
        second.write(b"second")
    assert (tmp_path / "final").read_bytes() == b"first"
    with pytest.raises(InUseError):
        open_owned(tmp_path / "final")
    first.close()


def test_another_process_is_refused_until_the_owner_is_dead(tmp_path: Path) -> None:
    path = tmp_path / "file"
    owner = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from flashdreams.runtime.files import open_owned\n"
        "file = open_owned(Path(sys.argv[1]))\n"
        "print('mine', flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", owner, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "mine\n"
        with pytest.raises(InUseError):
            open_owned(path)
        process.kill()
    open_owned(path).close()


def test_a_second_partial_file_has_names_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    first, *names = open_partial(path, ".partial.mp4")
    assert names == [tmp_path / "clip.partial.mp4", path]
    second, *names = open_partial(path, ".partial.mp4")
    assert names == [tmp_path / "clip.2.partial.mp4", tmp_path / "clip.2.mp4"]
    first.close()
    second.close()


def test_two_that_write_a_whole_file_at_once_do_not_share_a_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "stats.json"
    with write_whole(path) as first, write_whole(path) as second:
        assert first.name != second.name
        first.write(b"first")
        second.write(b"second")
    assert path.read_bytes() == b"first", "the one that ended last"
    assert os.listdir(tmp_path) == ["stats.json"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_space_is_asked_for_only_where_it_is_lacking(tmp_path: Path, code: int) -> None:
    path = tmp_path / "stats.json"
    with pytest.raises(OSError) as caught, readable_write_errors(path, tmp_path / "partial"):
        raise OSError(code, os.strerror(code))
    assert ("Free some space" in str(caught.value)) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert "--output-dir" in str(caught.value)
    with pytest.raises(OSError, match=r"--output-dir\)\.$"), readable_write_errors(path):
        raise OSError(code, os.strerror(code))


def test_the_beginning_of_a_file_can_be_kept(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"one\ntwo\n")
    with open_owned(path, keep=4) as file:
        assert path.read_bytes() == b"one\n"
        file.write(b"2\n")
    assert path.read_bytes() == b"one\n2\n"
    with pytest.raises(OSError, match="was replaced"):
        open_owned(path, keep=7)
    assert path.read_bytes() == b"one\n2\n"
