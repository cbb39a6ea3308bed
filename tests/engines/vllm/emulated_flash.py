# SPDX-License-Identifier: Apache-2.0
"""vLLM's FlashAttention backend on a CPU, with torch in the place of its two kernels.

What the plugin does on a GPU goes through here as it would there, but for the kernels themselves, CUDA graphs and the
order of events on a stream.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backends import flash_attn

from plphp.engines.vllm import names
from plphp.engines.vllm.flash_backend import PrunedFlashBackend


class FlashOnCPU(PrunedFlashBackend):
    """Takes what the CPU's own backend takes."""

    supported_dtypes: ClassVar = [torch.float32, torch.bfloat16]


def install() -> None:
    """Let vLLM take it for its CPU backend."""
    flash_attn.get_flash_attn_version = lambda **_: 2
    flash_attn.flash_attn_supports_quant_query_input = lambda: False
    flash_attn.flash_attn_varlen_func = attend
    flash_attn.reshape_and_cache_flash = write
    names.BACKENDS["CPU_ATTN"] = "emulated_flash.FlashOnCPU"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    block_table: Tensor,
    softmax_scale: float,
    causal: bool,
    **_: Any,
) -> None:
    """Causal attention of queries [tokens, heads, dim] over paged keys and values [blocks, tokens, kv_heads, dim]."""
    assert causal
    out = out.view(len(q), q.shape[1], q.shape[2])
    for row, length in enumerate(seqused_k.tolist()):
        first, last = cu_seqlens_q[row : row + 2].tolist()
        blocks = block_table[row, : -(-length // k.shape[1])].long()
        keys, values = (one[blocks].flatten(0, 1)[:length].transpose(0, 1)[None] for one in (k, v))
        seen = torch.arange(length) <= torch.arange(length - (last - first), length)[:, None]
        query = q[first:last].transpose(0, 1)[None]
        found = torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=seen, scale=softmax_scale, enable_gqa=True
        )
        out[first:last] = found[0].transpose(0, 1)


def write(keys: Tensor, values: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor, *_: Any) -> None:
    """Put the first tokens of keys and values [tokens, kv_heads, dim] into slots of a paged cache."""
    block, place = slots // key_cache.shape[1], slots % key_cache.shape[1]
    key_cache[block, place] = keys[: len(slots)]
    value_cache[block, place] = values[: len(slots)]
