# SPDX-License-Identifier: Apache-2.0
"""A prompt on its way into the paged cache: what is held of it until its end, and what leaves then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plphp.engines.hf.layer import PrunedLayer
from plphp.families.spans import VisionSpans
from plphp.kernels import compact_kv
from plphp.kernels.packed import PackedKV
from plphp.policy.allocation import RowAllocation
from plphp.policy.method import Method
from plphp.pruning.plan import PromptPlan
from plphp.settings.config import PLPHPConfig

from .ranks import Ranks
from .rounding import evict_whole_blocks

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
        Vision tokens that a KV head keeps, those included that fill up a block; the mean over the heads.
    blocks : int
        Blocks at the head of the prompt that fall empty.
    entries : PackedKV, optional
        What is kept, text included; None where nothing leaves.
    """

    layer: int
    allocation: RowAllocation
    kept: float
    blocks: int
    entries: PackedKV | None


@dataclass
class PromptReading:
    """One request in the worker.

    Parameters
    ----------
    tokens : int
        Length of the prompt.
    plan : PromptPlan, optional
        None where nothing is to be pruned: without vision tokens, or when all layers are done.
    dropped : dict of int to int
        By decoder layer, the blocks at the head of the prompt that are empty.
    """

    tokens: int
    plan: PromptPlan | None
    dropped: dict[int, int] = field(default_factory=dict)
    _layers: dict[int, PrunedLayer] = field(default_factory=dict)

    @classmethod
    def of(cls, request: Any, config: PLPHPConfig, method: Method) -> PromptReading:
        """Plan the prompt of a request.

        Parameters
        ----------
        request : vllm.v1.worker.gpu_input_batch.CachedRequestState
            Gives the length of the prompt and the places of its images.
        config : PLPHPConfig
            The settings.
        method : Method
            What ranks.
        """
        tokens = request.num_prompt_tokens
        spans = vision_spans(request.mm_features, tokens)
        if not bool(spans.vision.any()):
            return cls(tokens, None)
        delta = getattr(request, "mrope_position_delta", None)
        rope_delta = None if delta is None else torch.tensor([[delta]])
        return cls(tokens, PromptPlan.of(spans, config, method.evidence(config), custom=False, rope_delta=rope_delta))

    @property
    def vision_tokens(self) -> int:
        """Vision tokens of the prompt that is being read."""
        return 0 if self.plan is None else int(self.plan.spans.vision.sum())

    def read(self, layer_idx: int, query: Tensor, keys: Tensor, values: Tensor, begin: int) -> bool:
        """Take a chunk of the prompt in.

        Parameters
        ----------
        layer_idx : int
            Decoder layer.
        query, keys, values : Tensor
            [tokens, heads, dim]; post-RoPE.
        begin : int
            Position of the first of them.

        Returns
        -------
        bool
            Whether the layer has read the whole prompt.
        """
        if self.plan is None:
            return False
        self.plan.gather(layer_idx, _with_batch(query), begin)
        keys, values = _with_batch(keys), _with_batch(values)
        layer = self._layers.get(layer_idx)
        if layer is None:
            layer = self._layers[layer_idx] = PrunedLayer()
            # It holds its first entries as they come, and the engine may write others into their memory later.
            keys, values = keys.clone(), values.clone()
        layer.update(keys, values)
        return layer.get_seq_length() >= self.tokens

    def score(self, layer_idx: int, scaling: float, ranks: Ranks) -> None:
        """Score all heads of a layer that has read the whole prompt, see `PromptPlan.score`."""
        if self.plan is not None:
            self.plan.score(layer_idx, self._layers[layer_idx], scaling)
            self.plan.scores[layer_idx] = ranks.whole(self.plan.scores[layer_idx])

    def evict(
        self, method: Method, config: PLPHPConfig, judged: Sequence[int], block_size: int, ranks: Ranks
    ) -> Iterator[PrunedPart]:
        """Allocate, select and compact in the layers that are scored and not yet done."""
        if self.plan is None:
            return
        for scores, [[allocation]], [chosen], rank in self.plan.choose(method, [config], judged):
            assert rank is not None  # methods of the prompt stage are refused at the start
            layer = self._layers.pop(scores.layer)
            keep, blocks = evict_whole_blocks(chosen, rank, scores, block_size)
            kept = (keep[0] & scores.vision[0]).sum().item() / scores.kv_heads
            entries = compact_kv(*layer.tail(), ranks.part(keep)) if blocks else None
            self.dropped[scores.layer] = blocks
            yield PrunedPart(scores.layer, allocation, kept, blocks, entries)
        self.plan.scores.clear()

    def finish(self) -> None:
        """Let go of what was held for the scores."""
        self.plan = None
        self._layers.clear()


def vision_spans(features: Sequence[Any], tokens: int) -> VisionSpans:
    """Find the vision tokens of a prompt in vLLM's list of its images, videos and sounds.

    Parameters
    ----------
    features : sequence of vllm.multimodal.inputs.MultiModalFeatureSpec
        In any order.
    tokens : int
        Length of the prompt.
    """
    segment = torch.full((1, tokens), -1)
    visual = sorted((one for one in features if one.modality in VISUAL), key=lambda one: one.mm_position.offset)
    for number, feature in enumerate(visual):
        for first, last in feature.mm_position.extract_embeds_range():
            segment[0, first : last + 1] = number
    real = torch.ones(1, tokens, dtype=torch.bool)
    return VisionSpans(segment=segment, real=real, start=0, grids=((None,) * len(visual),))


def _with_batch(states: Tensor) -> Tensor:
    """[tokens, heads, dim] as [1, heads, tokens, dim]."""
    return states.transpose(0, 1)[None]
