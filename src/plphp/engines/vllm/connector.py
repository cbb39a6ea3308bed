# SPDX-License-Identifier: Apache-2.0
"""The way from the worker to the scheduler: which blocks of which request are empty and go back to the pool.

Why a KV connector, which is made to move keys and values between servers: the worker knows which blocks fell empty, the
scheduler owns the pool, and they may be processes of their own. A connector has a half in both, and is the only object
whose messages vLLM carries from a worker to the scheduler. It moves no keys and values here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from plphp.errors import CacheStateError, UnsupportedModelError
from plphp.pruning.report import BankProgress

from .metrics import PruneMetrics, PruneStats
from .pruned_prompt import PrunedPrompt
from .refusals import refuse_unsupported
from .runner import attach_to_runner
from .setup import Setup
from .specs import PrunedLayerSpec
from .state import Pruning
from .tensor_parallel import tensor_parallel_of

_logger = init_logger("vllm.plphp")


class EmptyMetadata(KVConnectorMetadata):
    """What goes from the scheduler to the worker: nothing, but vLLM wants an object."""


@dataclass
class PrunedPrompts(KVConnectorWorkerMetadata):
    """The prompts that were pruned in a pass, by request.

    Parameters
    ----------
    prompts : dict of str to PrunedPrompt
        By request.
    whole : int
        Prompts with vision tokens that began and stay whole, as a query bank is still being collected.
    bank : BankProgress, optional
        How far the bank is, where that has changed.
    """

    prompts: dict[str, PrunedPrompt] = field(default_factory=dict)
    whole: int = 0
    bank: BankProgress | None = None

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Join the reports of two workers of tensor parallelism, which must be equal: a block is freed in both."""
        if not isinstance(other, PrunedPrompts) or other.prompts != self.prompts:
            raise CacheStateError(
                "Two workers pruned the same prompts differently, so that their blocks cannot be freed: start the "
                "server again with --tensor-parallel-size 1, and please report this."
            )
        return self


class PLPHPConnector(KVConnectorBase_V1, SupportsHMA):
    """In the worker it holds the state of pruning; in the scheduler it frees blocks and keeps the statistics.

    ``SupportsHMA`` is the promise that it knows KV cache groups, without which vLLM puts all layers into one group.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        chain = refuse_unsupported(vllm_config)
        self._groups = _group_of_layer(kv_cache_config)
        sizes = {group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups}
        if len(sizes) != 1:
            raise UnsupportedModelError(f"plphp needs blocks of one size in all layers, got {sorted(sizes)}.")
        self.pruning: Pruning | None = None
        self._stats = PruneStats()
        if role == KVConnectorRole.WORKER:
            self.pruning = Pruning(Setup(chain, len(self._groups), sizes.pop(), tensor_parallel_of(vllm_config)))
            attach_to_runner()

    @property
    def requires_kv_delivery(self) -> bool:
        """False: no keys and values are handed on."""
        return False

    # In the worker.

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing is loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    def build_connector_worker_meta(self) -> PrunedPrompts | None:
        """Report the prompts that were pruned in the pass that has ended."""
        if self.pruning is None:
            return None
        report, own_bank = PrunedPrompts(self.pruning.take_pruned()), self.pruning.own_bank
        if own_bank is not None:
            report.whole, report.bank = own_bank.take_whole(), own_bank.take_progress()
        return None if report == PrunedPrompts() else report

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Forget requests that have ended; nothing is sent or received that could be finished."""
        if self.pruning is not None:
            self.pruning.forget_without_pass(finished_req_ids)
        return None, None

    # In the scheduler.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """No tokens of a request are held elsewhere."""
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing is to be loaded."""

    def build_connector_meta(self, scheduler_output: Any) -> EmptyMetadata:
        """Send the worker no message."""
        return EmptyMetadata()

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The blocks of a request that has ended may be freed at once."""
        return False, None

    def update_connector_output(self, connector_output: Any) -> None:
        """Free the blocks that fell empty in a pass."""
        report = connector_output.kv_connector_worker_meta
        if not isinstance(report, PrunedPrompts):
            return
        for request_id, prompt in report.prompts.items():
            self._free(request_id, prompt)
        self._stats.add_bank(report.whole, report.bank)

    def _free(self, request_id: str, prompt: PrunedPrompt) -> None:
        """Give the empty blocks of a request back, and count and log them."""
        if self._kv_cache_manager is None:
            raise CacheStateError("The scheduler told its KV connector of a pruned prompt before its KV cache manager.")
        managers = self._kv_cache_manager.coordinator.single_type_managers
        pool = self._kv_cache_manager.block_pool
        before = pool.get_num_free_blocks()
        for layer, blocks in prompt.blocks.items():
            # The way in which vLLM frees what slides out of a window: null blocks take the place of those removed. For
            # a request that has ended meanwhile, and given all of its blocks back, it does nothing.
            managers[self._groups[layer]]._remove_blocks_in_range(request_id, 0, blocks)
        freed = pool.get_num_free_blocks() - before
        self._stats.add(prompt, freed)
        _logger.info(
            "plphp: request %s keeps %.1f %% of its %d vision tokens (%s per layer), %d blocks freed.",
            request_id,
            100 * prompt.retention,
            prompt.vision_tokens,
            ", ".join(f"{prompt.kept[layer]:g}" for layer in sorted(prompt.kept)),
            freed,
        )

    # Of the metrics.

    def get_kv_connector_stats(self) -> PruneStats | None:
        """Statistics since the last call; those of the worker's half are always empty."""
        stats, self._stats = self._stats, PruneStats()
        return None if stats.is_empty() else stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PruneStats | None:
        """Rebuild the statistics that `get_kv_connector_stats` sent from another process."""
        return None if data is None else PruneStats(data)

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> PruneMetrics:
        """Make the metrics of the Prometheus endpoint."""
        return PruneMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _group_of_layer(kv_cache_config: Any) -> dict[int, int]:
    """The number of the KV cache group of each decoder layer."""
    groups = {}
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        if not isinstance(group.kv_cache_spec, PrunedLayerSpec) or len(group.layer_names) != 1:
            raise UnsupportedModelError(
                f"plphp needs full attention and a KV cache group of its own in each decoder layer, got a group of "
                f"{type(group.kv_cache_spec).__name__} with the layers {', '.join(group.layer_names)}. On CUDA start "
                "with --attention-backend FLASH_ATTN."
            )
        groups[extract_layer_index(group.layer_names[0])] = number
    if sorted(groups) != list(range(len(groups))):
        raise UnsupportedModelError(f"plphp needs a KV cache in each decoder layer, got it in {sorted(groups)}.")
    return groups
