# SPDX-License-Identifier: Apache-2.0
"""The queries of a model's layers for one token at different positions, before the engine takes requests.

The text model runs as when vLLM measures memory, without attention metadata. Attention is 0, so that the tokens know
nothing of each other, and the queries of a layer differ by what it does with their positions alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_queries: ContextVar[dict[int, Tensor] | None] = ContextVar("plphp_probed_queries", default=None)


@torch.inference_mode()
def queries_at(runner: Any, positions: list[int]) -> dict[int, Tensor]:
    """Run the text model once over equal tokens.

    Parameters
    ----------
    runner : vllm.v1.worker.gpu_model_runner.GPUModelRunner
        Holds a model with `plphp.engines.vllm.attention.PrunedAttention` in its layers.
    positions : list of int
        Where the tokens are.

    Returns
    -------
    dict of int to Tensor
        float32 [positions, q_heads, dim] by decoder layer, on the CPU; post-RoPE.
    """
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


@contextmanager
def _probing() -> Iterator[dict[int, Tensor]]:
    """While open, `note_queries` fills what it gives."""
    queries: dict[int, Tensor] = {}
    token = _queries.set(queries)
    try:
        yield queries
    finally:
        _queries.reset(token)
