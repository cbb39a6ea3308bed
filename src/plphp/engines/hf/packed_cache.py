# SPDX-License-Identifier: Apache-2.0
"""A cache that says which tokens of a prompt each decoder layer gets, see `plphp.engines.hf.packed_layers`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from plphp.errors import UnsupportedFeatureError, UnsupportedModelError
from plphp.pruning.leaving import Leaving
from plphp.pruning.packing import Packing, gathered

from .attachment import Attachment
from .guarded import GuardedCache
from .layer import PrunedLayer
from .packed_masks import packed_mask
from .tower_watch import TowerWatch


class PackedCache(GuardedCache):
    """A guarded cache for prompts that vision tokens leave before decoder layers get them.

    Attributes
    ----------
    leaving : Leaving or None
        What leaves, while the layers read a prompt that was planned; None where all is read by all.
    watch : TowerWatch or None
        The vision tower of that prompt, where the method that chooses before the text model asks for it.
    packing : Packing or None
        The tokens that the layer which runs has got; None where it has got them all.
    left : dict of int to Leaving
        By the beginning of each prompt that was read, what has left it.
    """

    def __init__(self, attachment: Attachment) -> None:
        super().__init__(attachment)
        self.leaving: Leaving | None = None
        self.watch: TowerWatch | None = None
        self.packing: Packing | None = None
        self.left: dict[int, Leaving] = {}

    def enter_layer(self, number: int, states: Tensor) -> tuple[Tensor, Packing | None]:
        """Say what a decoder layer gets.

        Parameters
        ----------
        number : int
            The layer.
        states : Tensor
            [batch, tokens, dim]; what the layer before returned, or the embeddings of the whole prompt.

        Returns
        -------
        states : Tensor
            Those of the tokens that are there, [batch, packed, dim].
        packing : Packing or None
            Which tokens these are; None where they are all there.

        Raises
        ------
        UnsupportedFeatureError
            If the prompt comes in chunks, or a layer with a state would read what only fills a row up.
        """
        if number == 0 and self.reading is None:
            self.forget_leaving()  # an error stopped the pass that read the prompt behind its last placement
        leaving = self.leaving
        if leaving is None:
            return states, None
        if number == 0:
            self.packing = None
            self.left[leaving.spans.start] = leaving
            self._refuse_chunks(leaving, states.shape[1])
            states = leaving.enter(states, None if self.watch is None else self.watch.scores)
        before, self.packing = self.packing, leaving.packing_at(number)
        leaving.note_computed(number)
        if self.packing is not None and self.packing.filled:
            self._refuse_filled_states(leaving)
        if self.packing is not None and self.packing is not before:
            states = gathered(states, self.packing.within(before))
        return states, self.packing

    def leave_layers(self) -> Packing | None:
        """End a pass over the layers; return which tokens the last of them has got, None for all."""
        packing = self.packing
        self.forget_leaving()
        return packing

    def forget_leaving(self) -> None:
        """From now on layers get all tokens."""
        self.leaving = self.watch = self.packing = None

    def packed_mask(self, layer: PrunedLayer, mask: Tensor | None, queries: int) -> Tensor | None:
        """Fit a mask to a layer that has not got all tokens of a prompt, see `plphp.engines.hf.packed_masks`."""
        tokens = layer.tail_tokens
        rows = 1 if layer.packing is None else len(layer.packing.rows)
        columns = tokens.of(torch.arange(tokens.end).expand(rows, -1), -1)
        return packed_mask(mask, columns, queries, tokens.end)

    def tower_recorded(self) -> AbstractContextManager[None]:
        """While open, the vision tower is recorded for a method that chooses tokens by its attention.

        ``generate`` does it by itself; a call of ``model(...)`` with such a method has to be inside of it.
        """
        return nullcontext() if self.watch is None else self.watch.open()

    def reset(self) -> None:
        """Forget everything; the next prompt has to be planned again."""
        super().reset()
        self.forget_leaving()
        self.left = {}

    def _refuse_chunks(self, leaving: Leaving, given: int) -> None:
        """Before the first layer, check that the prompt comes in one piece."""
        tokens = leaving.spans.end - leaving.spans.start
        if given != tokens:
            methods = " and ".join(link.method for name, link in leaving.chain.stages.items() if name != "kv")
            self._end_by(
                f"{methods} chooses tokens before layers get them and needs the prompt in one piece, and got {given} "
                f"of its {tokens} tokens: pass all of it in one call",
                UnsupportedFeatureError,
            )

    def _refuse_filled_states(self, leaving: Leaving) -> None:
        """Refuse rows of unequal length behind a state: it would go on by what fills the shorter ones up."""
        if leaving.spans.start and not all(isinstance(layer, DynamicLayer | PrunedLayer) for layer in self.layers):
            self._end_by(
                "in a later turn of a batch the rows keep different numbers of tokens, and this model has layers with "
                "a recurrent state or a convolution, which would read what fills the shorter rows up: answer the rows "
                "one by one, or take a method of the KV cache",
                UnsupportedFeatureError,
            )

    def _packing_at(self, layer_idx: int, given: int) -> Packing | None:
        if self.leaving is None:
            return None
        packing = self.leaving.packing_at(layer_idx)
        if not self.leaving.entered or (packing is not None and packing.packed != given):
            self._end_by(
                f"layer {layer_idx} got tokens that had left before it: this model class does not pass its cache to "
                "its decoder layers",
                UnsupportedModelError,
            )
        return packing
