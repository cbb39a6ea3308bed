# SPDX-License-Identifier: Apache-2.0
"""Which vision tokens every layer and head holds, as bits for a page: ``show/page/bits.js`` reads them again."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from plphp.pruning.prompt_report import ImageReport, LayerReport, PromptReport, RowReport

WHOLE = "whole"


def kept_values(prompt: PromptReport) -> dict[str, Any]:
    """Return the vision tokens that layers and heads hold, as JSON-ready values.

    Parameters
    ----------
    prompt : PromptReport
        Of a single row.

    Returns
    -------
    dict
        ``layers``: by layer, its number, class, vision attention score, rate and KV heads. ``ways``: how tokens are
        held, "whole" and the rungs, from the fewest bytes on, each with ``share`` (bytes of an entry, as a fraction of
        one held whole) and ``bits``, see `packed`. ``left``: by stage at which tokens left before layers got them, its
        first layer without them and ``bits`` of the tokens.
    """
    tokens = [position for image in prompt.images[0] for position in image.positions]
    rows = [layer.rows[0] for layer in prompt.layers]
    shares = sorted(_shares(rows).items(), key=lambda way: way[1])
    ways = [{"name": name, "share": round(own, 4), "bits": packed(_held(rows, tokens, name))} for name, own in shares]
    return {"layers": list(map(_layer_values, prompt.layers)), "ways": ways, "left": _left_values(prompt, tokens)}


def packed(marks: Any) -> str:
    """Truth values as bits in base64, the first in the lowest bit of the first byte.

    Parameters
    ----------
    marks : ndarray
        bool, of any shape; those of a page are [layers and their heads, tokens of all images], row by row.
    """
    return base64.b64encode(np.packbits(marks.ravel(), bitorder="little").tobytes()).decode("ascii")


def image_values(image: ImageReport) -> dict[str, Any]:
    """The number of an image's tokens, and their grid ``[frames, height, width]``, or None without one."""
    return {"tokens": len(image.positions), "grid": None if image.grid is None else list(image.grid)}


def _layer_values(layer: LayerReport) -> dict[str, Any]:
    row = layer.rows[0]
    return {
        "layer": layer.layer,
        "class": row.layer_class,
        "score": round(row.vision_score, 4),
        "rate": round(row.rate, 4),
        "heads": len(row.kept_positions),
    }


def _shares(rows: Sequence[RowReport]) -> dict[str, float]:
    """By way of holding a token, the bytes of an entry as a fraction of those of one held whole."""
    shares = {WHOLE: 1.0} if any(any(row.whole) for row in rows) else {}
    for name in dict.fromkeys(tier.rung for row in rows for tier in row.tiers):
        tiers = [(tier, row) for row in rows for tier in row.tiers if tier.rung == name]
        whole = sum(row.entry_bytes * sum(tier.entries) for tier, row in tiers)
        shares[name] = sum(sum(tier.nbytes) for tier, _ in tiers) / whole if whole else 0.0
    return shares


def _held(rows: Sequence[RowReport], tokens: Sequence[int], way: str) -> Any:
    """Whether a head holds a token in this way; bool [layers and their heads, tokens]."""
    return np.stack(
        [np.isin(tokens, _positions(row, head, way)) for row in rows for head in range(len(row.kept_positions))]
    )


def _positions(row: RowReport, head: int, way: str) -> list[int]:
    coded = {tier.rung: tier.positions[head] for tier in row.tiers}
    if way != WHOLE:
        return coded.get(way, [])
    few = {position for positions in coded.values() for position in positions}
    return [position for position in row.kept_positions[head] if position not in few]


def _left_values(prompt: PromptReport, tokens: Sequence[int]) -> list[dict[str, Any]]:
    there = np.ones(len(tokens), dtype=bool)
    left = []
    for stage in prompt.stages:
        stays = np.isin(tokens, stage.positions[0])
        left.append({"stage": stage.stage, "layer": stage.layer, "bits": packed(there & ~stays)})
        there &= stays
    return left
