# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU attention with pruning."""

from __future__ import annotations

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from .attention import PrunedBackend


class PrunedCPUBackend(PrunedBackend, CPUAttentionBackend):
    """Stands in for vLLM's backend ``CPU_ATTN``."""
