# SPDX-License-Identifier: Apache-2.0
"""The vision attention score per layer and query head over a set of prompts, for several choices of query rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from plphp.engines.hf.cache import PrunedCache
from plphp.errors import ConfigError
from plphp.pruning.plan import PromptPlan
from plphp.settings.config import PLPHPConfig, QueryRows

from .profile_report import AttentionProfile, ProfiledPrompt
from .provenance import provenance
from .reading import read_prompt


class _WatchedCache(PrunedCache):
    """A cache that evicts nothing and scores every layer once for each choice of query rows."""

    choices: Sequence[PLPHPConfig] = ()
    watched: tuple[PromptPlan, ...] = ()

    def plan(self, inputs: Mapping[str, Any], *, vision_mask: Tensor | None = None) -> dict[str, Any]:
        own, plans = self.config, []
        for choice in self.choices:
            self.config = choice
            super().plan(inputs, vision_mask=vision_mask)
            plans.append(self._plan)
        self.watched = tuple(plan for plan in plans if plan is not None)
        self.config = own
        return super().plan(inputs, vision_mask=vision_mask)

    def after_attention(self, layer_idx: int, query: Tensor, scaling: float) -> None:
        # Before the layer is packed: its tail holds the keys of the whole prompt.
        layer = self._pruned[layer_idx]
        for plan in self.watched:
            plan.gather(layer_idx, query, layer.get_seq_length() - query.shape[2])
            if layer.get_seq_length() == plan.spans.end:
                plan.score(layer_idx, layer, scaling)
        super().after_attention(layer_idx, query, scaling)


def profile(
    model: PreTrainedModel,
    prompts: Iterable[Mapping[str, Any]],
    query_rows: Sequence[QueryRows] = (1, "text"),
    *,
    progress: Callable[[str], None] = lambda step: None,
) -> AttentionProfile:
    """Measure how much of its attention each layer and query head gives to the vision tokens.

    Each prompt is read once, unpruned, with the model's own attention; the rows are scored from the post-RoPE queries
    and keys of that pass, in float32.

    Parameters
    ----------
    model : PreTrainedModel
        A supported vision-language model, in evaluation mode.
    prompts : iterable of mapping
        Inputs of ``generate``; a row of a batch counts as a prompt, and one without a vision token is left out.
    query_rows : sequence of int or "text"
        Whose attention is measured, see `PLPHPConfig`: the mean over the last n prompt tokens (1 is the paper's), or
        over all text after the last image.
    progress : callable
        Told what is going on, in a few words.

    Returns
    -------
    AttentionProfile

    Raises
    ------
    ConfigError
        If a choice of query rows is not valid or given twice, or no prompt has a vision token.
    UnsupportedModelError, UnsupportedFeatureError, SpanError

    Examples
    --------
    >>> found = plphp.profile(model, [inputs], query_rows=(1, 8, "text"))  # doctest: +SKIP
    >>> found.layer_scores("text").mean(0)  # doctest: +SKIP
    """
    rows = tuple(query_rows) if isinstance(query_rows, (list, tuple)) else (query_rows,)
    if not rows or None in rows or len(set(rows)) != len(rows):
        raise ConfigError(f"query_rows must be different choices, at least one, got {query_rows!r}.")
    keep_all = PLPHPConfig(method="none")
    choices = [PLPHPConfig(method="none", query_rows=choice) for choice in rows]
    found: list[ProfiledPrompt] = []
    layers: tuple[int, ...] = ()
    for number, inputs in enumerate(prompts, 1):
        progress(f"prompt {number}")
        cache = _WatchedCache.for_inputs(model, inputs, keep_all)
        cache.choices = choices  # counts from the next plan on, which generate makes
        read_prompt(model, inputs, cache)
        if cache.watched:
            layers = tuple(sorted(cache.watched[0].scores))
            found += _measured(cache.watched)
        del cache  # the model is as it was when no cache is left
    if not found:
        raise ConfigError("No prompt with a vision token was given: a profile needs at least one.")
    return AttentionProfile(rows, layers, tuple(found), provenance(model))


def _measured(plans: Sequence[PromptPlan]) -> list[ProfiledPrompt]:
    """The vision attention scores of each row of a batch that has vision tokens."""
    vision, real = plans[0].spans.vision.sum(1).tolist(), plans[0].spans.real.sum(1).tolist()
    # [choice][layer], each [row][head]
    heads = [
        [
            plan.scores[layer].attention.masked_fill(~plan.scores[layer].vision[:, None], 0).sum(-1).tolist()
            for layer in sorted(plan.scores)
        ]
        for plan in plans
    ]
    return [
        ProfiledPrompt(
            tokens=real[row],
            vision_tokens=vision[row],
            # Six digits are more than float32 attention has to say, and keep the file small.
            scores=tuple(tuple(tuple(float(f"{s:.6g}") for s in layer[row]) for layer in choice) for choice in heads),
        )
        for row in range(len(vision))
        if vision[row]
    ]
