# SPDX-License-Identifier: Apache-2.0
"""Conversations of many images with a cache, and what is looked at in them without asking the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

from invariants import attention_set, tensors_of
from plphp import PLPHPConfig, PrunedCache
from plphp.engines.hf.cache_argument import passed


class Chat(NamedTuple):
    """A cache, what ``generate`` returned turn by turn, and the inputs of the newest turn."""

    cache: PrunedCache
    outputs: list[Any]
    inputs: dict[str, Any]


def converse(model: Any, tiny: Any, config: str, turns: int, rows: Sequence[int] = (1,), **kwargs: Any) -> Chat:
    """A conversation with a new image in every turn."""
    inputs = tiny.inputs(model, rows)
    cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig.parse(config))
    outputs = [answer(model, cache, inputs, **kwargs)]
    for turn in range(1, turns):
        inputs = next_turn(model, tiny, inputs, outputs[-1].sequences, seed=turn)
        outputs.append(answer(model, cache, inputs, **kwargs))
    return Chat(cache, outputs, inputs)


def next_turn(model: Any, tiny: Any, inputs: Any, sequences: Any, seed: int = 1, with_image: bool = True) -> Any:
    """Inputs of the next turn, with the grids of all images so far, from which positions of m-RoPE are worked out."""
    turn = tiny.second_turn(model, inputs, sequences, with_image=with_image, seed=seed)
    if "image_grid_thw" in inputs:
        turn["image_grid_thw"] = torch.cat(
            [inputs["image_grid_thw"], *([turn["image_grid_thw"]] if with_image else [])]
        )
        turn["pixel_values"] = torch.cat([inputs["pixel_values"], *([turn["pixel_values"]] if with_image else [])])
    return turn


def answer(model: Any, cache: PrunedCache, inputs: Any, **kwargs: Any) -> Any:
    """Three greedy tokens with their logits."""
    settings = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **passed(cache), **{**settings, **kwargs})


def vision_bytes(cache: PrunedCache) -> int:
    """Bytes of the live tensors that hold vision entries, by the storages: all that is packed, less the text."""
    total = 0
    for layer in cache.layers:
        if layer.prefix is None:
            continue
        of_layer = {}
        for tensor in (layer.prefix.keys, layer.prefix.values, *[t for b in layer.coded for t in tensors_of(b.block)]):
            of_layer[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        whole = layer.ledger.whole
        reader = torch.tensor([whole.block.rows.index(stored) for stored in range(len(whole.block.counts))])
        row = reader[whole.block.pairs() // whole.block.kv_heads]
        text = int((cache._images.of_tokens(row, whole.position) < 0).sum())
        total += sum(of_layer.values()) - text * layer.pair_nbytes
    return total


def held_entries(layer: Any) -> list[tuple[int, int, Any, Any, Any]]:
    """By row and head what a layer holds before its tail: positions, keys and values, codes as what they stand for."""
    ledger, result = layer.ledger, []
    pieces = [(layer.prefix, ledger.whole.block, range(layer.prefix.batch))]
    for block in layer.coded:
        decoded = block.block.decoded(torch.float64)
        pieces += [(own, labels.block, block.owners) for own, labels in zip(decoded, ledger.coded, strict=True)]
    for states, labels, owners in pieces:
        assert states.counts == labels.counts
        assert states.rows == labels.rows
        for row, owner in enumerate(owners):
            for head in range(states.kv_heads):
                start, count = states.index[:, row, head].tolist()
                some = slice(start, start + count)
                position = labels.keys[some, 0].long()
                result.append((owner, head, position, states.keys[some].double(), states.values[some].double()))
    return result


@contextmanager
def dense_copy(
    model: Any, cache: PrunedCache, weights: dict[int, torch.Tensor] | None = None
) -> Iterator[DynamicCache]:
    """A stock cache of all tokens, with what the cache holds at the places that its ledger names; the rest is masked
    per layer, row and KV head. Naive attention, which shares no code with plphp; its newest weights go to ``weights``,
    by layer [batch, q_heads, query, seq]."""
    dense, shown = DynamicCache(config=model.config.get_text_config()), {}
    for number, layer in enumerate(cache.layers):
        heads, length = layer.prefix.kv_heads, layer.length
        keys, values = (torch.zeros(layer.prefix.batch, heads, length, dim, dtype=torch.float64) for dim in layer.dims)
        there = torch.zeros(keys.shape[:3], dtype=torch.bool)
        for row, head, position, own_keys, own_values in held_entries(layer):
            assert not there[row, head, position].any()
            keys[row, head, position], values[row, head, position] = own_keys, own_values
            there[row, head, position] = True
        tail = layer.tail_length
        if tail:
            keys[:, :, length - tail :], values[:, :, length - tail :] = layer.tail()
            there[:, :, length - tail :] = True
        dense.update(keys, values, number)
        shown[number] = there

    def reference(module: Any, query: Any, key: Any, value: Any, mask: Any, **kw: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        logits = query @ key.mT * (kw.get("scaling") or query.shape[-1] ** -0.5)
        logits = logits if mask is None else logits + mask
        there = shown.get(getattr(module, "layer_idx", -1))
        if there is not None:
            hidden = ~there.repeat_interleave(groups, 1)[:, :, None]
            logits[..., : there.shape[-1]].masked_fill_(hidden, -torch.inf)
        if there is not None and weights is not None:
            weights[module.layer_idx] = logits.softmax(-1)
        return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("test_dense", reference)
    AttentionMaskInterface.register("test_dense", eager_mask)
    with attention_set(model, "test_dense", model.get_decoder()):
        yield dense


def by_token(layer: Any) -> dict[tuple[int, int, int], tuple[str, Any]]:
    """By row, head and position, the rung of an entry and its key."""
    heads, pieces = layer.prefix.kv_heads, iter(held_entries(layer))
    names = ["whole"] * (layer.prefix.batch * heads)
    for block in layer.coded:
        names += [tier.rung.name for tier in block.block.tiers for _ in range(len(block.owners) * heads)]
    return {
        (row, head, place): (name, key)
        for name, (row, head, position, keys, _) in zip(names, pieces, strict=True)
        for place, key in zip(position.tolist(), keys, strict=True)
    }
