# SPDX-License-Identifier: Apache-2.0
"""What was pruned, in the server's log and at its Prometheus endpoint."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

from plphp.pruning.report import BankProgress

from .pruned_prompt import PrunedPrompt

RETENTION_BUCKETS = tuple(tenth / 10 for tenth in range(1, 11))


class PruneStats(KVConnectorStats):
    """The prompts that were pruned in an interval.

    ``data["prompts"]`` holds for each prompt its ``vision_tokens``, the vision tokens ``kept`` in each layer by a KV
    head (the mean over the heads), its ``retention`` and the blocks ``freed`` in all layers. ``data["whole"]`` counts
    the prompts that stayed whole for want of a query bank, and ``data["bank"]`` has the prompts that the bank is of,
    and those that make it complete, where that has changed.
    """

    def add(self, prompt: PrunedPrompt, freed: int) -> None:
        """Note down a prompt."""
        # Names in the place of numbers: they are the labels of a metric, and may travel as JSON.
        kept = {str(layer): prompt.kept[layer] for layer in sorted(prompt.kept)}
        entry = {"vision_tokens": prompt.vision_tokens, "kept": kept, "retention": prompt.retention, "freed": freed}
        self._prompts.append(entry)

    def add_bank(self, whole: int, progress: BankProgress | None) -> None:
        """Note down what became of a query bank that the server collects by itself."""
        if whole:
            self.data["whole"] = self.data.get("whole", 0) + whole
        if progress is not None:
            self.data["bank"] = {"collected": progress.collected, "wanted": progress.wanted}

    @property
    def _prompts(self) -> list[dict[str, Any]]:
        prompts: list[dict[str, Any]] = self.data.setdefault("prompts", [])
        return prompts

    def reset(self) -> None:
        """Forget everything."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Take in the prompts of another interval."""
        self._prompts.extend(other.data.get("prompts", ()))
        self.add_bank(other.data.get("whole", 0), None)
        if "bank" in other.data:
            self.data["bank"] = other.data["bank"]
        return self

    def reduce(self) -> dict[str, int | float]:
        """Totals, for the log."""
        prompts, bank = self._prompts, self.data.get("bank")
        of_bank = {} if bank is None else {"plphp query bank prompts": bank["collected"]}
        whole = {"plphp whole prompts": self.data["whole"]} if "whole" in self.data else {}
        return {
            "plphp prompts": len(prompts),
            "plphp vision tokens": sum(prompt["vision_tokens"] for prompt in prompts),
            "plphp mean retention": round(sum(prompt["retention"] for prompt in prompts) / max(1, len(prompts)), 4),
            "plphp blocks freed": sum(prompt["freed"] for prompt in prompts),
            **whole,
            **of_bank,
        }

    def is_empty(self) -> bool:
        """Whether no prompt was pruned, and nothing collected."""
        return not any(self.data.values())


class PruneMetrics(KVConnectorPromMetrics):
    """Counters ``vllm:plphp_*`` for each engine of a server."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine)

        def counter(name: str, documentation: str, extra: tuple[str, ...] = ()) -> Any:
            return self._counter_cls(name=name, documentation=documentation, labelnames=[*labelnames, *extra])

        self._prompts = self._per_engine(counter("vllm:plphp_prompts", "Prompts whose vision tokens were pruned."))
        self._vision = self._per_engine(counter("vllm:plphp_vision_tokens", "Vision tokens of pruned prompts."))
        self._freed = self._per_engine(counter("vllm:plphp_freed_blocks", "KV cache blocks returned to the pool."))
        self._whole = self._per_engine(
            counter("vllm:plphp_whole_prompts", "Prompts kept whole while a query bank was being collected.")
        )
        self._bank = self._per_engine(
            self._gauge_cls(
                name="vllm:plphp_bank_prompts",
                documentation="Prompts that the query bank is of which the server collects by itself.",
                labelnames=labelnames,
                multiprocess_mode="mostrecent",
            )
        )
        self._kept = counter(
            "vllm:plphp_kept_vision_tokens", "Vision tokens that a KV head of a layer keeps, the mean.", ("layer",)
        )
        self._retention = self._per_engine(
            self._histogram_cls(
                name="vllm:plphp_retention",
                documentation="Fraction of the vision entries of a prompt that is kept.",
                buckets=RETENTION_BUCKETS,
                labelnames=labelnames,
            )
        )

    def _per_engine(self, metric: Any) -> Any:
        return create_metric_per_engine(metric, self.per_engine_labelvalues)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Count the prompts of an interval."""
        self._whole[engine_idx].inc(transfer_stats_data.get("whole", 0))
        if "bank" in transfer_stats_data:
            self._bank[engine_idx].set(transfer_stats_data["bank"]["collected"])
        for prompt in transfer_stats_data.get("prompts", ()):
            self._prompts[engine_idx].inc()
            self._vision[engine_idx].inc(prompt["vision_tokens"])
            self._freed[engine_idx].inc(prompt["freed"])
            self._retention[engine_idx].observe(prompt["retention"])
            for layer, kept in prompt["kept"].items():
                self._kept.labels(*self.per_engine_labelvalues[engine_idx], layer).inc(kept)
