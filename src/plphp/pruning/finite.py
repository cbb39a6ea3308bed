# SPDX-License-Identifier: Apache-2.0
"""Rows whose attention is NaN or inf: they cannot be ranked, so they are kept whole, and named with the cause."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from plphp.errors import NonFiniteAttentionError
from plphp.families.spans import VisionSpans

from .scoring import Scoring

log = logging.getLogger("plphp")

ADVICE = "look at how the images were loaded and normalised"
SUSPECTS = "look for NaN in the model's weights, or for numbers that are too large for its dtype"


def features_of(inputs: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    """Image features and embeddings among the inputs of a model: what is floating and no mask, by name."""
    features = {}
    for name, value in inputs.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        tensors = [part for part in values if isinstance(part, Tensor)]
        if tensors and "mask" not in name and all(tensor.is_floating_point() for tensor in tensors):
            features[name] = tensors
    return features


def damage(features: Mapping[str, Sequence[Tensor]]) -> str | None:
    """Say what holds NaN or inf, as in "pixel_values holds NaN"; None where all numbers are finite."""
    for name, tensors in features.items():
        for tensor in tensors:
            # A sum is NaN or inf where a number is, and takes no memory.
            if bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all()):
                continue
            return f"{name} holds {'NaN' if bool(tensor.isnan().any()) else 'inf'}"
    return None


def refuse_damaged(features: Mapping[str, Sequence[Tensor]]) -> None:
    """Refuse the image features of a single prompt, before anything of it is read.

    Raises
    ------
    NonFiniteAttentionError
        If they hold NaN or inf; the message says which.
    """
    reason = damage(features)
    if reason is not None:
        raise NonFiniteAttentionError(
            f"{reason} in row 0, the only row, whose attention would not be finite: {ADVICE}. Nothing was read."
        )


def cause_of(features: Mapping[str, Sequence[Tensor]] | None) -> str:
    """Say why attention may not be finite, in words that complete a sentence; ``features`` are None if unknown."""
    if features is None:
        return f"{ADVICE}, or {SUSPECTS}"
    reason = damage(features)
    if reason is not None:
        return f"{reason}: {ADVICE}"
    names = " and ".join(features) or "what was given"
    return f"{names} is finite, so {SUSPECTS}"


def rows_in_words(rows: Sequence[int]) -> str:
    """For example "row 1" or "rows 0, 2"."""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows))}"


def warn(rows: Sequence[int], layer: int, features: Mapping[str, Sequence[Tensor]] | None) -> None:
    """Name rows that are kept whole from a layer on."""
    log.warning(
        "The attention of %s is NaN or inf from layer %d on, so that its tokens cannot be ranked: they are all kept "
        "there, and its answer is not to be trusted (%s). The other rows are pruned as ever.",
        rows_in_words(rows),
        layer,
        cause_of(features),
    )


def refuse(rows: Sequence[int], layer: int, features: Mapping[str, Sequence[Tensor]] | None) -> None:
    """Refuse a batch of which no row is left that could be ranked.

    Raises
    ------
    NonFiniteAttentionError
    """
    raise NonFiniteAttentionError(
        f"the attention of layer {layer} is NaN or inf in {rows_in_words(rows)}, and no other row is left to answer: "
        f"{cause_of(features)}"
    )


class UnrankedRows:
    """The rows of a prompt whose scores are not finite, layer by layer: they are kept whole.

    A row is named in a warning the first time only. Where no row is left to rank, the prompt is refused.

    Parameters
    ----------
    spans : VisionSpans
        Which rows have vision tokens; the others have nothing to rank.
    features : mapping of str to sequence of Tensor, optional
        Image features of the prompt, to say why attention is not finite; None if unknown.
    """

    def __init__(self, spans: VisionSpans, features: Mapping[str, Sequence[Tensor]] | None) -> None:
        self.features = features
        self._has_vision = spans.vision.any(1).tolist()
        self._copies = 1
        self._named: set[int] = set()

    def repeat(self, times: int) -> None:
        """Repeat every row, as ``generate`` does for beams; messages go on naming the prompts as they were given."""
        self._has_vision = [vision for vision in self._has_vision for _ in range(times)]
        self._copies *= times

    def set_aside(self, scoring: Scoring, layer: int) -> list[int]:
        """Find the rows of a layer that cannot be ranked, and put 0 in the place of their scores.

        Returns
        -------
        list of int

        Raises
        ------
        NonFiniteAttentionError
            If no row is left.
        """
        if layer in scoring.unranked:
            return scoring.unranked[layer]
        finite = scoring.scores[layer].finite().tolist()
        rows = scoring.unranked[layer] = [
            row for row, vision in enumerate(self._has_vision) if vision and not finite[row]
        ]
        if rows:
            prompts = sorted({row // self._copies for row in rows})
            if len(rows) == len(finite):
                refuse(prompts, layer, self.features)
            new = [prompt for prompt in prompts if prompt not in self._named]
            if new:
                warn(new, layer, self.features)
            self._named.update(new)
            scoring.scores[layer] = scoring.scores[layer].blanked(rows)
        return rows
