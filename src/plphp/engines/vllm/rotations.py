# SPDX-License-Identifier: Apache-2.0
"""How a model that vLLM runs rotates its queries by their position: candidates are compared with what it does.

What a layer does is nowhere written down: some layers have a rotary embedding and do not call it, some scale what it
gives. So the text model is run once, when the engine starts, over a few equal tokens at different positions. It runs as
when vLLM measures memory, without attention metadata, and attention is 0, so that the tokens know nothing of each other
and the queries of a layer differ by their rotation alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from plphp.errors import UnsupportedModelError
from plphp.io.quoting import one_line
from plphp.policy.rotation import POSITIONS, Rotation, explaining_rotation, growing_kind

_queries: ContextVar[dict[int, Tensor] | None] = ContextVar("plphp_probed_queries", default=None)


def find_rotations(runner: Any) -> dict[int, Rotation]:
    """Find the rotation of every decoder layer.

    Parameters
    ----------
    runner : vllm.v1.worker.gpu_model_runner.GPUModelRunner
        Holds a model with `plphp.engines.vllm.attention.PrunedAttention` in its layers.

    Returns
    -------
    dict of int to Rotation
        By decoder layer.

    Raises
    ------
    UnsupportedModelError
        If nothing explains the queries of a layer, or the frequencies depend on the length of the prompt.
    """
    config = runner.model_config
    refuse_growing(config)
    name = f"{config.model!r} ({config.hf_text_config.model_type})"
    positions = [0, *(min(position, config.max_model_len - 1) for position in POSITIONS)]
    try:
        seen = _queries_at(runner, positions)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises that expects tokens and pictures
        raise UnsupportedModelError(
            f"The text model of {name} cannot read tokens at positions of their own: {one_line(error)}"
        ) from error
    candidates, rotations = rotary_embeddings(runner.model), {}
    for layer, queries in seen.items():
        rotation = explaining_rotation(dict(zip(positions, queries, strict=True)), candidates)
        if rotation is None:
            raise UnsupportedModelError(
                f"The queries of layer {layer} of {name} do not turn with their position as any rotary embedding that "
                "plphp knows, so they cannot be foretold."
            )
        rotations[layer] = rotation
    return rotations


def refuse_growing(config: Any) -> None:
    """Raise `UnsupportedModelError` where the frequencies of a model depend on the length of the prompt.

    Parameters
    ----------
    config : vllm.config.ModelConfig
        Of the engine.
    """
    kind = growing_kind(getattr(config.hf_text_config, "rope_parameters", None) or {})
    if kind is not None:
        raise UnsupportedModelError(
            f"plphp collects no query bank for {config.model!r}: its rotary embedding is of the kind {kind!r}, whose "
            "frequencies depend on the length of the prompt, so that its queries cannot be foretold. Choose another "
            "method."
        )


def rotary_embeddings(model: torch.nn.Module) -> list[Rotation]:
    """The rotations that the rotary embeddings of a model describe, whichever layer they belong to.

    Parameters
    ----------
    model : torch.nn.Module
        The cosines and sines of its rotary embeddings are computed again: those that they hold are rounded to the
        dtype of the model. A factor on both, as of YaRN, is no part of the rotation.
    """
    known: dict[tuple[tuple[float, ...], bool], Rotation] = {}
    for module in model.modules():
        compute, neox = getattr(module, "_compute_cos_sin_cache", None), getattr(module, "is_neox_style", None)
        if compute is None or not isinstance(neox, bool):
            continue
        cache = compute()
        if not isinstance(cache, Tensor) or cache.ndim != 2 or len(cache) < 2:
            continue
        cos, sin = cache[1].float().cpu().chunk(2)
        frequencies = torch.atan2(sin, cos)
        known[(tuple(frequencies.tolist()), neox)] = Rotation(frequencies, interleaved=not neox)
    return list(known.values())


def note_queries(layer: int, query: Tensor, output: Tensor) -> bool:
    """While a model is probed, take the queries of a layer and let its attention be 0; whether it is probed.

    Parameters
    ----------
    layer : int
        Decoder layer.
    query : Tensor
        [tokens, q_heads, dim]; post-RoPE.
    output : Tensor
        The attention of the layer, changed in place.
    """
    queries = _queries.get()
    if queries is None:
        return False
    queries[layer] = query.float().cpu()
    output.zero_()
    return True


@torch.inference_mode()
def _queries_at(runner: Any, positions: list[int]) -> dict[int, Tensor]:
    """By layer, the queries [positions, q_heads, dim] of equal tokens at these positions."""
    from vllm.forward_context import set_forward_context

    width, dtype = runner.model_config.get_inputs_embeds_size(), runner.model_config.dtype
    # The embedding of no token: whatever it is, all queries are made of the same.
    token = torch.randn(1, width, generator=torch.Generator().manual_seed(0)).to(runner.device, dtype)
    at = torch.tensor(positions, device=runner.device)
    if runner.uses_mrope:
        at = at.expand(len(runner.mrope_positions.gpu), -1).contiguous()
    # Not compiled: the first run of a compiled model decides on the shapes that it is compiled for.
    context = set_forward_context(None, runner.vllm_config, num_tokens=len(positions), skip_compiled=True)
    with _probing() as queries, context:
        runner.model(
            input_ids=None, positions=at, intermediate_tensors=None, inputs_embeds=token.repeat(len(positions), 1)
        )
    return queries


@contextmanager
def _probing() -> Iterator[dict[int, Tensor]]:
    """While open, `note_queries` fills what it gives."""
    queries: dict[int, Tensor] = {}
    token = _queries.set(queries)
    try:
        yield queries
    finally:
        _queries.reset(token)
