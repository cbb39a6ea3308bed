# SPDX-License-Identifier: Apache-2.0
"""Codebooks learned from keys and values: near them, exact where there is room for all, the same for the same seed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plphp.kernels.books import Books
from plphp.policy import k_means
from plphp.policy.book_learning import learn, learned
from plphp.policy.entry_sampling import EntrySample
from plphp.policy.k_means import centroids_of


def states(tokens: int, dim: int = 32, heads: int = 2, seed: int = 0) -> Tensor:
    """Around a few centres that differ from part to part and from head to head."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(heads, 6, dim, generator=generator) * torch.linspace(1, 9, dim)
    which = torch.randint(6, (heads, tokens, 1), generator=generator).expand(-1, -1, dim)
    return centres.gather(1, which) + 0.3 * torch.randn(heads, tokens, dim, generator=generator)


def nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """The nearest of the centroids [256, width] to each vector [tokens, width], by distances in float64."""
    return centroids.double()[torch.cdist(vectors.double(), centroids.double()).argmin(1)]


def decoded(vectors: Tensor, books: Books, level: str) -> Tensor:
    """What the codes of vectors [heads, tokens, dim] stand for: an encoder of the plainest kind."""
    width = 16 if level == "coarse" else 8
    result = torch.empty_like(vectors, dtype=torch.float64)
    first = books.fine if width == 8 else books.coarse
    assert first is not None
    for head, of_head in enumerate(vectors):
        for part in range(vectors.shape[2] // width):
            channels = slice(part * width, (part + 1) * width)
            code = nearest(of_head[:, channels], first[head, part])
            if level == "residual":
                code = code + nearest(of_head[:, channels].double() - code, books.residual[head, part])
            result[head, :, channels] = code
    return result


def error(vectors: Tensor, books: Books, level: str) -> float:
    """Squared error relative to the vectors."""
    left = decoded(vectors, books, level) - vectors.double()
    return float(left.square().sum() / vectors.double().square().sum())


def test_codes_come_near_what_they_stand_for() -> None:
    """The noise around the centres is .004 of everything; 256 random vectors as centroids are worse."""
    vectors = states(3000)
    books = learn(vectors)
    fine, residual, coarse = (error(vectors, books, level) for level in ("fine", "residual", "coarse"))
    assert residual < fine / 3
    assert fine < coarse < 0.01
    drawn = torch.stack([head[:256].unflatten(1, (-1, 8)).transpose(0, 1) for head in vectors]).half()
    assert fine < 0.8 * error(vectors, Books(drawn, books.residual, books.coarse), "fine")
    other = states(3000, seed=0)[:, 1500:]
    assert error(other, books, "fine") < 0.01


@pytest.mark.parametrize("tokens", [1, 40, 255, 256, 3000])
def test_few_distinct_vectors_are_held_exactly(tokens: int) -> None:
    """Whether there are fewer vectors than centroids, or many copies of a few."""
    few = states(min(tokens, 200)).half().float()
    vectors = few[:, torch.arange(tokens) % few.shape[1]]
    books = learn(vectors)
    for level in ("fine", "residual", "coarse"):
        assert torch.equal(decoded(vectors, books, level), vectors.double()), level
    assert all(bool(part.isfinite().all()) for part in books.tensors().values())


def test_vectors_of_zeros_have_codebooks() -> None:
    """Those of a prompt with a single vision token, less their own mean."""
    books = learn(torch.zeros(2, 5, 24))
    assert books.coarse is None
    assert not books.fine.any()
    assert not books.residual.any()


def test_every_centroid_is_used_and_is_the_mean_of_its_vectors() -> None:
    """Clusters that run empty begin anew: far outliers draw the first centroids, and none may stay without vectors."""
    generator = torch.Generator().manual_seed(0)
    near, far = (torch.randn(1, tokens, 8, generator=generator) for tokens in (2000, 300))
    vectors = torch.cat([near, 1000 + far], dim=1)
    centroids = centroids_of(vectors, 0)
    which, apart = k_means.nearest_of(vectors, centroids)
    counts = torch.bincount(which[0], minlength=256)
    assert (counts > 0).sum() > 250
    started = k_means.nearest_of(vectors, vectors[:, torch.randperm(2300, generator=generator)[:256]])[1]
    assert apart.sum() < 0.8 * started.sum()
    stuck = torch.zeros(1, 256, 8)  # all begin at one place
    moved = k_means._moved(vectors, stuck, *k_means.nearest_of(vectors, stuck))
    assert torch.equal(moved[0, 0], vectors[0].double().mean(0).float())
    assert len(moved[0].unique(dim=0)) == 256
    assert (moved[0, 1:] > 500).all(), "they do not begin anew at the vectors that are farthest off"


def test_the_same_seed_gives_the_same_and_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = states(700, heads=3)
    books = learn(vectors, seed=3)
    for again in (learn(vectors, seed=3), learn(vectors.double(), seed=3)):
        assert all(torch.equal(a, b) for a, b in zip(books.tensors().values(), again.tensors().values(), strict=True))
    assert not torch.equal(learn(vectors, seed=4).fine, books.fine)
    monkeypatch.setattr(k_means, "AT_ONCE", 1)  # a single problem at a time, each with an end of its own
    monkeypatch.setattr(k_means, "DISTANCES", 2**16)
    monkeypatch.setattr(k_means, "ENOUGH", -torch.inf)
    apart = learn(vectors, seed=3)
    monkeypatch.setattr(k_means, "AT_ONCE", 2**22)
    together = learn(vectors, seed=3)
    assert torch.allclose(apart.fine, together.fine, atol=2e-2)
    assert abs(error(vectors, apart, "residual") - error(vectors, together, "residual")) < 1e-5


def test_each_layer_has_its_own() -> None:
    keys, values = states(300, 16).half(), states(300, 24, seed=1).half()
    sample = EntrySample(torch.arange(300).double(), {1: (keys, values), 4: (values, keys)}, 3)
    books = learned(sample)
    assert (books[1].keys.dim, books[1].values.dim, books[4].keys.dim) == (16, 24, 24)
    assert torch.equal(books[1].keys.fine, books[4].values.fine)
    assert torch.equal(books[1].keys.fine, learn(keys).fine)
