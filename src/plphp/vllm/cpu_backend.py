# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU attention with pruning."""

from __future__ import annotations

from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from .attention import PrunedAttention, PrunedBackend, PrunedMetadataBuilder


class PrunedCPUAttention(PrunedAttention, CPUAttentionBackendImpl):
    """The attention of a layer."""


class PrunedCPUMetadataBuilder(PrunedMetadataBuilder, CPUAttentionMetadataBuilder):
    """The maker of a layer's metadata."""


class PrunedCPUBackend(PrunedBackend, CPUAttentionBackend):
    """Stands in for vLLM's backend ``CPU_ATTN``."""

    pruned = (PrunedCPUAttention, PrunedCPUMetadataBuilder)
    unpruned = (CPUAttentionBackendImpl, CPUAttentionMetadataBuilder)
