# SPDX-License-Identifier: Apache-2.0
"""What the vision tower says of its patches: the attention that they receive, recorded while a model runs as usual."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plphp.errors import ConfigError, UnsupportedFeatureError, UnsupportedModelError
from plphp.families.base import Family
from plphp.families.registry import family_of
from plphp.families.towers import VisionTower
from plphp.kernels.received import received_attention

from .attention import UNSUPPORTED_TERMS
from .tower_attention import listening
from .unwrapping import unwrapped


@dataclass(frozen=True)
class TowerPass:
    """What was recorded while the tower read all images of a prompt, or all of its videos.

    Parameters
    ----------
    received : tuple of Tensor
        For each recorded layer, float32 [images, positions]: the attention that a patch receives, mean over the heads
        and the patches that see it, 0 on padding. It sums to 1 over the patches that see each other, those of an image
        or a frame. Rows and positions are those of the tower: a class token is a position, and towers that read images
        of several sizes put them one behind the other in a single row.
    class_rows : tuple of Tensor, or None
        For each recorded layer, float32 [images, positions]: the attention of the class token, mean over the heads,
        its attention to itself included. None where the tower has no class token.
    """

    received: tuple[Tensor, ...]
    class_rows: tuple[Tensor, ...] | None


@dataclass(frozen=True)
class TowerRecord:
    """What a vision tower was recorded to do.

    Attributes
    ----------
    passes : list of TowerPass
        One each time that the tower ran: for a prompt, its images come first and its videos second. A pass is
        complete when the tower has returned.
    """

    passes: list[TowerPass] = field(default_factory=list)


@contextmanager
def recorded_tower(model: Any, layers: Sequence[int] = (-1,)) -> Iterator[TowerRecord]:
    """Record the attention of a model's vision tower while the model runs as usual.

    The tower runs once and its features are those that it has without a record, to the bit: the model's own attention
    function attends, and the record is made from the same queries and keys beside it, a few rows at a time. What runs
    in other threads, or in tasks that were started before, is not recorded.

    Parameters
    ----------
    model : PreTrainedModel
        A model of a known family, or a wrapper around one.
    layers : sequence of int
        The layers to record, from 0 or, negative, from the end. Counted are the layers of the tower in which a patch
        sees its whole image or frame, and not those with windows.

    Yields
    ------
    TowerRecord
        Filled while the context is open; complete for a call of the model when that has returned.

    Raises
    ------
    ConfigError
        If there is no such layer.
    UnsupportedModelError
        If the model is of no known family.
    UnsupportedFeatureError
        If nothing is known of the family's tower, the model is in training mode, or the attention implementation of
        the tower is not supported.

    References
    ----------
    The class token's row is the evidence of VTC-CLS (arXiv 2412.05819) and VisionZip (arXiv 2412.04467), received
    attention that of FoPru (arXiv 2411.14164).
    """
    model = unwrapped(model)
    tower = known_tower(family_of(model.config))
    module = core_of(model).get_submodule(tower.module)
    if module.training:
        raise UnsupportedFeatureError(
            "The vision tower is in training mode, where dropout changes the attention: call model.eval() first."
        )
    chosen = _chosen(model, tower, module, layers)
    recorder = _Recorder(module, chosen, tower.class_token(model.config))
    with listening(model, module, recorder):
        yield recorder.record


def known_tower(family: Family) -> VisionTower:
    """Return what is known of the vision tower of a family.

    Raises
    ------
    UnsupportedFeatureError
        If there is nothing.
    """
    if family.tower is None:
        raise UnsupportedFeatureError(
            f"plphp does not know the vision tower of the family {family.name!r}, whose attention this method reads: "
            "give the Family a VisionTower (docs/extending.md), or choose a method without it."
        )
    return family.tower


def core_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the module that has the tower and ``get_image_features``: the model, or the base model inside of it."""
    inner = getattr(model, "model", None)
    return inner if hasattr(inner, "get_image_features") else model


def _chosen(model: PreTrainedModel, tower: VisionTower, module: nn.Module, layers: Sequence[int]) -> list[nn.Module]:
    """The attention modules of the layers to record."""
    found = [part for part in module.modules() if type(part).__name__.endswith("Attention") and hasattr(part, "config")]
    full = found if tower.full_attention is None else [found[i] for i in tower.full_attention(model.config)]
    missing = [layer for layer in layers if not -len(full) <= layer < len(full)]
    if missing or not layers:
        raise ConfigError(
            f"layers must name layers of the vision tower, from {-len(full)} to {len(full) - 1}, as the tower of "
            f"{type(model).__name__} has {len(full)} with full attention; got {list(layers)}."
        )
    return [full[layer] for layer in layers]


class _Recorder:
    """Makes a record of what it hears of a tower."""

    def __init__(self, tower: nn.Module, layers: list[nn.Module], class_token: int | None) -> None:
        self.record = TowerRecord()
        self._tower, self._layers, self._class_token = tower, layers, class_token
        self._heard: dict[nn.Module, list[tuple[Tensor, Tensor | None]]] = {}

    def begin(self, tower: nn.Module) -> None:
        """Forget a run of the tower that was cut off."""
        if tower is self._tower:
            self._heard = {}

    def attended(self, layer: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, options: Any) -> None:
        """Work out what a chosen layer says."""
        if layer in self._layers:
            _refuse(layer, mask, options)
            self._heard.setdefault(layer, []).extend(_scores(query, key, mask, options, self._class_token))

    def end(self, tower: nn.Module) -> None:
        """Put a run of the tower into the record."""
        if tower is not self._tower:
            return
        calls = [self._heard[layer] for layer in self._layers]
        received = tuple(_joined(scores for scores, _ in of_layer) for of_layer in calls)
        rows = [[row for _, row in of_layer if row is not None] for of_layer in calls]
        class_rows = None if self._class_token is None else tuple(map(_joined, rows))
        self.record.passes.append(TowerPass(received, class_rows))


def _joined(parts: Iterable[Tensor]) -> Tensor:
    """Put what a tower says image by image, or frame by frame, into the single row in which it holds them."""
    return torch.cat(list(parts), dim=-1)


def _scores(
    query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any], class_token: int | None
) -> list[tuple[Tensor, Tensor | None]]:
    """Received attention and class row of each sequence that a call of the attention holds."""
    scaling = options.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if mask is not None and mask.ndim == 2:  # flash attention takes the padding alone
        mask = mask[:, None, None].bool()
    ends = options.get("cu_seq_lens_q")
    if ends is None:
        return [received_attention(query, key, mask, scaling, class_token)]
    lengths = ends.diff().tolist()
    parts = zip(query.split(lengths, dim=2), key.split(lengths, dim=2), strict=True)
    return [received_attention(q, k, None, scaling, class_token) for q, k in parts]


def _refuse(layer: nn.Module, mask: Tensor | None, options: dict[str, Any]) -> None:
    """Refuse attention that is not a softmax of every patch over the patches that the mask shows."""
    causal = options.get("is_causal")
    causal = getattr(layer, "is_causal", False) if causal is None else causal
    terms = [name for name in UNSUPPORTED_TERMS if options.get(name) is not None]
    terms += ["is_causal"] if causal else []
    terms += ["a mask for each head"] if mask is not None and mask.ndim == 4 and mask.shape[1] != 1 else []
    if terms:
        raise UnsupportedModelError(
            f"{type(layer).__name__} passes {', '.join(terms)} to its attention, which plphp does not record."
        )
