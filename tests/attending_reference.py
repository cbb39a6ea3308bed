# SPDX-License-Identifier: Apache-2.0
"""What attention among important tokens has to equal: attention of all of them, with the rest masked and its rows 0."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from invariants import attention_set
from plphp.pruning.prompt_report import PromptReport
from plphp.pruning.report import PruneReport

Unimportant: TypeAlias = Sequence[tuple[PromptReport, Tensor]]
"""Prompts, each with the tokens that do not attend in a layer, bool [batch, end]."""


@contextmanager
def unimportant_masked(model: Any, report: PruneReport) -> Iterator[None]:
    """Mask, in each layer of a report, the tokens that did not attend, and set their own attention to 0.

    For queries behind a prompt they are masked as well, since they were dropped. Naive float64 attention over all
    entries, which shares no code with plphp.
    """
    rest = unimportant_tokens(report)

    def reference(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kw: Any) -> Any:
        logits, value = _logits(query, key, value, mask, kw)
        queries, keys = logits.shape[-2:]
        prompts = rest.get(getattr(module, "layer_idx", -1), [])
        position = torch.arange(keys - queries, keys)
        hidden, silent = hidden_and_silent(prompts, position, len(logits), keys, dropped=True)
        logits = logits.masked_fill(hidden[:, None], -torch.inf)
        output = (logits.softmax(-1) @ value).masked_fill(silent[:, None, :, None], 0)
        return output.transpose(1, 2).to(query.dtype).contiguous(), None

    with _attention(model, reference):
        yield


def hidden_and_silent(
    prompts: Unimportant, position: Tensor, batch: int, keys: int, *, dropped: bool = False
) -> tuple[Tensor, Tensor]:
    """What queries at some positions do not see of the keys of a full cache, and which of them attend to nothing.

    Parameters
    ----------
    prompts : sequence of (PromptReport, Tensor)
        With the tokens up to their ends that are not important in a layer.
    position : Tensor
        int64 [queries].
    batch, keys : int
        Rows, and keys of the cache.
    dropped : bool
        Whether those tokens are hidden from later queries, too.

    Returns
    -------
    tuple of Tensor
        bool [batch, queries, keys] and bool [batch, queries].
    """
    hidden = torch.zeros(batch, len(position), keys, dtype=torch.bool)
    silent = torch.zeros(batch, len(position), dtype=torch.bool)
    own = position[:, None] == torch.arange(keys)  # the softmax of an empty row would be NaN
    for prompt, unimportant in prompts:
        within = (position >= prompt.start) & (position < prompt.end)
        columns = torch.zeros(batch, keys, dtype=torch.bool)
        columns[:, : prompt.end] = unimportant[:, :keys]
        blind = position >= prompt.start if dropped else within
        hidden |= columns[:, None] & blind[:, None] & ~own
        silent |= columns[:, position] & within
    return hidden, silent


@dataclass(frozen=True)
class Rule:
    """ZipVL's choice, by the formulas of its paper.

    Parameters
    ----------
    tau : float
        Share of the attention that the important tokens have to carry.
    recent, drawn : int
        Probe rows at the end of the prompt, and of the rest of it.
    vision, valid : Tensor
        bool [batch, tokens] of a prompt.
    seed : int
        Of the draws.
    """

    tau: float
    recent: int
    drawn: int
    vision: Tensor
    valid: Tensor
    seed: int = 0

    def unimportant(self, attention: Tensor, row: int) -> list[int]:
        """The vision tokens that do not attend, from the attention of a row of the batch [q_heads, tokens, tokens]."""
        tokens = self.valid[row].nonzero()[:, 0].tolist()
        rest, recent = tokens[: -self.recent], tokens[-self.recent :]
        order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(self.seed)).tolist()
        probes = recent + [rest[number] for number in order[: self.drawn]]
        mean = attention.mean(0)
        accumulated = {j: sum(float(mean[i, j]) for i in probes) for j in tokens}
        seeing = {j: sum(i >= j for i in probes) for j in tokens}
        count, carried, total = 0, 0.0, sum(accumulated.values())
        for share in sorted(accumulated.values(), reverse=True):
            if carried >= self.tau * total:
                break
            carried += share
            count += 1
        by_score = sorted(tokens, key=lambda j: -accumulated[j] / max(1, seeing[j]))
        important = set(by_score[:count])
        if self.vision[row].any() and not important & set(self.vision[row].nonzero()[:, 0].tolist()):
            best = next(j for j in by_score if self.vision[row, j])  # a layer keeps ``min_kept`` vision tokens at least
            important.add(best)
        return [j for j in tokens if self.vision[row, j] and j not in important]


@contextmanager
def choosing(model: Any, rule: Rule) -> Iterator[dict[int, list[list[int]]]]:
    """Let each layer choose by a rule from its own attention, and attend among what it chose.

    Yields
    ------
    dict of int to list
        By layer, of each row the vision tokens that do not attend.
    """
    chosen: dict[int, list[list[int]]] = {}

    def reference(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kw: Any) -> Any:
        logits, value = _logits(query, key, value, mask, kw)
        queries, keys = logits.shape[-2:]
        layer, silent = module.layer_idx, torch.zeros(len(logits), queries, dtype=torch.bool)
        if layer not in chosen:
            weights = logits.softmax(-1)
            chosen[layer] = [rule.unimportant(weights[row], row) for row in range(len(weights))]
            for row, positions in enumerate(chosen[layer]):
                silent[row, positions] = True
        own = torch.arange(keys - queries, keys)[:, None] == torch.arange(keys)
        for row, positions in enumerate(chosen[layer]):
            columns = torch.zeros(keys, dtype=torch.bool)
            columns[positions] = True
            logits[row].masked_fill_(columns & ~own, -torch.inf)
        output = (logits.softmax(-1) @ value).masked_fill(silent[:, None, :, None], 0)
        return output.transpose(1, 2).to(query.dtype).contiguous(), None

    with _attention(model, reference):
        yield chosen


def _logits(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keywords: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    groups = query.shape[1] // key.shape[1]
    key, value = key.double().repeat_interleave(groups, 1), value.double().repeat_interleave(groups, 1)
    logits = query.double() @ key.mT * (keywords.get("scaling") or query.shape[-1] ** -0.5)
    return (logits if mask is None else logits + mask.double()), value


def unimportant_tokens(report: PruneReport) -> dict[int, Unimportant]:
    """By layer, each prompt with the tokens that did not attend, bool [batch, end]."""
    rest: dict[int, list[tuple[PromptReport, Tensor]]] = defaultdict(list)
    for prompt in report.prompts:
        for layer in prompt.attention:
            mask = torch.zeros(report.batch, prompt.end, dtype=torch.bool)
            for row, images in enumerate(prompt.images):
                mask[row, _positions(images)] = True
                mask[row, layer.positions[row]] = False
            rest[layer.layer].append((prompt, mask))
    return rest


def _positions(images: Sequence[Any]) -> list[int]:
    return [position for image in images for position in image.positions]


@contextmanager
def _attention(model: Any, function: Any) -> Iterator[None]:
    AttentionInterface.register("test_attending", function)
    AttentionMaskInterface.register("test_attending", eager_mask)
    with attention_set(model, "test_attending", model.get_decoder()):
        yield
