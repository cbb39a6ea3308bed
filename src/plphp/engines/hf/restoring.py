# SPDX-License-Identifier: Apache-2.0
"""An image that has faded is computed again: its tokens pass the model behind what is held of those before them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from plphp.errors import ConfigError, HistoryError, UnsupportedFeatureError
from plphp.families.registry import family_of
from plphp.pruning.dropping import drop
from plphp.pruning.fading import Fading
from plphp.pruning.image_table import ImageTable, TableImage
from plphp.pruning.ledger import codes_of

from .cache_argument import passed
from .conversation.fingerprints import Fingerprint, fingerprint, same_image
from .conversation.history import UNKNOWN, History
from .conversation.mrope import position_holder
from .conversation.turns import SentImage
from .layer import PrunedLayer


@dataclass(frozen=True)
class Recognised:
    """An image whose features have come again.

    Parameters
    ----------
    sent : SentImage
        As it was sent the first time.
    places : list of int
        What the image table has of it in its row: itself, or its tiles.
    features : dict
        Its features as the model reads them.
    """

    sent: SentImage
    places: list[int]
    features: dict[str, Any]


def recognised(
    model: PreTrainedModel, history: History, images: ImageTable, row: int, place: int, features: Mapping[str, Any]
) -> Recognised:
    """Find an image among those that features are of.

    Raises
    ------
    HistoryError
        If it is not among them, or the cache does not know its features.
    ConfigError
        If there are no images in them.
    """
    image = images.rows[row][place]
    known = [sent for sent in history.images if sent.row == row and sent.first <= image.first <= sent.last]
    if not known:
        raise HistoryError(
            f"The features of the image at tokens {image.first} to {image.last} of row {row} never passed through this "
            "cache, so that it cannot tell whether these are the same: send the image in a new turn."
        )
    sent = known[0]
    [kind] = [own for own in family_of(model.config).features if own.pixels[0] == sent.name]
    for name in kind.names:
        if not isinstance(features.get(name, []), Tensor | list | tuple):
            raise ConfigError(
                f"restore takes the features of an image as the processor returns them, and {name} is a "
                f"{type(features[name]).__name__}: send what it returned."
            )
    items = kind.items(features)
    if not items:
        raise ConfigError(
            f"restore takes the features of an image as the processor returns them ({', '.join(kind.names)}), and "
            "there are none: send them, or give tier_device=cpu, so that images wait in host memory."
        )
    found = next((item for item in items if _is(sent, fingerprint(item))), None)
    if found is None:
        raise HistoryError(
            f"The image at tokens {image.first} to {image.last} of row {row} is not among the {len(items)} whose "
            "features these are, or they have another dtype: send what the processor returned for it, on the same "
            "device."
        )
    inside = [number for number, own in enumerate(images.rows[row]) if sent.first <= own.first <= sent.last]
    return Recognised(sent, inside, found)


def _is(sent: SentImage, marks: Fingerprint) -> bool:
    """Whether a fingerprint is that of an image that was sent."""
    both = {name for name, _ in sent.marks.keys() & marks.keys()}  # a grid alone does not tell images apart
    return sent.name in both and same_image(sent.marks, marks)


def refuse_restoring(model: PreTrainedModel, cache: Cache, early: list[str]) -> None:
    """Raise `UnsupportedFeatureError` where the tokens of an image cannot be computed again as they were.

    Parameters
    ----------
    model : PreTrainedModel
    cache : Cache
        What holds the conversation.
    early : list of str
        Methods by which layers compute a prompt in another way than the model would.
    """
    if early:
        raise UnsupportedFeatureError(
            f"{' and '.join(early)} chose tokens among the whole prompt while layers read it, and cannot choose so "
            "from an image alone: send the image in a new turn."
        )
    if not all(isinstance(layer, PrunedLayer) for layer in cache.layers):
        raise UnsupportedFeatureError(
            "This model has layers with a sliding window or a state, which have lost what came before the image: send "
            "the image in a new turn."
        )
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        raise UnsupportedFeatureError(
            f"In {type(model).__name__} the tokens of an image attend to tokens behind them, and an image alone would "
            "be computed otherwise: send the image in a new turn."
        )


def earlier_layer(
    number: int, layer: PrunedLayer, images: ImageTable, fading: Fading, row: int, first: int
) -> PrunedLayer:
    """A layer of one row with what another holds of the tokens before ``first``."""
    assert layer.prefix is not None
    assert layer.ledger is not None
    result, codes = PrunedLayer(), codes_of(layer.coded)
    heads = layer.prefix.kv_heads
    keys, values = (
        states.new_empty(1, heads, 0, states.shape[1]) for states in (layer.prefix.keys, layer.prefix.values)
    )
    result.begin(keys, values)
    result.prefix, result.ledger = layer.prefix.select([row]), layer.ledger.select([row], codes)
    if codes is not None:
        own = codes.select([row])
        result.coded = (own,) if any(map(any, own.held)) else ()
    result.prefix_length = first
    drop(number, result, images, fading, lambda source: source.labels.position >= first)
    return result


def compute(model: PreTrainedModel, cache: Cache, history: History, image: TableImage, found: Recognised) -> None:
    """Let the tokens of an image pass the model, behind a cache that holds those before.

    Raises
    ------
    HistoryError
        If the cache does not know all tokens of the image.
    UnsupportedFeatureError
        If its positions are not known.
    """
    sent = found.sent
    span = slice(sent.first, sent.last + 1)
    ids, valid = history.ids[sent.row : sent.row + 1, span], history.valid[sent.row : sent.row + 1, : sent.last + 1]
    if bool((ids == UNKNOWN).any()):
        raise HistoryError("The tokens of the image never passed through this cache: send the image in a new turn.")
    device = model.device
    inputs: dict[str, Any] = {name: _on(device, value) for name, value in found.features.items()}
    inputs.update(input_ids=ids.to(device), attention_mask=valid.long().to(device))
    text = (valid.long().cumsum(1) - 1).clamp(min=0)[:, span].to(device)
    if position_holder(model) is not None:
        if image.rotary is None or image.rotary.shape[1] != ids.shape[1]:
            raise UnsupportedFeatureError(
                "The rotary positions of the tokens of this image are not known: send the image in a new turn."
            )
        inputs["position_ids"] = torch.cat([text[None], image.rotary.long()[:, None].to(device)])
    elif not bool(valid.all()):
        inputs["position_ids"] = text
    model(**inputs, **passed(cache), use_cache=True)


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
