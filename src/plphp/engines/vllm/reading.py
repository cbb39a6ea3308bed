# SPDX-License-Identifier: Apache-2.0
"""A request in the worker: the flow of `plphp.pruning.reading` over a prompt on its way into the paged cache.

Three things are vLLM's own about it: where the vision tokens are (`vision_spans`), that evicted entries are rounded to
whole blocks (`plphp.engines.vllm.rounding`), and that kept entries move to the end of the prompt's slots.

Why right-aligned: vLLM finds the slot of a token by its position, and the tokens behind the prompt have theirs already.
Kept entries at the end of the prompt's slots leave whole blocks empty at its head, which a block table that begins
later simply skips. Left-aligned they would leave a gap in the middle, which no block table can express. Attention does
not care where an entry lies, as rotary positions are in the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from plphp.families.spans import VisionSpans
from plphp.kernels import compact_kv
from plphp.kernels.packed import PackedKV
from plphp.policy.allocation import RowAllocation
from plphp.policy.bank import QueryBank
from plphp.pruning.entries import LayerEntries
from plphp.pruning.placement import LayerPlacement, held_whole
from plphp.pruning.reading import PromptReading
from plphp.pruning.scoring import Attended

from .rounding import evict_whole_blocks
from .setup import Setup

VISUAL = ("image", "video")
"""Modalities of vLLM whose tokens are vision tokens."""


@dataclass(frozen=True)
class PrunedPart:
    """What a layer keeps of a prompt.

    Parameters
    ----------
    layer : int
        Decoder layer.
    allocation : RowAllocation
        What the layer level decided.
    kept : float
        Vision tokens that a KV head keeps, with those that fill up a block; the mean over the heads.
    blocks : int
        Blocks at the head of the prompt that fall empty.
    entries : PackedKV, optional
        What this process keeps in its heads, text included; None where no block falls empty.
    """

    layer: int
    allocation: RowAllocation
    kept: float
    blocks: int
    entries: PackedKV | None


@dataclass
class RequestReading:
    """The prompt of one request in the worker.

    Parameters
    ----------
    tokens : int
        Length of the prompt.
    setup : Setup
        How the worker prunes.
    prompt : PromptReading, optional
        None where nothing is to be pruned: without vision tokens, as long as a bank is being collected, or when all
        layers are done.
    dropped : dict of int to int
        By decoder layer, the blocks at the head of the prompt that are empty.
    """

    tokens: int
    setup: Setup
    prompt: PromptReading | None
    dropped: dict[int, int] = field(default_factory=dict)
    _layers: dict[int, LayerEntries] = field(default_factory=dict)

    @classmethod
    def of(cls, request: Any, setup: Setup, own_bank: Callable[[], QueryBank | None] | None = None) -> RequestReading:
        """Plan the prompt of a request.

        Parameters
        ----------
        request : vllm.v1.worker.gpu_input_batch.CachedRequestState
            Has the length of the prompt and the positions of its images.
        setup : Setup
            How the worker prunes.
        own_bank : callable, optional
            Asked, for a prompt with vision tokens, for the bank that the worker has collected by itself; it gives None
            where the prompt stays whole for want of a bank. None where no such bank is wanted.
        """
        tokens = request.num_prompt_tokens
        spans = vision_spans(request.mm_features, tokens)
        if not bool(spans.vision.any()):
            return cls(tokens, setup, None)
        bank = None if own_bank is None else own_bank()
        if own_bank is not None and bank is None:
            return cls(tokens, setup, None)
        delta = getattr(request, "mrope_position_delta", None)
        prompt = PromptReading(
            spans,
            setup.chain,
            range(setup.layers),
            setup.layers,
            rope_delta=None if delta is None else torch.tensor([[delta]]),
            own_bank=bank,
            join_heads=setup.tensor_parallel.all_heads,
            round_up=partial(evict_whole_blocks, block_size=setup.block_size),
        )
        return cls(tokens, setup, prompt)

    @property
    def vision_tokens(self) -> int:
        """Vision tokens of the prompt that is being read."""
        return 0 if self.prompt is None else int(self.prompt.spans.vision.sum())

    def is_last(self, layer: int) -> bool:
        """Whether the prompt has been read when this layer has read it."""
        return self.prompt is not None and layer == self.prompt.last_layer

    def read(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Iterator[PrunedPart]:
        """Take a chunk of the prompt in, and prune the layers that can be decided now.

        Parameters
        ----------
        layer : int
            Decoder layer.
        query, keys, values : Tensor
            [tokens, heads, dim]; post-RoPE, of the tokens behind those that the layer has read.
        scaling : float
            Factor on the logits.
        """
        if self.prompt is None:
            return
        entries = self._layers.get(layer)
        keys, values = _with_batch(keys), _with_batch(values)
        if entries is None:
            entries = self._layers[layer] = LayerEntries()
            # `LayerEntries` holds the first entries without a copy, and vLLM reuses the memory of a pass.
            keys, values = keys.clone(), values.clone()
        entries.append(keys, values)
        for part in self.prompt.read(Attended(layer, _with_batch(query), entries, scaling)):
            yield self._compacted(part)

    def _compacted(self, part: LayerPlacement) -> PrunedPart:
        """What a layer keeps, and how many blocks fall empty by it."""
        # All heads evict as many entries, in whole blocks (`evict_whole_blocks`): the first head speaks for all.
        layer, keep = part.scores.layer, held_whole(part.placement)
        blocks = int((~keep[0, 0]).sum()) // self.setup.block_size
        kept = (keep[0] & part.scores.vision[0]).sum().item() / part.scores.kv_heads
        entries = self._layers.pop(layer)
        packed = compact_kv(*entries.tail(), self.setup.tensor_parallel.own_heads(keep)) if blocks else None
        self.dropped[layer] = blocks
        [allocation] = part.allocation
        return PrunedPart(layer, allocation, kept, blocks, packed)

    def finish(self) -> None:
        """Free the keys, values and queries that were held until the prompt was decided."""
        self.prompt = None
        self._layers.clear()


def vision_spans(features: Sequence[Any], tokens: int) -> VisionSpans:
    """Find the vision tokens of a prompt in vLLM's list of its images, videos and sounds.

    An item may cover text, such as row separators: only tokens that get an embedding of its are vision tokens.

    Parameters
    ----------
    features : sequence of vllm.multimodal.inputs.MultiModalFeatureSpec
        The items, in any order.
    tokens : int
        Length of the prompt.
    """
    segment = torch.full((1, tokens), -1)
    visual = sorted((item for item in features if item.modality in VISUAL), key=lambda item: item.mm_position.offset)
    for number, feature in enumerate(visual):
        for first, last in feature.mm_position.extract_embeds_range():
            segment[0, first : last + 1] = number
    valid = torch.ones(1, tokens, dtype=torch.bool)
    return VisionSpans(segment=segment, valid=valid, start=0, grids=((None,) * len(visual),))


def _with_batch(states: Tensor) -> Tensor:
    """[tokens, heads, dim] as [1, heads, tokens, dim]."""
    return states.transpose(0, 1)[None]
