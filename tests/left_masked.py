# SPDX-License-Identifier: Apache-2.0
"""A full cache in which the tokens that left early are masked: naive attention that shares no code with plphp."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from invariants import attention_set
from plphp.pruning.report import PruneReport


def gone_by_layer(report: PruneReport, layers: int) -> list[list[Tensor]]:
    """By decoder layer and prompt, the tokens that the layer does not get, bool [batch, end of the prompt]."""
    gone: list[list[Tensor]] = [[] for _ in range(layers)]
    for prompt in report.prompts:
        mask = torch.zeros(report.batch, prompt.end, dtype=torch.bool)
        by_layer = {stage.layer: stage.positions for stage in prompt.stages}
        vision = [[place for image in row for place in image.positions] for row in prompt.images]
        for layer in range(layers):
            for row, kept in enumerate(by_layer.get(layer, [])):
                mask[row, vision[row]] = True
                mask[row, kept] = False
            gone[layer].append(mask.clone())
    return gone


@contextmanager
def left_tokens_masked(model: Any, report: PruneReport) -> Iterator[None]:
    """Mask, in each layer, what left before it, for every query but the token's own.

    A layer with a window holds the last of its keys, so that the tokens seen by each layer are counted here.
    """
    gone = gone_by_layer(report, model.config.get_text_config().num_hidden_layers)
    seen: dict[int, int] = defaultdict(int)

    def reference(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kw: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = key.double().repeat_interleave(groups, 1), value.double().repeat_interleave(groups, 1)
        logits = query.double() @ key.mT * (kw.get("scaling") or query.shape[-1] ** -0.5)
        if mask is not None:
            logits = logits + mask.double()
        layer, (queries, keys) = module.layer_idx, logits.shape[-2:]
        seen[layer] += queries
        place = torch.arange(seen[layer] - keys, seen[layer])
        for hidden in gone[layer]:
            known = (place >= 0) & (place < hidden.shape[1])
            columns = hidden[:, place.clamp(0, hidden.shape[1] - 1)] & known
            columns = columns.repeat_interleave(len(logits) // len(columns), 0)
            own = place[keys - queries :, None] == place
            logits = logits.masked_fill(columns[:, None, None] & ~own, -torch.inf)
        output = logits.softmax(-1) @ value
        return output.transpose(1, 2).to(query.dtype).contiguous(), None

    AttentionInterface.register("test_left_masked", reference)
    AttentionMaskInterface.register("test_left_masked", eager_mask)
    with attention_set(model, "test_left_masked", model.get_decoder()):
        yield
