# SPDX-License-Identifier: Apache-2.0
"""What was kept and generated over a run, for lmms-eval's log and results file."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from plphp.pruning.report import PruneReport


@dataclass
class Totals:
    """Sums over the batches of a run; what was kept is counted where there were vision tokens."""

    tokens: int = 0
    started: float = field(default_factory=time.perf_counter)
    rows: int = 0
    held: float = 0.0
    vision: float = 0.0
    computed: float = 0.0

    def add(self, report: PruneReport, tokens: int) -> None:
        """Count a batch and the tokens of its answers."""
        self.tokens += tokens
        if not any(row.vision_tokens for prompt in report.prompts for layer in prompt.layers for row in layer.rows):
            return
        self.rows += report.batch
        self.held += report.batch * report.vision_held
        self.vision += report.batch * report.retention
        self.computed += report.batch * report.computed_share

    @property
    def means(self) -> dict[str, float]:
        """Means over the documents with vision tokens, none where there are no such documents.

        ``plphp_held``: bytes of the vision KV, over those of a full cache; ``plphp_vision``: vision entries held in any
        way; ``plphp_computed``: tokens x layers that were computed to read the prompts.
        """
        sums = {"plphp_held": self.held, "plphp_vision": self.vision, "plphp_computed": self.computed}
        return {name: total / self.rows for name, total in sums.items()} if self.rows else {}

    def log(self) -> None:
        """Write the figures to lmms-eval's log; they stand under ``throughput`` in its results file."""
        from lmms_eval.models.model_utils.gen_metrics import log_metrics

        seconds = time.perf_counter() - self.started
        log_metrics(seconds, self.tokens, self.tokens / seconds, self.means)
