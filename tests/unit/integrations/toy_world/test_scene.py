"""Scenes of the courtyard and the text that names them."""

from __future__ import annotations

import pytest
import torch

from flashdreams.integrations.toy_world.scene import (
    COLOURS,
    DEFAULT_SCENE,
    FLOOR_RGB,
    FLOOR_SLOT,
    HIDDEN,
    NUM_OPTIONS,
    NUM_SLOTS,
    PILLAR_RGB,
    SKIES,
    SKY_RGB,
    SKY_SLOT,
    SLOTS,
    WALL_RGB,
    check_scene,
    random_scene,
    scene_from_text,
    scene_to_text,
)


def test_tables_agree_on_their_sizes() -> None:
    assert len(SLOTS) == NUM_SLOTS == len(DEFAULT_SCENE)
    assert len(COLOURS) == len(SKIES) == NUM_OPTIONS == HIDDEN
    assert SLOTS[FLOOR_SLOT] == "floor" and SLOTS[SKY_SLOT] == "sky"
    assert SKY_RGB.shape == (NUM_OPTIONS, 4, 3)


@pytest.mark.parametrize("table", [WALL_RGB, PILLAR_RGB, FLOOR_RGB, SKY_RGB.flatten(1)])
def test_colours_are_distinct(table: torch.Tensor) -> None:
    distance = torch.cdist(table, table) + torch.eye(NUM_OPTIONS)
    assert len(table) == NUM_OPTIONS
    assert distance.min() > 0.1


def test_scene_from_text_reads_places_and_colours() -> None:
    scene = scene_from_text("red floor, blue north wall, golden pillars, dusk sky")
    expected = torch.tensor(DEFAULT_SCENE)
    expected[FLOOR_SLOT] = COLOURS.index("red")
    expected[0] = COLOURS.index("blue")
    expected[4:8] = COLOURS.index("gold")
    expected[SKY_SLOT] = SKIES.index("dusk")
    assert scene.dtype == torch.int64
    assert torch.equal(scene, expected)


def test_scene_from_text_of_nothing_is_the_default() -> None:
    assert scene_from_text("").tolist() == list(DEFAULT_SCENE)


def test_scene_from_text_lets_later_phrases_win() -> None:
    red, white = COLOURS.index("red"), COLOURS.index("white")
    walls = scene_from_text("White walls and a red wall in the north.")[:4].tolist()
    assert walls == [red, white, white, white]
    assert scene_from_text("red north wall, white walls")[:4].tolist() == [white] * 4


@pytest.mark.parametrize(
    ("side", "slots"),
    [
        ("southwest", [6]),
        ("south-west", [6]),
        ("south west", [6]),
        ("north", [4, 7]),
        ("", [4, 5, 6, 7]),
    ],
)
def test_scene_from_text_narrows_pillars_to_a_side(side: str, slots: list[int]) -> None:
    scene = scene_from_text(f"unknown {side} pillars")
    assert (scene == HIDDEN).nonzero().flatten().tolist() == slots


def test_scene_text_round_trip() -> None:
    generator = torch.Generator().manual_seed(3)
    scenes = torch.randint(HIDDEN + 1, (50, NUM_SLOTS), generator=generator)
    scenes[:10, :4] = scenes[:10, :1]
    scenes[5:15, 4:8] = scenes[5:15, 4:5]
    for scene in scenes:
        assert torch.equal(scene_from_text(scene_to_text(scene)), scene)
    assert scene_to_text(scenes[0]) != scene_to_text(scenes[1])


def test_scene_to_text_joins_equal_walls() -> None:
    scene = scene_from_text("teal walls, unknown pillars, white floor, night sky")
    assert scene_to_text(scene) == "teal walls, unknown pillars, white floor, night sky"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gren floor", "did you mean green"),
        ("pink floor", "Colours: red, orange"),
        ("red", "names 0 places"),
        ("red floor blue sky", "names 2 places"),
        ("red floor floor", "names 2 places"),
        ("floor", "does not give the floor one value"),
        ("red blue floor", "does not give the floor one value"),
        ("red sky", "allowed: noon, dawn"),
        ("dusk floor", "allowed: red, orange"),
        ("red north floor", "names no floor"),
        ("red northeast wall", "names no wall"),
        ("red north south wall", "names no wall"),
        ("dusk north sky", "names no sky"),
        ("red floor 7up", "unknown word 'up'"),
        ("42, red floor", "names 0 places"),
    ],
)
def test_scene_from_text_refuses(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        scene_from_text(text)


def test_check_scene_refuses_shapes_and_values() -> None:
    check_scene(torch.full((2, NUM_SLOTS), HIDDEN), HIDDEN)
    with pytest.raises(ValueError, match=r"\[8, 8\], allowed \[0, 7\]"):
        check_scene(torch.full((2, NUM_SLOTS), HIDDEN))
    with pytest.raises(ValueError, match=r"\(10,\), expected \[B, 10\]"):
        check_scene(torch.zeros(NUM_SLOTS, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(9,\), expected \(10,\)"):
        scene_to_text(torch.zeros(9, dtype=torch.int64))


def test_random_scene_repeats_with_its_seed() -> None:
    draws = [random_scene(200, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].dtype == torch.int64
    assert all(len(slot.unique()) == NUM_OPTIONS for slot in draws[0].T)


def test_drawn_scenes_are_whole_numbers_that_can_index() -> None:
    scene = random_scene(50, torch.Generator().manual_seed(0))
    assert scene.dtype == torch.int64 and scene.shape == (50, NUM_SLOTS)
    assert set(scene.flatten().tolist()) == set(range(NUM_OPTIONS))
