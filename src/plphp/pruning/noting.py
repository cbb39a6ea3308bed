# SPDX-License-Identifier: Apache-2.0
"""Keeping the ledger of a layer up to date when a prompt is placed."""

from __future__ import annotations

import torch

from plphp.errors import CacheStateError
from plphp.kernels.coded import CodedKV
from plphp.kernels.coded_bytes import row_nbytes
from plphp.kernels.prompt_codes import PromptCodes

from .entries import LayerEntries
from .ledger import Labels, LayerLedger, codes_of
from .placement import LayerPlacement, Placement
from .tail_tokens import TailTokens


def note_placed(layer: LayerEntries, tokens: TailTokens, part: LayerPlacement, prompt: int) -> None:
    """Bring the ledger of a layer up to date after a final placement, and put its codes into one block.

    Parameters
    ----------
    layer : LayerEntries
        It has just been compacted.
    tokens : TailTokens
        Those of its tail before that.
    part : LayerPlacement
        What was placed, with scores.
    prompt : int
        Logical position at which the prompt begins.
    """
    if part.score is None:
        raise CacheStateError("A placement came without the scores that a ledger keeps.")
    placement, score = part.placement.cpu(), part.score.detach().cpu().nan_to_num(nan=0.0)
    position = tokens.of(torch.arange(tokens.end).expand(len(placement), -1), -1)
    kept = placement == Placement.WHOLE
    whole = Labels.where(kept, position, score)
    vision = (kept & part.scores.vision.cpu()[:, None]).sum((1, 2))
    weights = [float(count * layer.pair_nbytes) for count in vision.tolist()]
    old, codes = codes_of(layer.coded), None
    new: tuple[Labels, ...] = ()
    last = layer.coded[-1] if layer.coded else None
    if isinstance(last, CodedKV) and part.coder is not None:
        codes = PromptCodes.of(last, prompt)
        masks = [placement == 1 + part.coder.rungs.index(tier.rung) for tier in last.tiers]
        new = tuple(Labels.where(mask, position, score).select(codes.owners) for mask in masks)
        for part_number, owner in enumerate(codes.owners):
            weights[owner] += row_nbytes(codes.block, part_number)
    before = layer.ledger or LayerLedger(whole.nothing(), (), (0.0,) * len(placement))
    layer.ledger = LayerLedger(
        before.whole.appended(whole),
        _joined(before.coded, old, new, codes),
        tuple(a + b for a, b in zip(before.weights, weights, strict=True)),
    )
    if codes is not None:
        layer.coded = (codes if old is None else old.appended(codes),)


def _joined(
    old: tuple[Labels, ...], codes: PromptCodes | None, new: tuple[Labels, ...], newer: PromptCodes | None
) -> tuple[Labels, ...]:
    """Labels of the tiers of two blocks that were put below each other, see `plphp.kernels.prompt_codes.stacked`."""
    if codes is None or newer is None:
        return old or new
    by_rung = [
        {tier.rung: labels for tier, labels in zip(block.block.tiers, own, strict=True)}
        for block, own in ((codes, old), (newer, new))
    ]
    blank = old[0].nothing(), new[0].nothing()
    rungs = dict.fromkeys([*by_rung[0], *by_rung[1]])
    return tuple(
        Labels.stacked([own.get(rung, none) for own, none in zip(by_rung, blank, strict=True)]) for rung in rungs
    )
