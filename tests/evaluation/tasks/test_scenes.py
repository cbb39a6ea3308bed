# SPDX-License-Identifier: Apache-2.0
"""Scenes: the same seed gives the same picture, and the picture shows what the ground truth says."""

from __future__ import annotations

import random

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from plphp.evaluation.tasks.synthetic import scenes, sprites


def _scenes(seed: int, n: int = 20) -> list[scenes.Scene]:
    rng = random.Random(seed)
    return [scenes.make_scenes(rng, "test", 1)[0] for _ in range(n)]


def test_the_same_seed_draws_the_same_pixels() -> None:
    for first, second in zip(_scenes(3), _scenes(3), strict=True):
        assert first == second
        assert np.array_equal(np.asarray(first.draw()), np.asarray(second.draw()))


def test_another_seed_draws_other_scenes() -> None:
    assert _scenes(3) != _scenes(4)


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_size_follows_the_scale(scale: int) -> None:
    assert _scenes(1, 1)[0].draw(scale).size == (scenes.SIDE * scale,) * 2


def test_a_large_drawing_resized_looks_like_a_small_one() -> None:
    for scene in _scenes(5):
        large = scene.draw(4).resize((scenes.SIDE, scenes.SIDE))
        difference = np.abs(np.asarray(large, np.float32) - np.asarray(scene.draw(1), np.float32))
        assert difference.mean() < 6


def test_filled_cells_are_coloured_as_told_and_empty_cells_are_dark() -> None:
    rng = random.Random(7)
    for _ in range(30):
        scene = scenes.make_grid(rng, "test")
        pixels = np.asarray(scene.draw(), np.float32)
        height, width = scenes.SIDE / scene.rows, scenes.SIDE / scene.cols
        for row in range(1, scene.rows + 1):
            for col in range(1, scene.cols + 1):
                top, left = round((row - 1) * height) + 2, round((col - 1) * width) + 2
                cell = pixels[top : round(row * height) - 1, left : round(col * width) - 1]
                if scene.cell(row, col) == "nothing":
                    assert cell.max() < 90
                    continue
                colour, _ = scene.cell(row, col).split()
                # The mean over the brightest pixels is nearest to the named colour.
                brightest = cell.reshape(-1, 3)[np.argsort(cell.max(-1).ravel())[-12:]].mean(0)
                names = list(scenes.COLOURS)
                distances = [np.linalg.norm(brightest - np.array(scenes.COLOURS[name])) for name in names]
                assert names[int(np.argmin(distances))] == colour


def test_lines_of_text_hold_three_to_six_known_characters() -> None:
    rng = random.Random(8)
    for _ in range(50):
        scene = scenes.make_text(rng, "train")
        for row in range(1, scene.rows + 1):
            assert 3 <= len(scene.line(row)) <= scenes.MAX_COLS
            assert set(scene.line(row)) <= set(sprites.CHARACTERS)


def test_the_keys_of_a_table_are_different_letters() -> None:
    rng = random.Random(8)
    for _ in range(50):
        scene = scenes.make_table(rng, "train")
        keys = [scene.line(row)[0] for row in range(1, scene.rows + 1)]
        assert len(set(keys)) == len(keys) == scene.rows
        assert all(key.isalpha() for key in keys)
        assert all(2 <= len(scene.line(row, 2)) <= 3 for row in range(1, scene.rows + 1))


def test_every_item_labels_at_least_one_patch() -> None:
    for scene in _scenes(9):
        labels = scene.patch_labels()
        seen = {tuple(label) for label in labels.reshape(-1, 4)}
        for item in scene.items:
            colour = list(scenes.COLOURS).index(item.colour) + 1
            assert (scenes.OBJECTS.index(item.value), colour, item.row, item.col) in seen


def test_no_split_shows_what_another_does() -> None:
    digits = {
        split: {image.tobytes() for images in sprites._digit_images(split).values() for image in images}
        for split in ("train", "dev", "test")
    }
    assert len(digits["train"]) > 1000
    for first, second in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert len(digits[first]) > 100
        assert not digits[first] & digits[second]
        assert not set(sprites.FONTS[first]) & set(sprites.FONTS[second])


def test_training_never_shows_the_held_out_layouts() -> None:
    rng = random.Random(10)
    layouts = {split: set() for split in ("train", "test")}
    for split, seen in layouts.items():
        for _ in range(300):
            scene = scenes.make_grid(rng, split)
            seen.add((scene.rows, scene.cols))
    assert not layouts["train"] & scenes.UNSEEN_LAYOUTS
    assert layouts["test"] >= scenes.UNSEEN_LAYOUTS


def test_only_training_restyles_its_fonts() -> None:
    rng = random.Random(2)
    styles = {
        split: {item.key[3] for _ in range(30) for item in scenes.make_text(rng, split).items}
        for split in ("train", "dev", "test")
    }
    assert styles["dev"] == styles["test"] == {0}
    assert styles["train"] == set(range(sprites.VARIANTS))
    plain, styled = (sprites.mask("character", ("E", sprites.FONTS["train"][0], 16, style), 4) for style in (0, 1))
    assert plain.shape != styled.shape or not np.array_equal(plain, styled)
