# SPDX-License-Identifier: Apache-2.0
"""Vision tokens of an image that differ as much as possible from each other. Pure functions.

Both choose greedily, so that what is kept of a smaller number is kept of a larger. Two numbers that differ by rounding
alone may come in another order on another device. Features of zeros have no direction: where directions are compared,
such tokens are taken last.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from plphp.errors import ConfigError
from plphp.kernels.precision import as_written

from .cosine import rounding
from .distances import Distances
from .farthest import extended, most_remote
from .token_checks import check_features, check_keep, check_scores


def max_min(features: Tensor, keep: int, *, euclidean: bool = False) -> Tensor:
    """Keep tokens whose smallest distance from each other is large (DivPrune, arXiv:2503.02175, Algorithm 1).

    The first token is the one whose smallest distance to all others is the largest; each next one that whose smallest
    distance to those that are chosen is the largest. Of equal tokens the earlier is taken.

    Takes the time of ``tokens ** 2 / 2`` products up to 4,096 tokens, whose products are held (64 MB); of more tokens
    of ``keep * tokens`` products besides. From there on, beside a copy of the features in float32, the memory grows
    with the number of tokens, not with its square.

    Parameters
    ----------
    features : Tensor
        float [tokens, dim]; those of one image.
    keep : int
        Tokens that stay, from 1 to ``tokens``.
    euclidean : bool
        Whether the distance is the Euclidean one, instead of the paper's ``1 - cosine``. It sees how long features are,
        and not what they have in common, so that tokens of an even background are closer to each other than others.

    Returns
    -------
    Tensor
        bool [tokens], on the same device.

    Raises
    ------
    ConfigError
        If the features are not [tokens, dim], or ``keep`` is out of range.
    NonFiniteAttentionError
        If the features hold NaN or inf.
    """

    def choose(pairs: Distances, _which: Tensor, count: int) -> Tensor:
        first = torch.tensor([most_remote(pairs)], device=pairs.vectors.device)
        return extended(pairs, pairs.vectors.new_ones(len(pairs)), first, count)

    if not euclidean:
        return _kept(features, keep, choose, hold=True)
    check_features("features", features)
    check_keep(keep, len(features))
    kept = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    with as_written(features.device):
        kept[choose(Distances.of_places(features), kept, keep)] = True
    return kept


def dpp(features: Tensor, keep: int, relevance: Tensor | None = None) -> Tensor:
    """Keep a likely set of a determinantal point process (CDPruner, arXiv:2506.10967), found greedily.

    With unit vectors ``x``, their cosines ``S`` and relevance ``r`` the kernel is ``diag(r) S diag(r)``, and each next
    token is the one that multiplies its determinant over those that are chosen by the most: by ``r ** 2`` times the
    squared length of the part of ``x`` that is orthogonal to all chosen. Of equal tokens the earlier is taken; without
    relevance this makes the first token of the image the first that is chosen.

    The determinant is 0 for every set of more tokens than the rank of the features, ``dim`` at most. Once no token has
    an orthogonal part that is more than rounding, the rest goes by the same factor for the nearest chosen token alone,
    ``r ** 2 * (1 - cosine ** 2)``; this part is ours.

    Takes the time of ``keep * tokens`` cosines. Beside a copy of the features in float32 the memory grows with the
    number of tokens, and with ``min(keep, dim) * dim``.

    Parameters
    ----------
    features : Tensor
        float [tokens, dim]; those of one image.
    keep : int
        Tokens that stay, from 1 to ``tokens``.
    relevance : Tensor, optional
        float [tokens], at least 0, such as `plphp.policy.relevance.relevance`. Tokens of relevance 0 come last; if all
        are 0, none is preferred. Default: 1 for all.

    Returns
    -------
    Tensor
        bool [tokens], on the same device.

    Raises
    ------
    ConfigError
        If a shape is wrong, ``keep`` is out of range or a relevance below 0.
    NonFiniteAttentionError
        If the features or the relevance hold NaN or inf.
    """
    check_features("features", features)
    if relevance is not None:
        check_scores("relevance", relevance, len(features))
        if bool((relevance < 0).any()):
            raise ConfigError(f"relevance must be at least 0, got {float(relevance.min()):g}: subtract the least.")

    def choose(pairs: Distances, which: Tensor, count: int) -> Tensor:
        vectors = pairs.vectors
        worth = vectors.new_ones(len(vectors)) if relevance is None else _worth(relevance[which], vectors)
        return extended(pairs, worth, _independent(vectors, worth, count), count)

    return _kept(features, keep, choose, either_way=True)


def _kept(features: Tensor, keep: int, choose: Callable[[Distances, Tensor, int], Tensor], **angles: bool) -> Tensor:
    """Mask of the tokens that a function chooses; those without a direction stay only where all others do.

    ``choose`` gets the `Distances.of_angles` of some tokens, which they are, and how many of them are to stay.
    """
    check_features("features", features)
    check_keep(keep, len(features))
    kept = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    directed = features.detach().any(1)
    which, others = directed.nonzero()[:, 0], (~directed).nonzero()[:, 0]
    count = min(keep, len(which))
    if count == len(which):
        kept[which] = True
    else:
        with as_written(features.device):
            pairs = Distances.of_angles(features[which] if len(others) else features, **angles)
            kept[which[choose(pairs, which, count)]] = True
    kept[others[: keep - count]] = True
    return kept


def _worth(relevance: Tensor, vectors: Tensor) -> Tensor:
    """Squared relevance in [0, 1], in the dtype of the vectors."""
    relevance = relevance.detach().to(vectors)
    largest = relevance.max()
    return torch.where(largest > 0, relevance / largest, torch.ones_like(relevance)).square()


def _independent(vectors: Tensor, worth: Tensor, count: int) -> Tensor:
    """Choose by the orthogonal part until ``count`` are chosen or none has one, int64 [at least 1].

    A row of the Cholesky factor of the cosines is the product of all vectors with the orthogonal part of the chosen
    one. An orthonormal basis of the chosen ones gives these parts without the factor, whose memory would grow with
    ``count * tokens``, and orthogonal to rounding, whatever the condition of the cosines.
    """
    length = vectors.new_ones(len(vectors))  # squared, of the orthogonal parts
    basis = vectors.new_zeros(min(count, *vectors.shape), vectors.shape[1])
    least = rounding(vectors)
    chosen: list[int] = []
    for number in range(len(basis)):
        gain = torch.where(length > least, worth * length, 0)
        best = int(gain.argmax())
        if not float(gain[best]) > 0:
            break
        chosen.append(best)
        direction, before = vectors[best], basis[:number]
        for _ in range(2):  # once leaves what the rounding of a short part is to its length
            direction = direction - (before @ direction) @ before
        basis[number] = direction / torch.linalg.vector_norm(direction)
        length = length - (vectors @ basis[number]).square()
        length[best] = 0
    return torch.tensor(chosen, device=vectors.device)
