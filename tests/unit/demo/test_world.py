"""The world is a function of (split, seed, index), and Pillow draws it as it did when the model was trained."""

import hashlib

import numpy as np
import pytest

from lvlm_prune.demo.splits import SPLITS, split_of
from lvlm_prune.demo.world import COLORS, IMAGE_SIZE, PATCH_SIZE, SHAPES, draw_indexed, scene

PIXELS = {
    ("train", 0): "47934e647fabcd0a",
    ("train", 1): "c1c7ea9601baaecc",
    ("calibration", 0): "d0bca3e0b7d521d7",
    ("test", 0): "7f6aa5d2b2e375df",
    ("test", 3): "4403859d807dbe47",
}


@pytest.mark.parametrize(("split", "index"), list(PIXELS))
def test_pixels_are_those_the_model_was_trained_on(split, index):
    _, image, _ = draw_indexed(split, 0, index)
    assert hashlib.sha256(image.tobytes()).hexdigest()[:16] == PIXELS[split, index], "Pillow draws differently now"


def test_a_scene_is_a_function_of_split_seed_and_index():
    first, again = draw_indexed("train", 3, 7), draw_indexed("train", 3, 7)
    assert first[0] == again[0]
    assert first[1].tobytes() == again[1].tobytes()
    assert scene("train", 3, 8) != scene("train", 4, 8) != scene("validation", 4, 8)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="`split` must be one of train, validation, calibration, test, got 'dev'"):
        scene("dev", 0, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_keep_to_the_rules(split):
    for index in range(100):
        described = scene(split, 1, index)
        cells = [thing.cell for thing in described.things]
        if described.number is not None and described.number_cell is not None:
            assert 10 <= described.number <= 99
            cells.append(described.number_cell)
        assert 1 <= len(described.things) <= 4
        assert len(set(cells)) == len(cells), "two things share a cell"
        assert split_of(described.key) == split


def test_layouts_of_different_splits_never_coincide():
    layouts = {split: {scene(split, seed, index).key for seed in (0, 1) for index in range(400)} for split in SPLITS}
    for split in SPLITS:
        for other in SPLITS:
            assert split == other or not layouts[split] & layouts[other]


def test_patch_labels_say_what_is_drawn_where():
    for index in range(50):
        described, image, labels = draw_indexed("train", 0, index)
        pixels = np.asarray(image, dtype=np.int64)
        assert pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        for thing in described.things:
            row, column = divmod(thing.cell, 3)
            cell = (slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
            assert set(np.unique(labels[0][cell])) == {0, 1 + SHAPES.index(thing.shape)}
            assert set(np.unique(labels[1][cell])) == {0, 1 + list(COLORS).index(thing.color)}
            patches = np.argwhere(labels[0][cell] > 0) + np.array([4 * row, 4 * column])
            y, x = ((patches.min(0) + patches.max(0) + 1) * PATCH_SIZE // 2).tolist()
            assert np.abs(pixels[y - 2 : y + 2, x - 2 : x + 2].mean((0, 1)) - COLORS[thing.color]).max() < 40
        digits = labels[2][labels[2] > 0].tolist()
        expected = [] if described.number is None else [1 + described.number // 10, 11 + described.number % 10]
        assert digits == expected
