"""Lists of prompts and the AR steps at which they begin."""

from pathlib import Path

import pytest

from flashdreams.infra.config import derive_config
from flashdreams.infra.prompt import Shot, plan_shots, read_shot_file
from flashdreams.integrations.longlive.config import TINY_RUNNER


def begins(texts: list[str], total: int) -> list[int]:
    return [shot.first_block for shot in plan_shots(texts, total)]


def test_chunks_are_spread_evenly_and_the_first_take_the_rest() -> None:
    assert begins(["a", "b", "c"], 8) == [0, 3, 6]
    assert begins(["a"], 8) == [0] and begins([], 8) == []


def test_counts_are_taken_and_the_last_shot_goes_on() -> None:
    assert plan_shots(["2: a fox", "3:b: c"], 8) == [Shot(0, "a fox"), Shot(2, "b: c")]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["a", "2:b"], "1 of 2 shots have a number of chunks"),
        (["a", "b", "c"], "3 shots of 3 chunks do not fit --total-blocks 2"),
        (["2:a", "1:b"], "2 shots of 3 chunks do not fit --total-blocks 2"),
        (["0:a", "1:b"], "each has at least one chunk"),
        (["a", " "], "shot 2 has 0 characters"),
        (["1:", "1:b"], "shot 1 has 0 characters"),
    ],
)
def test_lists_that_cannot_be_are_refused_with_the_numbers(texts, said) -> None:
    with pytest.raises(ValueError, match=said):
        plan_shots(texts, 2)


def test_a_file_has_one_shot_a_line(tmp_path: Path) -> None:
    path = tmp_path / "shots.txt"
    path.write_text("# a story\n2:a fox\n\n  2:a boat  \n", encoding="utf-8")
    assert read_shot_file(path) == ["2:a fox", "2:a boat"]
    path.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(ValueError, match="contains no prompt"):
        read_shot_file(path)
    with pytest.raises(ValueError, match="No such file"):
        read_shot_file(tmp_path / "absent.txt")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(shot=("a",) * 9), "9 shots of 9 chunks do not fit --total-blocks 8"),
        (dict(shot=("a",), shot_path=Path("x")), "--shot and --shot-path: give only one"),
        (dict(shot=("a",), prompt_path=Path("x")), "--shot and --prompt-path: give only one"),
        (dict(shot=("a",), pipeline=dict(release_text_encoder=True)), "need the text encoder"),
    ],
)
def test_options_that_do_not_go_together_are_refused_with_the_config(fields, said) -> None:
    with pytest.raises(ValueError, match=said):
        derive_config(TINY_RUNNER, **fields)
