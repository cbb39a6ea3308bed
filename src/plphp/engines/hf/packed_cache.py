# SPDX-License-Identifier: Apache-2.0
"""A cache that says which tokens of a prompt each decoder layer gets, and which of them attend in it.

`plphp.engines.hf.packed_layers` asks for the first, `plphp.engines.hf.attention` for the second.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from plphp.errors import PLPHPError, UnsupportedFeatureError, UnsupportedModelError
from plphp.families.spans import VisionSpans
from plphp.pruning.leaving import Leaving
from plphp.pruning.left_tokens import AttendedTokens, LeftTokens
from plphp.pruning.packing import Packing, gathered
from plphp.pruning.reading import PromptReading
from plphp.pruning.scoring import Attended

from .attachment import Attachment
from .guarded import GuardedCache
from .layer import PrunedLayer
from .packed_masks import packed_mask
from .tower_watch import TowerWatch


class PackedCache(GuardedCache):
    """A guarded cache for prompts of which decoder layers do not get, or do not attend among, all tokens.

    Attributes
    ----------
    leaving : Leaving or None
        What leaves, while the layers read a prompt that was planned; None where all is read by all.
    watch : TowerWatch or None
        The vision tower of that prompt, where the method that chooses before the text model asks for it.
    packing : Packing or None
        The tokens that the layer which runs has got; None where it has got them all.
    left : dict of int to LeftTokens
        By the beginning of each prompt that was read, what has left it.
    attended : dict of int to AttendedTokens
        By the beginning of each prompt whose layers attended among important tokens alone, which these were.
    pruning_seconds : float
        Time that the reading of prompts has taken so far beside the model.
    """

    def __init__(self, attachment: Attachment) -> None:
        super().__init__(attachment)
        self.leaving: Leaving | None = None
        self.watch: TowerWatch | None = None
        self.packing: Packing | None = None
        self.left: dict[int, LeftTokens] = {}
        self.attended: dict[int, AttendedTokens] = {}
        self.pruning_seconds = 0.0

    def before_attention(self, layer_idx: int, query: Tensor, scaling: float) -> Packing | None:
        """Say which tokens of a prompt attend in a layer.

        Parameters
        ----------
        layer_idx : int
            Decoder layer, whose keys and values have been updated.
        query : Tensor
            [batch, q_heads, query, dim]; post-RoPE queries of the tokens that it has got.
        scaling : float
            Factor on the logits.

        Returns
        -------
        Packing or None
            Of the tokens that the layer has got, those that attend; None where they all do.

        Raises
        ------
        UnsupportedFeatureError
            If the prompt comes in chunks.
        """
        reading = self.reading
        if reading is None or reading.attending is None:
            return None
        started, spans, layer = time.perf_counter(), reading.spans, self._pruned[layer_idx]
        with self._ended_by_errors():
            if layer.length < spans.end:
                self._refuse_chunk(spans, [reading.attending.link.method], layer.length - self._before)
            self._repeat_rows(reading, query.shape[0])
            packing = reading.attend(Attended(layer_idx, query, layer, scaling))
            self.attended[spans.start] = reading.attending.noted()
        self.pruning_seconds += time.perf_counter() - started
        return packing

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
            if states.shape[1] != leaving.spans.end - leaving.spans.start:
                methods = [link.method for name, link in leaving.chain.stages.items() if name != "kv"]
                self._refuse_chunk(leaving.spans, methods, states.shape[1])
            states = leaving.enter(states, None if self.watch is None else self.watch.scores)
        before, self.packing = self.packing, leaving.packing_at(number)
        leaving.note_computed(number)
        self.left[leaving.spans.start] = leaving.noted()
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

    def packed_mask(
        self, layer: PrunedLayer, mask: Tensor | None, query: Tensor, attending: Packing | None = None
    ) -> Tensor | None:
        """Fit a mask for queries [batch, q_heads, query, dim] to a layer that has not got all tokens of a prompt, or in
        which not all of them attend, see `plphp.engines.hf.packed_masks`."""
        tokens = layer.tail_tokens
        rows = 1 if layer.packing is None else len(layer.packing.rows)
        queries, columns = query.shape[2], tokens.of(torch.arange(tokens.end).expand(rows, -1), -1)
        if attending is not None:
            columns = gathered(columns, attending.behind(columns.shape[1] - queries), fill=-1)
            queries = attending.packed
        return packed_mask(mask, columns, queries, tokens.end, query.device)

    def tower_recorded(self) -> AbstractContextManager[None]:
        """While open, the vision tower is recorded for a method that chooses tokens by its attention.

        ``generate`` does it by itself; a call of ``model(...)`` with such a method has to be inside of it.
        """
        return nullcontext() if self.watch is None else self.watch.open()

    def reset(self) -> None:
        """Forget everything; the next prompt has to be planned again."""
        super().reset()
        self.forget_leaving()
        self.left, self.attended = {}, {}
        self.pruning_seconds = 0.0

    def _repeat_rows(self, reading: PromptReading, rows: int) -> None:
        """Follow ``generate``, which repeats the rows of a prompt for beams and for several returned sequences."""
        times, rest = divmod(rows, reading.batch)
        if rest:
            self._end_by(f"it was planned for {reading.batch} rows and read {rows}")
        if times > 1:
            reading.repeat(times)

    @contextmanager
    def _ended_by_errors(self) -> Iterator[None]:
        """End the cache with an error in a prompt's flow: by then some layers are placed and the rest are not."""
        try:
            yield
        except PLPHPError as error:
            if not self._dead:
                self._end_by(str(error), type(error))
            raise
        except BaseException:
            if not self._dead:
                self._invalidate("an error stopped the reading of a prompt")
            raise

    def _refuse_chunk(self, spans: VisionSpans, methods: list[str], given: int) -> NoReturn:
        """Refuse a prompt that does not come in one piece, before the first layer or before its attention."""
        self._end_by(
            f"{' and '.join(methods)} chooses tokens while layers read the prompt and needs it in one piece, and got "
            f"{given} of its {spans.end - spans.start} tokens: pass all of it in one call",
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
