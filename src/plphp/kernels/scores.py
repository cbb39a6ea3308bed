# SPDX-License-Identifier: Apache-2.0
"""Attention of the prompt's last queries over all keys, without a seq x seq matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import choice
from .head_groups import head_groups
from .ordering import positions_in_order
from .packed import PackedKV
from .precision import as_written

KEYS_AT_ONCE = 2048
"""Keys that are held in float32 at once."""
MASS_AT_ONCE = 2**18
"""Attention weights of as many query rows as stay below are worked out at once."""
LOGITS_AT_ONCE, LOGITS_AT_ONCE_ON_CPU = 2**22, 2**19
"""Logits of heads of the prefix that are held in float32 at once, unless those of a query row are more; on a CPU as
many as its caches hold."""


@dataclass
class WindowScores:
    """What some query rows say about every entry; each tensor but ``attention`` only where it was asked for.

    Parameters
    ----------
    attention : Tensor
        float32 [batch, q_heads, seq]; weighted mean of the query rows' softmax mass on each entry.
    peak : Tensor, optional
        float32 [batch, q_heads, seq]; largest softmax mass that any query row gives to an entry.
    best_position : Tensor, optional
        int64 [batch, kv_heads, seq]; the first position (0 is the highest mass) that an entry has in the order of any
        query row. ``seq`` where no query row sees it.
    density : Tensor, optional
        float32 [batch, q_heads]; share of the entries seen by a query row that get at least a given fraction of the
        row's maximum, as a weighted mean over the query rows.
    among_rows : Tensor, optional
        float32 [batch, q_heads, window, window]; softmax mass that each query row gives to each. NaN may stand where
        either has no weight.
    """

    attention: Tensor
    peak: Tensor | None = None
    best_position: Tensor | None = None
    density: Tensor | None = None
    among_rows: Tensor | None = None


class Window(NamedTuple):
    """Query rows and the keys that they see; `window_scores` says what each is."""

    query: Tensor
    weight: Tensor
    position: Tensor
    keys: Tensor
    valid: Tensor
    prefix: PackedKV | None
    scaling: float


def window_scores(
    query: Tensor,
    weight: Tensor,
    position: Tensor,
    keys: Tensor,
    valid: Tensor,
    prefix: PackedKV | None,
    scaling: float,
    *,
    peak: bool = False,
    best_position: bool = False,
    density: float | None = None,
    among_rows: bool = False,
    candidates: Tensor | None = None,
    gqa_reduction: str = "mean",
) -> WindowScores:
    """Softmax mass that a few query rows give to every entry of the tail, over prefix and tail together.

    On a CUDA device a Triton kernel does it, where it can and does it right, and nothing beside the mean is asked for.

    Parameters
    ----------
    query : Tensor
        [batch, q_heads, window, dim]; post-RoPE queries, in a dtype that may differ from that of the keys.
    weight : Tensor
        float [batch, window]; share of each query in the mean of its row, 0 where it does not count.
    position : Tensor
        int64 [window]; index of each query in the tail. It sees the tail up to there.
    keys : Tensor
        [batch, kv_heads, seq, dim]; post-RoPE keys of the tail.
    valid : Tensor
        bool [batch, seq]; False on padding, which nobody sees.
    prefix : PackedKV, optional
        Kept entries of earlier turns, seen by every query.
    scaling : float
        Factor on the logits.
    peak, best_position, among_rows : bool
        Work out the tensors of these names, too. For ``among_rows`` all query rows stand in the tail.
    density : float, optional
        Work out the density at this fraction of a row's maximum, in [0, 1].
    candidates : Tensor, optional
        bool [batch, seq]; the entries that are put in order for ``best_position``. Default: all.
    gqa_reduction : {"mean", "max"}
        How the query heads of a KV head are combined for ``best_position``.

    Returns
    -------
    WindowScores
        Computed in float32, under autocast too. NaN where a query or a visible key is NaN.
    """
    window = Window(query, weight, position, keys, valid, prefix, scaling)
    if not (peak or best_position or among_rows or density is not None):
        reason = choice.unsupported_by_triton(query, keys, *([] if prefix is None else [prefix.keys]))
        if choice.usable("window_scores", "Triton", reason, triton_trial, keys, keys):
            from . import _scores_triton

            return WindowScores(_scores_triton.attention_mass(*window))
    with as_written(keys.device):
        return _by_torch(window, peak, best_position, density, among_rows, candidates, gqa_reduction)


@dataclass(frozen=True)
class _Mass:
    """Softmax mass of some query rows, and what it says of the entries.

    The mass of a query row that sees nothing but padding is NaN, and that of a row that does not count may be; both
    have a share of 0, and are left out by it rather than by a product, in which NaN would stay.

    Parameters
    ----------
    mass : Tensor
        float32 [batch, q_heads, rows, seq].
    visible : Tensor
        bool [batch, rows, seq]; the entries of the tail that each query row sees.
    share : Tensor
        float [batch, 1, rows, 1]; the weight of each query row in a mean, 0 where it does not count.
    numbers : Tensor
        int64 [rows]; the numbers of these query rows.
    """

    mass: Tensor
    visible: Tensor
    share: Tensor
    numbers: Tensor

    def mean_mass(self) -> Tensor:
        """What the query rows add to the mean mass, float32 [batch, q_heads, seq]."""
        return torch.where(self.share > 0, self.mass * self.share, 0).sum(2)

    def peak(self) -> Tensor:
        """Largest mass of any query row that counts, float32 [batch, q_heads, seq]."""
        return torch.where(self.share > 0, self.mass, 0).amax(2)

    def best_position(self, kv_heads: int, candidates: Tensor | None, gqa_reduction: str) -> Tensor:
        """First position of each entry in the order of any query row that counts, int64 [batch, kv_heads, seq]."""
        ordered = self.visible if candidates is None else self.visible & candidates[:, None]
        group = self.mass.unflatten(1, (kv_heads, -1))
        combined = group.amax(2) if gqa_reduction == "max" else group.mean(2)
        positions = positions_in_order(combined, ordered)
        return torch.where(self.share > 0, positions, self.mass.shape[-1]).amin(2)

    def density(self, fraction: float) -> Tensor:
        """What the query rows add to the mean density at a fraction of their maxima, float32 [batch, q_heads]."""
        dense = (self.mass >= fraction * self.mass.amax(-1, keepdim=True)) & self.visible[:, None]
        density = dense.sum(-1).float() / self.visible.sum(-1)[:, None]
        share = self.share[..., 0]
        return torch.where(share > 0, density * share, 0).sum(2)


def _by_torch(
    window: Window,
    peak: bool = False,
    best_position: bool = False,
    density: float | None = None,
    among_rows: bool = False,
    candidates: Tensor | None = None,
    gqa_reduction: str = "mean",
) -> WindowScores:
    """The reference; all as in `window_scores`."""
    batch, q_heads, _, _ = window.query.shape
    _, kv_heads, seq, _ = window.keys.shape
    scores = WindowScores(torch.zeros(batch, q_heads, seq, dtype=torch.float32, device=window.keys.device))
    if peak:
        scores.peak = torch.zeros_like(scores.attention)
    if best_position:
        scores.best_position = torch.full((batch, kv_heads, seq), seq, device=window.keys.device)
    if density is not None:
        scores.density = torch.zeros_like(scores.attention[..., 0])
    if among_rows:
        window_rows = len(window.position)
        scores.among_rows = scores.attention.new_zeros(batch, q_heads, window_rows, window_rows)
    for rows in _masses(window):
        scores.attention += rows.mean_mass()
        if scores.peak is not None:
            scores.peak = torch.maximum(scores.peak, rows.peak())
        if scores.best_position is not None:
            positions = rows.best_position(kv_heads, candidates, gqa_reduction)
            scores.best_position = torch.minimum(scores.best_position, positions)
        if scores.density is not None and density is not None:
            scores.density += rows.density(density)
        if scores.among_rows is not None:
            scores.among_rows[:, :, rows.numbers] = rows.mass[..., window.position]
    return scores


def _masses(window: Window) -> Iterator[_Mass]:
    """Softmax mass of the query rows that count in any row of the batch, a few of them at a time."""
    query, weight, position, keys, valid, prefix, scaling = window
    batch, q_heads = query.shape[:2]
    kv_heads, seq = keys.shape[1:3]
    grouped = (query.float() * scaling).unflatten(1, (kv_heads, -1))
    visible = valid[:, None] & (torch.arange(seq, device=keys.device) <= position[:, None])
    step = max(1, MASS_AT_ONCE // (batch * q_heads * seq))
    counted = weight.any(0).nonzero()[:, 0]
    # Of all rows at once: heads of a prefix are many, and a product with each takes as long for a few rows.
    of_prefix = None if prefix is None else _prefix_lse(grouped[:, :, :, counted], prefix).split(step, dim=3)
    for number, rows in enumerate(counted.split(step)):
        part = grouped[:, :, :, rows].flatten(2, 3)
        seen = visible[:, rows]
        # Keys of a long prompt are never all in float32, which would double what the cache takes.
        logits = torch.cat([part @ some.float().mT for some in keys.split(KEYS_AT_ONCE, dim=2)], dim=-1)
        logits = logits.unflatten(2, (-1, len(rows))).masked_fill_(~seen[:, None, None], -torch.inf)
        lse = logits.logsumexp(-1)
        if of_prefix is not None:
            lse = torch.logaddexp(lse, of_prefix[number])
        yield _Mass((logits - lse[..., None]).exp().flatten(1, 2), seen, weight[:, None, rows, None], rows)


def triton_trial(device: torch.device, dtypes: choice.Dtypes, dim: int, value_dim: int) -> float:
    """Largest difference between the Triton kernel and the reference on a small case; there are no values to read."""
    from . import _scores_triton

    def case(keys: choice.Draw, values: choice.Draw, where: torch.device) -> tuple[Any, ...]:
        prefix = PackedKV(keys(450, dim), values(450, value_dim), ((300, 0), (20, 130)), (1, 0))
        weight = torch.tensor([[0.0, 0.5, 0.5], [0.2, 0.3, 0.5]], device=where)
        position, valid = torch.tensor([40, 60, 69], device=where), torch.arange(70, device=where).expand(2, -1) > 5
        return keys(2, 6, 3, dim), weight, position, keys(2, 2, 70, dim), valid, prefix, dim**-0.5

    def reference(*arguments: Any) -> Tensor:
        return _by_torch(Window(*arguments)).attention

    return choice.difference(_scores_triton.attention_mass, reference, case, device, dtypes)


def _prefix_lse(query: Tensor, prefix: PackedKV) -> Tensor:
    """Natural-log sum of the exponentials of query [batch, kv_heads, group, rows, dim] with the prefix keys."""
    rows = query.flatten(0, 1).flatten(1, 2)
    lse = rows.new_full(rows.shape[:2], -torch.inf)
    at_once = LOGITS_AT_ONCE_ON_CPU if rows.device.type == "cpu" else LOGITS_AT_ONCE
    for heads in head_groups(prefix, max(rows.shape[1:])):
        longest = heads.keys.shape[1]
        if longest == 0:
            continue
        keys = heads.keys.float().mT
        parts = []
        for part in rows[heads.pairs].split(max(1, at_once // (len(heads.pairs) * longest)), dim=1):
            logits = part @ keys
            if heads.padding is not None:
                logits.masked_fill_(heads.padding[:, None], -torch.inf)
            # As logsumexp does, but in place.
            top = logits.amax(-1)
            parts.append(logits.sub_(top[..., None]).exp_().sum(-1).log_().add_(top))
        lse[heads.pairs] = torch.cat(parts, dim=1)
    return lse.view(query.shape[:4])
