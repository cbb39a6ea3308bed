# SPDX-License-Identifier: Apache-2.0
"""Conversations of many images with a cache, and what is looked at in them without asking the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from invariants import tensors_of
from plphp import PLPHPConfig, PrunedCache
from plphp.engines.hf.cache_argument import passed


def converse(
    model: Any, tiny: Any, config: str, turns: int, rows: Sequence[int] = (1,), images: bool = True, **kwargs: Any
) -> tuple[PrunedCache, list[Any]]:
    """A conversation with a new image in every turn; the cache, and what ``generate`` returned."""
    inputs = tiny.inputs(model, rows)
    cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig.parse(config))
    outputs = [answer(model, cache, inputs, **kwargs)]
    for turn in range(1, turns):
        inputs = next_turn(model, tiny, inputs, outputs[-1].sequences, seed=turn, with_image=images)
        outputs.append(answer(model, cache, inputs, **kwargs))
    return cache, outputs


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
        pair = whole.block.pairs() // whole.block.kv_heads
        text = int((cache._images.of_tokens(pair, whole.position) < 0).sum())
        total += sum(of_layer.values()) - text * layer.pair_nbytes
    return total
