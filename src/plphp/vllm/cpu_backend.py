# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU attention with pruning; where the plugin is not configured it is vLLM's own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec

from ..errors import UnsupportedModelError
from .refusals import refuse_unsupported
from .settings import settings_of
from .specs import PrunedLayerSpec
from .step import Step, current


class PrunedCPUBackend(CPUAttentionBackend):
    """Stands in for vLLM's backend ``CPU_ATTN``."""

    _configured = False
    """Of the model that was built last; vLLM asks for the specs of its layers without saying whose they are."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """The attention of a layer; vLLM asks while it builds a model."""
        config = get_current_vllm_config_or_none()
        if config is not None:
            PrunedCPUBackend._configured = settings_of(config) is not None
        return PrunedCPUAttention if PrunedCPUBackend._configured else CPUAttentionBackendImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """The maker of a layer's metadata."""
        return PrunedCPUMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Give each layer a KV cache group of its own."""
        if cls._configured and type(spec) is FullAttentionSpec:
            return PrunedLayerSpec.of(spec)
        return spec


@dataclass
class PrunedCPUMetadata(CPUAttentionMetadata):
    """Metadata of one layer, with the pass that they are of."""

    step: Step | None = None


class PrunedCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Makes the metadata of one layer."""

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """Describe a pass to the attention of a layer, which reads behind the empty blocks."""
        step = current()
        if step is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        layer_idx = extract_layer_index(self.layer_names[0])
        common = step.shortened(layer_idx, self.block_size, common_attn_metadata)
        metadata = super().build(common_prefix_len, common, fast_build)
        return PrunedCPUMetadata(**vars(metadata), step=step)


class PrunedCPUAttention(CPUAttentionBackendImpl):
    """Attends as vLLM does, then prunes the prompts that end in the pass."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        refuse_unsupported(config)
        given = {
            "a sliding window": self.sliding_window != -1,
            "ALiBi slopes": self.alibi_slopes is not None,
            "a soft cap on its logits": bool(self.logits_soft_cap),
            "attention sinks": self.sinks is not None,
            "the KV cache of another layer": self.kv_sharing_target_layer_name is not None,
            f"attention of type {self.attn_type!r}": self.attn_type != AttentionType.DECODER,
        }
        for what in (name for name, present in given.items() if present):
            raise UnsupportedModelError(
                f"plphp does not prune {config.model_config.model!r} in vLLM: a layer has {what}. Serve it without "
                "plphp."
            )

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attend, see vLLM's own."""
        result = super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        step = getattr(attn_metadata, "step", None)
        if step is not None:
            write = partial(_write, self, layer, kv_cache)
            step.after_attention(extract_layer_index(layer.layer_name), (query, key, value), result, self.scale, write)
        return result


def _write(attention: Any, layer: Any, kv_cache: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    attention.do_kv_cache_update(layer, keys, values, kv_cache, slots)
