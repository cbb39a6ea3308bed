# SPDX-License-Identifier: Apache-2.0
"""What the vision tower says of its patches: the attention that they receive, recorded while a model runs as usual."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plphp.errors import UnsupportedFeatureError, UnsupportedModelError
from plphp.families.registry import family_of
from plphp.kernels.received import received_attention

from .attention import UNSUPPORTED_TERMS
from .tower_attachment import listening
from .tower_layers import chosen_layers, known_tower, part_of
from .tower_record import TowerPass, TowerRecord
from .unwrapping import unwrapped


@contextmanager
def recorded_tower(model: Any, layers: Sequence[int] | slice = (-1,)) -> Iterator[TowerRecord]:
    """Record the attention of a model's vision tower while the model runs as usual.

    The tower runs once and its features are those that it has without a record, to the bit: the model's own attention
    function attends, and the record is made from the same queries and keys beside it, a few rows at a time. What runs
    in other threads, or in tasks that were started before, is not recorded.

    Parameters
    ----------
    model : PreTrainedModel
        A model of a known family, or a wrapper around one.
    layers : sequence of int, or slice
        The layers to record, from 0 or, negative, from the end; of a slice what there is. Counted are the layers of
        the tower in which a patch sees its whole image or frame, and not those with windows.

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
    module = part_of(model, tower.module)
    if module.training:
        raise UnsupportedFeatureError(
            "The vision tower is in training mode, where dropout changes the attention: call model.eval() first."
        )
    chosen = chosen_layers(model, tower, module, layers)
    recorder = _Recorder(module, chosen, tower.class_token(model.config))
    with listening(model, module, recorder):
        yield recorder.record


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
        if not self._heard.keys() >= set(self._layers):
            raise UnsupportedFeatureError(
                "The vision tower ran without plphp's attention, so that nothing was recorded: leave the attention "
                "implementation as it is while the tower is recorded."
            )
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
