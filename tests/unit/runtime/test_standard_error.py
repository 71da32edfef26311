"""Messages that nobody takes leave a run as it is."""

import contextlib
import io
import os
import subprocess
import sys

import pytest

from flashdreams.runtime.standard_error import LossyStream, prepare_streams
from flashdreams.runtime.text import say
from tests.full_disk import needs_full_device

SLUG = "self-forcing-tiny-random"


def test_text_is_passed_on():
    stream = io.StringIO()
    lossy = LossyStream(stream)
    assert lossy.write("one") == 3 and stream.getvalue() == "one"
    assert lossy.isatty() is False and lossy.encoding == stream.encoding
    stream.close()
    assert lossy.write("two") == 3
    lossy.flush()


def test_a_message_begins_a_line_beside_a_bar_that_is_open(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", LossyStream(stream))
    say("one")
    sys.stderr.write("\r 5/9")
    say("two")
    assert stream.getvalue() == "one\n\r 5/9\ntwo\n"


def test_characters_that_a_terminal_lacks_are_escaped(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with pytest.raises(UnicodeEncodeError):
        stdout.write("静态")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    prepare_streams()
    print("静态", flush=True)
    assert stdout.buffer.getvalue() == b"\\u9759\\u6001\n"


@needs_full_device
def test_what_a_full_disk_does_not_take_is_dropped():
    told = []
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:  # closing it fails as well
        print("a line", file=LossyStream(full), flush=True)
        with pytest.raises(OSError):  # negative control: the stream itself
            print("a line", file=full, flush=True)
        told.append(full)
    assert told


@needs_full_device
def test_a_full_disk_behind_stderr_leaves_the_exit_code(tmp_path):
    words = [SLUG, "--total-blocks", "2", "--output-dir", str(tmp_path / "out")]
    program = [sys.executable, "-m", "flashdreams.run"]
    with open("/dev/full", "w") as full:
        good = subprocess.run([*program, *words], stdout=subprocess.PIPE, stderr=full, text=True)
        bad = subprocess.run(
            [*program, *words, "--fps", "0"], stdout=subprocess.PIPE, stderr=full, text=True
        )
    assert good.returncode == os.EX_OK and "written:" in good.stdout
    assert bad.returncode == 2  # a failure stays one, though nobody reads why


@pytest.mark.parametrize("program", ["plan", "check", "serve"])
def test_a_reader_that_has_left_is_no_error(program):
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", f"flashdreams.{program}", "--help"]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (os.EX_OK, "")
