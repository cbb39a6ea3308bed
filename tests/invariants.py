# SPDX-License-Identifier: Apache-2.0
"""Reusable assertions of the invariants, and the slow, independent computations that they compare with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import plphp
from plphp.engines.hf.cache_argument import passed
from plphp.pruning.report import PruneReport
from precision import EXACT, assert_exact, max_difference

GENERATE = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def generate(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
    """Greedy generation of four tokens with their logits."""
    return model.generate(**inputs, **{**GENERATE, **kwargs})


def pruned(model: Any, inputs: dict[str, Any], config: plphp.PLPHPConfig, **kwargs: Any) -> tuple[Any, PruneReport]:
    """The same inside a session, with its report."""
    with plphp.prune(model, config) as run:
        output = generate(model, inputs, **kwargs)
    return output, run.report


def assert_growing_frequencies_are_refused(model: Any, inputs: dict[str, Any], config: plphp.PLPHPConfig) -> None:
    """A rotary embedding whose frequencies grow with the prompt has no queries that could be turned."""
    text = model.config.get_text_config()
    before = text.rope_parameters
    text.rope_parameters = {**before, "rope_type": "dynamic", "factor": 2.0}
    try:
        with pytest.raises(plphp.UnsupportedModelError, match="'dynamic'"), plphp.prune(model, config):
            model.generate(**inputs, max_new_tokens=1)
    finally:
        text.rope_parameters = before


def two_turns(model: Any, tiny: Any, cache: Any, with_image: bool, rows: Sequence[int]) -> tuple[Any, Any]:
    """Generate with a cache, then go on with it: with text alone, or with a new image."""
    inputs = tiny.inputs(model, rows)
    first = generate(model, inputs, **passed(cache))
    second = tiny.second_turn(model, inputs, first.sequences, with_image=with_image)
    return first, generate(model, second, **passed(cache))


def logit_difference(first: Any, second: Any) -> float:
    """Largest difference of the logits of two generations."""
    return max(max_difference(a, b) for a, b in zip(first.logits, second.logits, strict=True))


def assert_same_generation(first: Any, second: Any) -> None:
    """Equal tokens, and the same logits in float64."""
    assert torch.equal(first.sequences, second.sequences)
    for a, b in zip(first.logits, second.logits, strict=True):
        assert_exact(a, b)


@contextmanager
def attention_set(model: Any, name: str, part: Any = None) -> Iterator[None]:
    """Another attention function for a model, or a part of it; each config gets its own back, plphp's too."""
    configs = {id(m.config): m.config for m in (part or model).modules() if hasattr(m, "config")}
    configs.setdefault(id(text := model.config.get_text_config()), text)
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, own in before:
            config._attn_implementation = own


