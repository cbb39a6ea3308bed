# SPDX-License-Identifier: Apache-2.0
"""KV heads whose keys or values are too large for the scales of codes, which are float16: their entries stay whole."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from plphp.kernels.codecs import ScaleError
from plphp.kernels.coded import CodedKV
from plphp.kernels.coder import Coder

from .placement import Placement, in_few_bits, without_codes

log = logging.getLogger("plphp")

Pairs = list[tuple[int, int]]
"""Rows with a KV head of each."""


def coded_or_whole(
    coder: Coder, keys: Tensor, values: Tensor, vision: Tensor, placement: Tensor
) -> tuple[CodedKV | None, Tensor]:
    """Hold entries in few bits, and those of heads that cannot be held so whole.

    Parameters
    ----------
    coder : Coder
    keys, values, vision, placement : Tensor
        As for `plphp.kernels.coder.Coder.encode`.

    Returns
    -------
    coded : CodedKV or None
        What is held in few bits.
    placement : Tensor
        uint8 [batch, kv_heads, seq]; the same tensor where no head is too large.

    Raises
    ------
    UnsupportedFeatureError
        If a rung cannot hold such entries, or they are NaN or inf.
    """
    try:
        return coder.encode(keys, values, vision, placement), placement
    except ScaleError:
        coded = in_few_bits(placement)
        used = coded | vision.to(coded.device)[:, None]
        finite = [torch.where(used[..., None], states, 0).isfinite().all(-1).all(-1) for states in (keys, values)]
        if bool((coded.any(-1) & ~(finite[0] & finite[1])).any()):
            raise

    def fits(pairs: Pairs) -> bool:
        alone = without_codes(placement)
        for row, head in pairs:
            alone[row, head] = placement[row, head]
        try:
            coder.encode(keys, values, vision, alone)
        except ScaleError:
            return False
        return True

    holding: Pairs = [(row, head) for row, head in coded.any(-1).nonzero().tolist()]
    placement = placement.clone()
    for row, head in _unfit(holding, fits):
        placement[row, head].masked_fill_(coded[row, head], Placement.WHOLE)
    return coder.encode(keys, values, vision, placement), placement


def warn(layer: int, asked: Tensor, placement: Tensor) -> None:
    """Name the KV heads of a layer of which entries are held whole that a placement has asked few bits for."""
    heads = (asked != placement).any(-1).any(0).nonzero()[:, 0].tolist()
    _warn_once(layer, tuple(heads))


def _unfit(pairs: Pairs, fits: Callable[[Pairs], bool]) -> Pairs:
    """Those of several pairs that do not fit, by halving: they are few, and each trial codes a layer."""
    if fits(pairs):
        return []
    if len(pairs) == 1:
        return pairs
    half = len(pairs) // 2
    return _unfit(pairs[:half], fits) + _unfit(pairs[half:], fits)


@cache
def _warn_once(layer: int, heads: tuple[int, ...]) -> None:
    """Warn the first time that these heads of a layer are named: they will be in most prompts."""
    log.warning(
        "Keys or values of layer %d are beyond 65,504 in KV head(s) %s, which is too large for the float16 scales of "
        "few bits: there they are held whole, in the prompts that have such numbers.",
        layer,
        ", ".join(map(str, heads)),
    )
