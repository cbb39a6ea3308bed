# SPDX-License-Identifier: Apache-2.0
"""The vision attention score per layer and query head over a set of prompts, for several choices of query rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from plphp.engines.hf.cache import PrunedCache
from plphp.errors import ConfigError
from plphp.families.spans import VisionSpans
from plphp.methods.registry import chain_of
from plphp.pruning.reading import PromptReading
from plphp.pruning.scoring import Attended
from plphp.settings.config import PLPHPConfig, QueryRows

from .profile_report import AttentionProfile, ProfiledPrompt
from .provenance import provenance
from .reading import read_prompt


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
    >>> measured = plphp.profile(model, [inputs], query_rows=(1, 8, "text"))  # doctest: +SKIP
    >>> measured.layer_scores("text").mean(0)  # doctest: +SKIP
    """
    rows = tuple(query_rows) if isinstance(query_rows, (list, tuple)) else (query_rows,)
    if not rows or None in rows or len(set(rows)) != len(rows):
        raise ConfigError(f"query_rows must be different choices, at least one, got {query_rows!r}.")
    choices = [PLPHPConfig(method="none", query_rows=choice) for choice in rows]
    measured: list[ProfiledPrompt] = []
    layers: tuple[int, ...] = ()
    for number, inputs in enumerate(prompts, 1):
        progress(f"prompt {number}")
        readings = _read(model, inputs, choices)
        if readings:
            layers = tuple(sorted(readings[0].kv.scores))
            measured += _measured(readings)
    if not measured:
        raise ConfigError("No prompt with a vision token was given: a profile needs at least one.")
    return AttentionProfile(rows, layers, tuple(measured), provenance(model))


def _read(model: PreTrainedModel, inputs: Mapping[str, Any], choices: Sequence[PLPHPConfig]) -> list[PromptReading]:
    """Read a prompt once, and score it by each choice; nothing for a prompt without a vision token.

    The cache is gone when this returns, and with it all that the model carries for it.
    """
    cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig(method="none"))
    spans = None if cache.reading is None else cache.reading.spans
    readings = [] if spans is None else [_observer(cache, spans, choice) for choice in choices]
    with cache.listening(_all_of(readings)):
        read_prompt(model, inputs, cache)
    return readings


def _observer(cache: PrunedCache, spans: VisionSpans, choice: PLPHPConfig) -> PromptReading:
    """A reading that scores every layer by a choice of query rows, and places nothing."""
    layers = len(cache.layers)
    return PromptReading(spans, chain_of(choice, layers), range(layers), layers)


def _all_of(readings: Sequence[PromptReading]) -> Callable[[Attended], None]:
    def listener(attended: Attended) -> None:
        for reading in readings:
            reading.observe(attended)

    return listener


def _measured(readings: Sequence[PromptReading]) -> list[ProfiledPrompt]:
    """The vision attention scores of each row of a batch that has vision tokens."""
    spans = readings[0].spans
    vision, valid = spans.vision.sum(1).tolist(), spans.valid.sum(1).tolist()
    # [choice][layer], each [row][head]
    heads = [
        [
            scores.attention.masked_fill(~scores.vision[:, None], 0).sum(-1).tolist()
            for _, scores in sorted(reading.kv.scores.items())
        ]
        for reading in readings
    ]
    return [
        ProfiledPrompt(
            tokens=valid[row],
            vision_tokens=vision[row],
            # Six digits are more than float32 attention has to say, and keep the file small.
            scores=tuple(tuple(tuple(float(f"{s:.6g}") for s in layer[row]) for layer in choice) for choice in heads),
        )
        for row in range(len(vision))
        if vision[row]
    ]
