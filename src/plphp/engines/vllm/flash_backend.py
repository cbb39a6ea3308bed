# SPDX-License-Identifier: Apache-2.0
"""vLLM's FlashAttention with pruning.

It has never run on a GPU, so that `plphp.engines.vllm.refusals` lets nobody use it unasked.
"""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

from .attention import PrunedBackend


class PrunedFlashBackend(PrunedBackend, FlashAttentionBackend):
    """Stands in for vLLM's backend ``FLASH_ATTN``."""
