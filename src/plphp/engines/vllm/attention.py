# SPDX-License-Identifier: Apache-2.0
"""What pruning adds to an attention backend of vLLM; ``cpu_backend`` and ``flash_backend`` mix it into a backend.

A backend of vLLM is three classes: the backend itself, the attention of a layer, and the builder of a layer's metadata.
Each gets an addition that is mixed in before it; where the plugin is not configured the latter two are vLLM's own.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, ClassVar

from torch import Tensor
from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import FullAttentionSpec

from plphp.errors import UnsupportedModelError

from .query_probe import note_queries
from .refusals import refuse_unsupported
from .settings import settings_of
from .specs import PrunedLayerSpec
from .step import Step, current


class PrunedBackend:
    """Stands in for a backend of vLLM, and is that backend where the plugin is not configured; mixed in before it."""

    configured: ClassVar[bool] = False
    """Whether the model that was built last is pruned: vLLM asks for the specs of layers and names no model."""

    @classmethod
    def get_impl_cls(cls) -> type:
        """The attention of a layer; vLLM asks while it builds a model."""
        config = get_current_vllm_config_or_none()
        if config is not None:
            cls.configured = settings_of(config) is not None
        return cls._with(PrunedAttention, super().get_impl_cls())  # type: ignore[misc]

    @classmethod
    def get_builder_cls(cls) -> type:
        """The maker of a layer's metadata."""
        return cls._with(PrunedMetadataBuilder, super().get_builder_cls())  # type: ignore[misc]

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Give each layer a KV cache group of its own."""
        if cls.configured and type(spec) is FullAttentionSpec:
            return PrunedLayerSpec.of(spec)
        return spec

    @classmethod
    def _with(cls, addition: type, own: type) -> type:
        return _mixed(addition, own) if cls.configured else own


@cache
def _mixed(addition: type, own: type) -> type:
    """A class with an addition of the plugin before a class of vLLM: the same object however often vLLM asks."""
    return type(f"Pruned{own.__name__}", (addition, own), {})


class PrunedMetadataBuilder:
    """Makes the metadata of one layer; mixed in before a builder of vLLM."""

    layer_names: list[str]
    block_size: int

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """Describe a pass to the attention of a layer, which reads behind the empty blocks."""
        make = super().build  # type: ignore[misc]
        step = current()
        if step is None:
            return make(common_prefix_len, common_attn_metadata, fast_build)
        layer_idx = extract_layer_index(self.layer_names[0])
        common = step.shortened(layer_idx, self.block_size, common_attn_metadata)
        metadata = make(common_prefix_len, common, fast_build)
        metadata.plphp_step = step  # rides to `PrunedAttention.forward`, which runs after the context variable is reset
        return metadata


class PrunedAttention:
    """Attends as vLLM does, then prunes the prompts that end in the pass; mixed in before an attention of vLLM."""

    scale: float
    attn_type: str
    sliding_window: Any
    alibi_slopes: Any
    logits_soft_cap: Any
    sinks: Any
    kv_sharing_target_layer_name: str | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        refuse_unsupported(config)
        unsupported = {
            "a sliding window": self.sliding_window not in (-1, (-1, -1)),
            "ALiBi slopes": self.alibi_slopes is not None,
            "a soft cap on its logits": bool(self.logits_soft_cap),
            "attention sinks": self.sinks is not None,
            "the KV cache of another layer": self.kv_sharing_target_layer_name is not None,
            f"attention of type {self.attn_type!r}": self.attn_type != AttentionType.DECODER,
        }
        for what in (name for name, present in unsupported.items() if present):
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
        """Attend as vLLM's own ``forward`` does, then let the pass take in the prompts that it holds."""
        layer_idx = extract_layer_index(layer.layer_name)
        if note_queries(layer_idx, query, output):
            return output
        attend = super().forward  # type: ignore[misc]
        result: Tensor = attend(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        step: Step | None = getattr(attn_metadata, "plphp_step", None)
        if step is not None:
            write = partial(_write, self, layer, kv_cache)
            step.after_attention(layer_idx, (query, key, value), result, self.scale, write)
        return result


def _write(attention: Any, layer: Any, kv_cache: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Write entries by the backend's own kernel, which knows the layout of its paged cache."""
    attention.do_kv_cache_update(layer, keys, values, kv_cache, slots)
