# SPDX-License-Identifier: Apache-2.0
"""vLLM's FlashAttention with pruning; never run on a GPU, so that `plphp.vllm.refusals` lets no one use it unasked."""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from .attention import PrunedAttention, PrunedBackend, PrunedMetadataBuilder


class PrunedFlashAttention(PrunedAttention, FlashAttentionImpl):
    """The attention of a layer."""


class PrunedFlashMetadataBuilder(PrunedMetadataBuilder, FlashAttentionMetadataBuilder):
    """The maker of a layer's metadata."""


class PrunedFlashBackend(PrunedBackend, FlashAttentionBackend):
    """Stands in for vLLM's backend ``FLASH_ATTN``."""

    pruned = (PrunedFlashAttention, PrunedFlashMetadataBuilder)
    unpruned = (FlashAttentionImpl, FlashAttentionMetadataBuilder)
