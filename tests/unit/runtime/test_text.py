"""What files hold, in messages."""

import io
import os
import sys
import threading
import time

import pytest

from flashdreams.infra.config import check_slug
from flashdreams.infra.prompt import MAX_PROMPT_CHARACTERS, read_prompt
from flashdreams.models.prompts import check_prompts
from flashdreams.runtime import text as text_module
from flashdreams.runtime.actions import parse_actions
from flashdreams.runtime.text import (
    check_regular,
    printable,
    quoted,
    read_text,
    reason_of,
    shown,
    tell,
)


def test_control_characters_do_not_reach_a_terminal() -> None:
    hostile = "\x1b]0;owned\x07\x1b[2J\r\u202e\x9b"
    for text in (printable(hostile), quoted(hostile), shown(hostile)):
        assert text.isprintable() and "owned" in text
    assert printable("Füchse, 狐\nzweite Zeile") == "Füchse, 狐\nzweite Zeile"


def test_long_texts_are_cut() -> None:
    assert len(printable("a" * 10**6)) <= 4000
    assert printable("begin" + "a" * 10**6 + "end").endswith("aend")
    for value in ("a" * 10**6, [1] * 10**6, {"a": ["b" * 10**6] * 20}, (("x",) * 99,) * 99):
        assert len(quoted(value)) < 4000
    assert len(shown("a" * 10**6)) < 300 and shown("blocks.0.norm-1") == "blocks.0.norm-1"


def test_the_reason_of_an_error_does_not_name_its_file_again() -> None:
    with pytest.raises(OSError) as found:
        os.stat("/nowhere/t.txt")
    assert reason_of(found.value) == "No such file or directory"
    assert reason_of(OSError("short read")) == "short read", "an error without a number"
    assert reason_of(ValueError("it is larger")) == "it is larger"


def test_a_file_is_read_up_to_a_limit(tmp_path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("é" * 10)
    assert read_text(path, 20) == "é" * 10
    with pytest.raises(ValueError, match="larger than 19 bytes"):
        read_text(path, 19)
    with pytest.raises(ValueError, match="larger than 1000 bytes"):
        read_text(type(path)("/dev/zero"), 1000)


def test_a_pipe_is_waited_for_but_not_for_ever(tmp_path, monkeypatch) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=("words",))
    writer.start()
    assert read_text(path, 100) == "words"
    writer.join()
    monkeypatch.setattr(text_module, "PIPE_S", 0.05)
    with pytest.raises(ValueError, match="pipe that was not closed within"):
        read_text(path, 100)
    with pytest.raises(ValueError, match="not a regular file"):
        check_regular(path)


def test_talk_that_nobody_takes_is_no_error(monkeypatch) -> None:
    narrow = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    tell("written: 日本/\udcff/\x1b[2J")
    assert narrow.buffer.getvalue() == b"written: \\u65e5\\u672c/\\udcff/\\x1b[2J\n"
    narrow.close()
    tell("to a stream that is closed")


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "a/b", "a\\b", ".x", "-x", "", "a" * 101, "a\n", "a\0", "a b", "é", 3, None],
)
def test_no_slug_is_a_path(name) -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        check_slug(name)
    check_slug("wan2.1-t2v_1.3b+x")


def test_prompts_have_a_bound(tmp_path) -> None:
    long = "a" * (MAX_PROMPT_CHARACTERS + 1)
    path = tmp_path / "p.txt"
    for content in (long, "é" * 10**6):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"--prompt-path .*p\.txt cannot be read") as caught:
            read_prompt("", path)
        assert len(str(caught.value)) < 300
    with pytest.raises(ValueError, match="--prompt has 20001 characters"):
        read_prompt(long, None)
    with pytest.raises(ValueError, match="prompt 1 has 20001 characters"):
        check_prompts(["a", long])
    path.write_text(long[1:])
    assert read_prompt("", path) == long[1:]


@pytest.mark.parametrize("text", ["w" * 399_999 + "?", "w" + "9" * 399_998, "w " * 10**6])
def test_actions_have_a_bound(text) -> None:
    begin = time.process_time()
    with pytest.raises(ValueError) as caught:
        parse_actions(text)
    assert len(str(caught.value)) < 800 and time.process_time() - begin < 5


def test_what_is_printed_stays_short_also_where_every_character_is_escaped() -> None:
    assert len(printable("\U000e0001\udcff" * 100_000)) <= 4000
    assert printable("\x1b" * 9) == r"\x1b" * 9
