# SPDX-License-Identifier: Apache-2.0
"""Which images an answer looks at: the attention of a decoding step to what is held of each."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from plphp.kernels.precision import as_written

from .entries import LayerEntries
from .image_table import ImageTable
from .ledger import codes_of
from .scoring import Attended
from .sources import sources_of

LOOKED = 8
"""Decoding steps of an answer that are looked at."""


@dataclass
class _Steps:
    """The steps of a layer: their queries, each [batch, q_heads, dim], and the tokens that each has seen."""

    layer: LayerEntries
    scaling: float
    queries: list[Tensor] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)


class AskedImages:
    """How far the heads of a model turn to each image while the first tokens of an answer are written.

    An answer turns to an image in one step and with few heads: where the word comes that says what the image shows.
    What a head gives to an image in every step says nothing of the question, and the mean over heads goes mostly to the
    newest image. So an image's figure is the largest, over heads and steps, of what a query head attends to it in a
    step less the mean of that over the steps. A step counts as if it read everything held, also where it recalls some.

    Steps leave their queries alone: what is held before the tail stays as it is during an answer, and is decoded once.

    Parameters
    ----------
    images : ImageTable
        The images of the conversation.
    """

    def __init__(self, images: ImageTable) -> None:
        self._images = images
        self._layers: dict[int, _Steps] = {}

    @property
    def steps(self) -> int:
        """Steps that every layer has taken."""
        return min((len(own.queries) for own in self._layers.values()), default=0)

    def note(self, attended: Attended) -> None:
        """Add a step of a layer with a ledger, in which it attended with the queries of a single token."""
        layer = attended.entries
        own = self._layers.setdefault(attended.layer, _Steps(layer, attended.scaling))
        own.queries.append(attended.query[:, :, 0])
        own.lengths.append(layer.length)

    def figures(self, valid: Tensor) -> list[list[float]]:
        """By row and image, its figure, between 0 and 1; 0 where there were not two steps to compare.

        Parameters
        ----------
        valid : Tensor
            bool [batch, seq]; False for padding. What is not in it counts as valid.
        """
        figures = torch.zeros(len(self._images.rows), max(map(len, self._images.rows)), dtype=torch.float64)
        for steps in self._layers.values():
            with as_written(steps.queries[0].device):
                mass = _attention(steps, self._images, valid)
                own = (mass.amax(2) - mass.mean(2)).amax(1)
            figures = torch.maximum(figures, own.double().cpu())
        return [own[: len(row)] for own, row in zip(figures.tolist(), self._images.rows, strict=True)]


def _attention(steps: _Steps, images: ImageTable, valid: Tensor) -> Tensor:
    """The attention of steps to what a layer holds of each image: the softmax over all that it holds, in sum over the
    entries of an image. float32 or float64 [batch, q_heads, steps, images]."""
    tail = steps.layer.tail()[0]
    query = torch.stack(steps.queries, 2)
    dtype = torch.promote_types(query.dtype, torch.float32)
    heads, most = tail.shape[1], max(map(len, images.rows))
    grouped = query.to(dtype).unflatten(1, (heads, -1)).flatten(2, 3) * steps.scaling
    of_tail = grouped @ tail.to(dtype).mT
    hidden = ~_visible(steps, valid).to(tail.device)[:, None, None]
    of_tail = of_tail.unflatten(2, (-1, len(steps.queries))).masked_fill(hidden, -torch.inf).flatten(2, 3).flatten(0, 1)
    queries = grouped.flatten(0, 1)
    pair, image, keys = _entries(steps.layer, images, dtype)
    counts = pair.bincount(minlength=len(queries)).tolist()
    logits = torch.cat([states @ own.mT for own, states in zip(queries, keys.split(counts), strict=True)])
    index = pair[:, None].expand_as(logits)
    highest = of_tail.amax(-1).scatter_reduce(0, index, logits, "amax")
    weight = (logits - highest[pair]).exp()
    total = (of_tail - highest[:, :, None]).exp().sum(-1).scatter_add(0, index, weight)
    seen = image >= 0
    mass = weight.new_zeros(len(queries) * most, weight.shape[1])
    mass = mass.index_add(0, (pair * most + image)[seen], (weight / total[pair])[seen])
    mass = mass.view(*grouped.shape[:2], most, -1, len(steps.queries))
    return mass.permute(0, 1, 3, 4, 2).flatten(1, 2)


def _visible(steps: _Steps, valid: Tensor) -> Tensor:
    """The entries of the tail that each step sees, bool [batch, steps, tail]."""
    tokens, batch = steps.layer.tail_tokens, len(steps.queries[0])
    valid = pad(valid.repeat_interleave(batch // len(valid), dim=0), (0, tokens.end - valid.shape[1]), value=True)
    position = tokens.of(torch.arange(tokens.end).expand(batch, -1), 0)
    return tokens.of(valid, False)[:, None] & (position[:, None] < torch.tensor(steps.lengths)[:, None])


def _entries(layer: LayerEntries, images: ImageTable, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of all entries before the tail: row and head in one number, in whose order they come, image (-1 for text), and
    keys."""
    assert layer.prefix is not None
    sources, codes = sources_of(layer, images, shared=False), codes_of(layer.coded)
    keys = [layer.prefix.unshared().keys]
    if codes is not None:
        keys += [tier.unshared().keys for tier in codes.block.decoded(dtype, values=False)]
    heads, device = layer.prefix.kv_heads, layer.prefix.device
    pair = torch.cat([source.row * heads + source.head for source in sources])
    image = torch.cat([source.image for source in sources])
    order = pair.argsort(stable=True)
    states = torch.cat([own.to(dtype) for own in keys])[order.to(device)]
    return pair[order].to(device), image[order].to(device), states
