"""Runs with snapshots: a snapshot that fails ends nothing, and the folder has to be shared."""

import errno
import json
import logging

import pytest

from flashdreams.infra import resumable, snapshot
from flashdreams.infra.resumable import MARK_NAME, ResumableRun
from flashdreams.parallel.environment import Launch, OtherRankError
from flashdreams.run import main, read_config

SLUG, STEPS = "self-forcing-tiny-random", 5
ALONE = Launch("", 0)


def run(folder, *words):
    assert main([SLUG, "--total-blocks", f"{STEPS}", "--output-dir", str(folder), *words]) == 0
    stats = json.loads((folder / f"stats_{SLUG}.json").read_text())
    return [record["latent_sha256"] for record in stats["records"]]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_full_disk_ends_the_snapshot_and_not_the_run(failing, tmp_path, monkeypatch, caplog):
    """Of the snapshots before AR steps 2 and 4, the ``failing``-th finds no space."""
    calls, write = [], snapshot.write_part

    def write_part(path, entries):
        calls.append(path)
        if len(calls) == failing:
            path.write_bytes(b"half of a part")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, entries)

    expected = run(tmp_path / "plain")
    monkeypatch.setattr(snapshot, "write_part", write_part)
    with caplog.at_level(logging.WARNING):
        assert run(tmp_path / "out", "--snapshot-every", "2") == expected
    told = [r.getMessage() for r in caplog.records if r.name == resumable.__name__]
    assert len(calls) == 2 and len(told) == 1
    assert told[0].startswith(f"No snapshot before AR step {2 * failing}: ")
    assert "No space left" in told[0] and told[0].endswith("The run continues.")
    (home,) = [p for p in (tmp_path / "out" / f"resume_{SLUG}").iterdir() if p.is_dir()]
    left = [path.name for path in home.iterdir() if path.name != "segments"]
    assert left == [f"step-{6 - 2 * failing:08d}"]  # the other one, and nothing unfinished


def test_a_folder_is_shared_if_the_one_that_rank_zero_makes_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(resumable, "SHARED_FOLDER_S", 0.0)
    ours = ResumableRun(tmp_path / "run", ALONE, every=2, kept=1, resume=False)
    monkeypatch.setattr(resumable, "all_ranks_agree", lambda _: False)
    with pytest.raises(OtherRankError):
        ours._require_shared_folder()
    ours.home.rmdir()  # another node writes elsewhere
    with pytest.raises(ValueError, match=rf"does not see .*{ours.token}, .*--output-dir"):
        ours._require_shared_folder()


def test_a_run_that_does_not_begin_leaves_the_earlier_one_to_be_resumed(tmp_path):
    """A refused command line, such as one with a prompt that is too long, starts nothing."""
    words = (SLUG, "--output-dir", str(tmp_path), "--snapshot-every", "2", "--total-blocks", "9")
    runner = read_config(words).setup()
    steps = runner.stream(9)
    for _ in range(4):
        next(steps)
    runner.abort()  # as of a run that failed; it has a snapshot before AR step 2
    token = runner.resumable.token
    assert main([*words, "--prompt", "word " * 99]) == 2
    folder = tmp_path / f"resume_{SLUG}"
    assert {path.name for path in folder.iterdir()} == {MARK_NAME, token}
    found = ResumableRun(folder, ALONE, every=2, kept=1, resume=True)
    assert found.goes_on and found.token == token
    for every in (2, 0):  # negative control: one that begins replaces its files
        other = ResumableRun(folder, ALONE, every=every, kept=1, resume=False)
        other.begin()
        found = ResumableRun(folder, ALONE, every=2, kept=1, resume=True)
        assert (found.token == other.token, found.goes_on) == (every > 0, every > 0)


def test_a_run_without_snapshots_asks_for_no_shared_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(resumable, "all_ranks_agree", lambda _: False)
    ResumableRun(tmp_path / "run", ALONE, every=0, kept=1, resume=True)
    with pytest.raises(OtherRankError):
        ResumableRun(tmp_path / "run", ALONE, every=1, kept=1, resume=False)


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b"[" * 4000, b" " * 5000])
def test_a_damaged_mark_is_named_and_not_taken_for_no_run(content, tmp_path):
    (tmp_path / MARK_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=f"{MARK_NAME} cannot be read: .* to start over"):
        ResumableRun(tmp_path, ALONE, every=0, kept=1, resume=True)


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match=r"--output-dir: .*run cannot be written"):
        ResumableRun(tmp_path / "run", ALONE, every=1, kept=1, resume=False)
