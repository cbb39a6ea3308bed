# SPDX-License-Identifier: Apache-2.0
"""What a turn adds to a conversation: its new images are separated from the images that the cache holds already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers import PretrainedConfig

from plphp.errors import SpanError
from plphp.families.base import Family, Features, Inputs

from .fingerprints import Fingerprint, fingerprint


@dataclass(frozen=True)
class SentImage:
    """An image, a tile or a video whose features were sent with a prompt.

    Parameters
    ----------
    row : int
        Row of the batch.
    first, last : int
        Positions of its first and its last vision token in the conversation.
    name : str
        The input that holds it, such as ``pixel_values``.
    number : int
        Its number among the images of that input.
    marks : dict
        See `plphp.engines.hf.conversation.fingerprints.fingerprint`.
    """

    row: int
    first: int
    last: int
    name: str
    number: int
    marks: Fingerprint


def feature_names(family: Family) -> frozenset[str]:
    """The inputs that a family can take apart by image."""
    return frozenset(name for features in family.features for name in features.names)


def new_features(
    family: Family, config: PretrainedConfig, inputs: Inputs, past_length: int, length: int
) -> tuple[dict[str, Any], list[SentImage]]:
    """Leave out the features of the images that the cache holds.

    Parameters
    ----------
    family : Family
        Knows how its features are taken apart by image.
    config : PretrainedConfig
        The model's config.
    inputs : mapping
        Inputs of a turn, with the features of all images of the conversation or of the new images alone.
    past_length : int
        Tokens that the cache holds.
    length : int
        Tokens of the whole conversation.

    Returns
    -------
    inputs : dict
        With the features of new images alone. Features whose number fits neither are left as they are.
    sent : list of SentImage
        The images that were sent, old and new, as far as their positions are known.

    Raises
    ------
    SpanError
        If the past ends inside an image.
    """
    narrowed, sent = dict(inputs), []
    for features in family.features:
        images = _sent(family, features, config, inputs, past_length, length)
        new = [image.number for image in images if image.first >= past_length]
        if len(new) < len(images):
            for name in features.names:
                narrowed.pop(name, None)
            narrowed.update(features.pick(inputs, new))
        sent += images
    return narrowed, sent


def with_features(arguments: Mapping[str, Any], turn: Inputs, family: Family) -> dict[str, Any]:
    """The arguments of a call with the features of ``turn`` in the place of their own."""
    names = feature_names(family)
    rest = {name: value for name, value in arguments.items() if name not in names}
    return {**rest, **{name: turn[name] for name in names if name in turn}}


def _sent(
    family: Family, features: Features, config: PretrainedConfig, inputs: Inputs, past_length: int, length: int
) -> list[SentImage]:
    """The images of one kind of features with their positions; empty where features and placeholders do not fit."""
    items = features.items(inputs) if isinstance(inputs.get("input_ids"), Tensor) else []
    segments = [family.segments(config, item) for item in items]
    tokens = [sum(segment.tokens for segment in of_image or ()) for of_image in segments]
    if not items or not all(tokens):
        return []
    mask = features.placeholders(config, inputs)
    # A later turn's input_ids may leave out what the cache holds.
    positions = pad(mask, (length - mask.shape[1], 0)).nonzero().cpu()
    new = positions[positions[:, 1] >= past_length]
    # Features of the new images alone fill the new placeholders, features of all images fill all.
    positions = new if len(new) == sum(tokens) else positions
    if len(positions) != sum(tokens):
        return []
    images, name = [], features.pixels[0]
    for number, (begin, end) in enumerate(pairwise(accumulate(tokens, initial=0))):
        (row, first), (last_row, last) = positions[begin].tolist(), positions[end - 1].tolist()
        if row != last_row:
            return []
        if first < past_length <= last:
            raise SpanError(
                f"The cache holds {past_length} tokens, which end inside image {number} of {name} (tokens {first} to "
                f"{last} of row {row}): an image can only be read whole. Make a new cache and read the whole "
                "conversation."
            )
        images.append(SentImage(row, first, last, name, number, fingerprint(items[number])))
    return images
