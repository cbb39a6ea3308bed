# SPDX-License-Identifier: Apache-2.0
"""Features taken apart by image, on what the real image processors make of real images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from image_processors import PROCESSORS, image_processor, pictures
from plphp.engines.hf.conversation.fingerprints import fingerprint, same_image
from plphp.errors import UnsupportedFeatureError
from plphp.families.base import Features
from plphp.families.llava_onevision import _counts
from plphp.families.registry import family_of
from tiny_models import NEWEST, PER_TOKEN, TINY

Cut = Callable[[list[Any]], Mapping[str, Any]]

NAMES = [name for name in PROCESSORS if NEWEST or name != "gemma4"]  # 5.17 needs torchvision for it


def parts(name: str) -> tuple[Features, Cut]:
    """How a family's images are taken apart, and its image processor: a prompt for each image."""
    processor = image_processor(name)
    nested = name.startswith(("idefics", "smolvlm", "llava-onevision"))
    features = family_of(TINY[name].config()).features[0]
    return features, lambda images: processor([[i] for i in images] if nested else images, return_tensors="pt")


def tokens(name: str, inputs: Mapping[str, Any]) -> list[int]:
    config = TINY[name].config()
    return [segment.tokens for segment in family_of(config).segments(config, inputs) or []]


@pytest.mark.parametrize("name", NAMES)
def test_items_are_the_images_alone(name: str) -> None:
    """An image is recognised whether it was prepared alone or beside larger ones, which pad it."""
    features, cut = parts(name)
    images = pictures()
    together = features.items(cut(images))
    alone = [item for image in images for item in features.items(cut([image]))]
    assert len(together) == len(alone) >= len(images)
    assert [tokens(name, item) for item in together] == [tokens(name, item) for item in alone]
    marks = [fingerprint(item) for item in together]
    for number, item in enumerate(alone):
        assert [same_image(mark, fingerprint(item)) for mark in marks] == [i == number for i in range(len(marks))]


@pytest.mark.parametrize("name", NAMES)
def test_picked_images_fill_their_tokens(name: str) -> None:
    features, cut = parts(name)
    inputs = cut(pictures())
    items = features.items(inputs)
    sizes = tokens(name, inputs)
    assert len(sizes) == len(items)
    for numbers in ([*range(2, len(items))], [0, len(items) - 1], [1]):
        picked = features.pick(inputs, numbers)
        assert set(picked) == {key for key in features.names if inputs.get(key) is not None}
        assert tokens(name, picked) == [sizes[number] for number in numbers]
        again = [fingerprint(item) for item in features.items(picked)]
        assert all(same_image(fingerprint(items[number]), mark) for number, mark in zip(numbers, again, strict=True))
    assert features.pick(inputs, []) == {}


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_input_of_images_is_taken_apart(name: str) -> None:
    """An input that is left behind would belong to images that are not in the prompt."""
    tiny, config = TINY[name], TINY[name].config()
    names = {key for features in family_of(config).features for key in features.names}
    for video in (False, True) if tiny.videos is not None else (False,):
        model = tiny.build()
        inputs = tiny.inputs(model, [2, 1], video=video)
        assert set(inputs) - set(PER_TOKEN) <= names
        items = [features.items(inputs) for features in family_of(config).features]
        assert sum(map(len, items)) == len(family_of(config).segments(config, inputs) or ())


def test_inputs_of_another_form_are_not_taken_apart() -> None:
    features = Features(lambda config: (9,), each=("image_sizes",))
    pixels, sizes = torch.ones(3, 2), torch.ones(3, 2)
    assert len(features.items({"pixel_values": pixels, "image_sizes": sizes})) == 3
    assert len(features.items({"pixel_values": pixels})) == 3
    assert features.items({"pixel_values": pixels, "image_sizes": sizes[:2]}) == []
    assert features.items({"image_sizes": sizes}) == []
    assert features.items({"pixel_values": torch.tensor(1.0)}) == []
    as_list = features.pick({"pixel_values": [1, 2, 3], "image_sizes": sizes}, [0, 2])
    assert as_list["pixel_values"] == [1, 3]


def test_which_images_of_onevision_are_alone_in_their_row() -> None:
    """As numbers per row, which the model repeats: any but 1 stands for images that are not tiled."""

    def read(counts: list[int], images: int) -> list[bool]:
        return [count == 1 for count in counts for _ in range(count)][:images]

    for pattern in ("T", "F", "TT", "FF", "TF", "FFT", "TFF"):
        alone = [letter == "T" for letter in pattern]
        assert read(_counts(alone), len(alone)) == alone
    with pytest.raises(UnsupportedFeatureError, match="one by one"):
        _counts([False, True])