@contextmanager
def evicted_entries_masked(
    model: Any, report: PruneReport, inside_prefill: bool = False, left_inside: PruneReport | None = None
) -> Iterator[None]:
    """Make a full cache behave as the report says: what was evicted is masked for every later query.

    ``inside_prefill`` masks it for the prompt's own queries as well, but for itself; ``left_inside`` is a second
    report, of what is masked for them while the first one counts behind the prompt alone. Naive float64 attention over
    all entries, sharing no code with plphp.
    """
    keep = [(*masks, inside_prefill) for masks in _keep_masks(report)]
    keep += [] if left_inside is None else [(*masks, True) for masks in _keep_masks(left_inside)]

    def reference(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kw: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = key.double().repeat_interleave(groups, 1), value.double().repeat_interleave(groups, 1)
        logits = query.double() @ key.mT * (kw.get("scaling") or query.shape[-1] ** -0.5)
        if mask is not None:
            logits = logits + mask.double()
        keys, queries = logits.shape[-1], logits.shape[-2]
        for layer, end, seen, inside in keep:
            position = torch.arange(keys - queries, keys)
            later = (position >= end) | inside
            if layer != getattr(module, "layer_idx", -1) or not later.any():
                continue
            hidden = ~seen.repeat_interleave(groups, 1)[:, :, None] & later[:, None]
            hidden &= position[:, None] != torch.arange(seen.shape[-1])
            logits[..., : seen.shape[-1]].masked_fill_(hidden, -torch.inf)
        output = logits.softmax(-1) @ value
        return output.transpose(1, 2).to(query.dtype).contiguous(), None

    AttentionInterface.register("test_reference", reference)
    AttentionMaskInterface.register("test_reference", eager_mask)
    with attention_set(model, "test_reference", model.get_decoder()):
        yield


def _keep_masks(report: PruneReport) -> list[tuple[int, int, Tensor]]:
    """Layers, the end of each prompt, and what later queries see of it, bool [batch, kv_heads, end]."""
    masks: list[tuple[int, int, Tensor]] = []
    for prompt in report.prompts:
        for layer in prompt.layers:
            keep = torch.ones(len(layer.rows), len(layer.rows[0].kept), prompt.end, dtype=torch.bool)
            for row, one in enumerate(layer.rows):
                vision = [position for image in prompt.images[row] for position in image.positions]
                keep[row, :, vision] = False
                for head, kept in enumerate(one.kept_positions):
                    keep[row, head, kept] = True
                for head, evicted in enumerate(one.evicted_text):
                    keep[row, head, evicted] = False
            masks.append((layer.layer, prompt.end, keep))
    return masks


def last_row_attention(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """Attention of the last prompt token in every layer, per layer [batch, q_heads, seq]."""
    return [attention[:, :, -1] for attention in eager_attention(model, inputs)]


def eager_attention(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """Attention of all prompt tokens in every layer, from transformers' own eager attention.

    Returns
    -------
    list of Tensor
        Per layer, [batch, q_heads, seq, seq] in the dtype of the model.
    """
    with attention_set(model, "eager"), torch.no_grad():
        return list(model(**inputs, output_attentions=True, use_cache=False).attentions)


def assert_kept_are_top(report: PruneReport, attentions: Mapping[int, Tensor], kv_heads: int) -> None:
    """Every head kept the entries with the highest scores, as many as the rate says, and gamma is right."""
    (prompt,) = report.prompts
    for layer in prompt.layers:
        grouped = attentions[layer.layer].unflatten(1, (kv_heads, -1))
        for row, one in enumerate(layer.rows):
            vision = [position for image in prompt.images[row] for position in image.positions]
            assert one.vision_tokens == len(vision)
            if not vision:
                continue
            gamma = attentions[layer.layer][row][:, vision].sum(-1).mean()
            assert abs(gamma - one.vision_score) < EXACT
            expected = max(1, int(one.rate * len(vision) + 0.5))
            for head, kept in enumerate(one.kept_positions):
                assert len(kept) == expected == len(set(kept))
                assert kept == sorted(kept)
                assert set(kept) <= set(vision)
                score = grouped[row, head].mean(0)
                evicted = sorted(set(vision) - set(kept))
                if evicted:
                    assert score[kept].min() >= score[evicted].max() - EXACT


def attention_by_layer(model: Any, inputs: dict[str, Any]) -> dict[int, Tensor]:
    """`last_row_attention` by the number of the decoder layer; those without full attention have none."""
    attentions, text = last_row_attention(model, inputs), model.config.get_text_config()
    if len(attentions) == text.num_hidden_layers:
        return dict(enumerate(attentions))
    full = [number for number, kind in enumerate(text.layer_types) if kind == "full_attention"]
    return dict(zip(full, attentions, strict=True))


def assert_padded_rows_are_the_rows_alone(model: Any, tiny: Any, config: plphp.PLPHPConfig) -> None:
    """A batch with padding and a row without images says and keeps what its rows say and keep alone."""
    counts = [2, 0, 1]
    together, report = pruned(model, tiny.inputs(model, counts), config)
    for row, inputs in enumerate(tiny.rows(model, counts)):
        alone, own = pruned(model, inputs, config)
        for batched, single in zip(together.logits, alone.logits, strict=True):
            assert_exact(batched[row], single[0])
        padding = together.sequences.shape[1] - alone.sequences.shape[1]
        if not own.prompts:
            continue
        for many, few in zip(report.prompts[0].layers, own.prompts[0].layers, strict=True):
            kept = [[position - padding for position in head] for head in many.rows[row].kept_positions]
            assert kept == few.rows[0].kept_positions


def live_bytes(cache: Any) -> int:
    """Bytes of every tensor of keys, values and codes in the cache, found without asking the cache."""
    storages: dict[int, int] = {}
    for layer in cache.layers:
        provisional = getattr(getattr(layer, "_provisional", None), "block", None)
        for holder in (layer, getattr(layer, "prefix", None), provisional):
            for name in ("keys", "values"):
                tensor = getattr(holder, name, None)
                if isinstance(tensor, Tensor):
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        for block in getattr(layer, "coded", ()):
            for tensor in tensors_of(block):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def tensors_of(block: Any) -> list[Tensor]:
    """All tensors that are stored in a coded block, whatever their names; the codebooks belong to the model."""
    if isinstance(block, Tensor):
        return [block]
    if isinstance(block, (tuple, list)):
        return [tensor for part in block for tensor in tensors_of(part)]
    if not dataclasses.is_dataclass(block):
        return []
    fields = (getattr(block, field.name) for field in dataclasses.fields(block) if field.name != "books")
    return [tensor for part in fields for tensor in tensors_of(part)]
