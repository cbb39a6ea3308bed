# SPDX-License-Identifier: Apache-2.0
"""What tiers have to equal: the full cache with its entries replaced by what their codes stand for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from attending_reference import Unimportant, hidden_and_silent
from invariants import attention_set
from plphp.engines.hf.layer import PrunedLayer
from plphp.kernels.books import Books, LayerBooks
from plphp.policy.bank import LayerBank, QueryBank
from plphp.policy.rotation import Rotation
from plphp.pruning.placement import Placement
from tiny_models import TIERS


@dataclass(frozen=True)
class Held:
    """What a layer holds of one prompt.

    Parameters
    ----------
    layer : PrunedLayer
    start, end : int
        The tokens of the prompt.
    placement : Tensor
        uint8 [batch, kv_heads, tokens].
    keys, values, index : Tensor
        float64 [batch, kv_heads, tokens, dim]; what the codes stand for, and what the index says of the keys, where an
        entry is coded.
    means : Tensor or None
        [batch, kv_heads, dim]; of what the codes stand for, of values: it stands in for what is not read.
    readings : sequence of tuple
        By row, the share that a query reads, and whether the rest stands in.
    """

    layer: PrunedLayer
    start: int
    end: int
    placement: Tensor
    keys: Tensor
    values: Tensor
    index: Tensor
    means: Tensor | None
    readings: Sequence[tuple[float, bool]]

    @property
    def dropped(self) -> Tensor:
        return self.placement == Placement.DROPPED

    @property
    def coded(self) -> Tensor:
        return ~self.dropped & (self.placement != Placement.WHOLE)


@contextmanager
def noting_what_is_held() -> Iterator[list[Held]]:
    """Note what every layer places while the context is open."""
    notes: list[Held] = []
    compact = PrunedLayer.compact

    def noting(self: PrunedLayer, placement: Tensor, **kwargs: Any) -> Tensor:
        keys, values = (states.double().clone() for states in self.tail())
        start, end, before = self.prefix_length, self.length, len(self.coded)
        placement = compact(self, placement, **kwargs)
        index, means, readings = keys.clone(), None, [(1.0, True)] * len(keys)
        if len(self.coded) > before:
            block, rungs = self.coded[-1], kwargs["coder"].rungs
            for tier, of_tier, by_index in zip(
                block.tiers,
                block.decoded(torch.float64),
                block.decoded(torch.float64, values=False, index=True),
                strict=True,
            ):
                mask = placement == 1 + rungs.index(tier.rung)
                keys[mask], values[mask], index[mask] = of_tier.keys, of_tier.values, by_index.keys
            if block.rest_values is not None:
                means = block.rest_values.double().unflatten(0, (len(keys), -1))
                coded = sum(placement == 1 + rungs.index(tier.rung) for tier in block.tiers)[..., None]
                exact = (values * coded).sum(2) / coded.sum(2).clamp(min=1)
                assert torch.allclose(means, exact, atol=1e-3, rtol=1e-3)  # rounded to float16
            readings = [(reading.share, reading.rest) for reading in block.reading]
        notes.append(Held(self, start, end, placement.clone(), keys, values, index, means, readings))
        return placement

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrunedLayer, "compact", noting)
        yield notes


@contextmanager
def entries_replaced(
    model: Any, cache: Any, notes: Sequence[Held], unimportant: Mapping[int, Unimportant] | None = None
) -> Iterator[dict[int, Tensor]]:
    """Make a full cache behave as a `PrunedCache` with tiers has to.

    For every query behind a prompt, what was coded is replaced by what its codes stand for, what was dropped is masked,
    and with recall what the query does not read is masked, too, and stands in by its index and the mean value. Naive
    float64 attention over all entries, which shares no code with plphp. While a prompt is read, the tokens that are
    ``unimportant`` in a layer are masked in it, and their own attention is 0.

    Yields
    ------
    dict of int to Tensor
        By layer that holds something, the attention of the newest token, [batch, q_heads, tokens].
    """
    layers = list(cache.layers)
    newest: dict[int, Tensor] = {}

    def reference(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kw: Any) -> Any:
        own = [held for held in notes if layers.index(held.layer) == getattr(module, "layer_idx", -1)]
        scaling = kw.get("scaling") or query.shape[-1] ** -0.5
        position = torch.arange(key.shape[2] - query.shape[2], key.shape[2])
        passed = torch.stack([position >= held.end for held in own]).sum(0) if own else torch.zeros_like(position)
        prompts = (unimportant or {}).get(getattr(module, "layer_idx", -1), [])
        hidden, silent = hidden_and_silent(prompts, position, len(query), key.shape[2])
        output = query.new_empty(*query.shape[:3], value.shape[3], dtype=torch.float64)
        for count in passed.unique().tolist():  # prompts end one after the other
            some = passed == count
            shown = None if mask is None else mask.double()[:, :, some]
            if shown is not None and prompts:
                shown = shown.masked_fill(hidden[:, None, some], -torch.inf)
            scaled = query.double()[:, :, some] * scaling
            output[:, :, some], weights = _attention(scaled, key, value, shown, own[:count])
            if own:
                newest[module.layer_idx] = weights[:, :, -1]
        output = output.masked_fill(silent[:, None, :, None], 0)
        return output.transpose(1, 2).to(query.dtype).contiguous(), None

    AttentionInterface.register("test_tiers", reference)
    AttentionMaskInterface.register("test_tiers", eager_mask)
    with attention_set(model, "test_tiers", model.get_decoder()):
        yield newest


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, prompts: Sequence[Held]
) -> tuple[Tensor, Tensor]:
    """Output and weights of scaled queries [batch, q_heads, query, dim] behind some prompts."""
    key, value, groups = key.double().clone(), value.double().clone(), query.shape[1] // key.shape[1]
    for held in prompts:
        for states, codes in ((key, held.keys), (value, held.values)):
            part = states[:, :, held.start : held.end]
            part[held.coded] = codes[held.coded]
    logits = query @ key.repeat_interleave(groups, 1).mT
    logits = logits if mask is None else logits + mask
    value = value.repeat_interleave(groups, 1)
    for held in prompts:
        within = logits[..., held.start : held.end]
        within.masked_fill_(held.dropped.repeat_interleave(groups, 1)[:, :, None], -torch.inf)
        unread, of_index = _unread(query, held, groups)
        within.masked_fill_(unread, -torch.inf)
        rest = of_index.masked_fill(~unread, -torch.inf).logsumexp(-1, keepdim=True)
        rest[[not stands_in for _, stands_in in held.readings]] = -torch.inf
        if unread.any() and held.means is not None:
            logits = torch.cat([logits, rest], -1)
            value = torch.cat([value, held.means.repeat_interleave(groups, 1)[:, :, None]], 2)
    weights = logits.softmax(-1)
    return weights @ value, weights


def _unread(query: Tensor, held: Held, groups: int) -> tuple[Tensor, Tensor]:
    """Which coded entries a query leaves unread, bool [batch, q_heads, query, tokens], and the logits of the index."""
    coded = held.coded.repeat_interleave(groups, 1)[:, :, None]
    of_index = (query @ held.index.repeat_interleave(groups, 1).mT).masked_fill(~coded, -torch.inf)
    mass = of_index.softmax(-1).nan_to_num(0.0).unflatten(1, (-1, groups)).mean(2)
    unread = torch.zeros_like(mass, dtype=torch.bool)
    for row, (share, _) in enumerate(held.readings):
        for head in range(mass.shape[1]):
            entries = held.coded[row, head].nonzero()[:, 0]
            reads = len(entries) if share == 1 else min(len(entries), max(1, int(share * len(entries) + 0.5)))
            for number, of_query in enumerate(mass[row, head]):
                last = of_query[entries].argsort(descending=True)[reads:]
                unread[row, head, number, entries[last]] = True
    return unread.repeat_interleave(groups, 1), of_index


def books_file(folder: Path, family: str) -> str:
    """A query bank of a model of `TIERS` that has nothing in it but random codebooks."""
    path = folder / f"{family}.safetensors"
    if not path.exists():
        text, generator = TIERS[family].config().get_text_config(), torch.Generator().manual_seed(3)
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
        dim = 16 if family == "gemma4" else 8  # whose layers with full attention have wider heads
        layers, books = {}, {}
        for layer in [number for number, kind in enumerate(kinds) if kind == "full_attention"]:
            queries = torch.zeros(text.num_attention_heads, 1, dim)
            layers[layer] = LayerBank(queries, Rotation(torch.ones(1)))
            books[layer] = random_books(text.num_key_value_heads, dim, dim, generator)
        record = {"decoder_layers": text.num_hidden_layers}
        QueryBank(layers, torch.ones(1, dtype=torch.long), record, books).save(path)
    return str(path)


def random_books(kv_heads: int, dim: int, value_dim: int, generator: torch.Generator) -> LayerBooks:
    """Codebooks of a layer with normal noise for centroids."""

    def noise(width: int, part: int, size: float) -> Tensor:
        return (size * torch.randn(kv_heads, width // part, 256, part, generator=generator)).to(torch.float16)

    sides = [
        Books(noise(width, 8, 1.0), noise(width, 8, 0.5), noise(width, 16, 1.0) if width % 16 == 0 else None)
        for width in (dim, value_dim)
    ]
    return LayerBooks(*sides)
