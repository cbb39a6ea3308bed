# SPDX-License-Identifier: Apache-2.0
"""SnapKV's ranking, which several methods share: attention of an observation window, pooled along the sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plphp.errors import ConfigError
from plphp.policy.evidence import Evidence, LayerScores
from plphp.policy.rankers import per_head
from plphp.settings.config import PLPHPConfig
from plphp.settings.options import Option, settings

if TYPE_CHECKING:
    from torch import Tensor

OPTIONS = {
    "window": Option(16, low=1),
    "kernel": Option(5, low=1, odd=True),
    "pool": Option("avg", choices=("avg", "max")),
}


def check(config: PLPHPConfig, layers: int) -> None:
    """Raise `ConfigError` for two ways to say which rows ask."""
    if config.query_rows is not None and "window" in config.options:
        raise ConfigError(
            f"{config.method} takes its option window or query_rows, which says it in its place, not both, got "
            f"window={config.options['window']} and query_rows={config.query_rows!r}: leave one of them out."
        )


def window_evidence(config: PLPHPConfig) -> Evidence:
    """The last ``window`` prompt tokens are the query rows."""
    return Evidence(rows=settings(OPTIONS, config.options)["window"])


def by_window(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """Rank what stands before the window by its pooled attention; the window itself comes first of all."""
    import torch
    from torch.nn.functional import avg_pool1d, max_pool1d

    options = settings(OPTIONS, config.options)
    in_window = scores.need("queries").cumsum(1) > 0
    # Pooling takes what is not there, at the ends and for padding, as zero attention.
    before = per_head(scores, config).masked_fill(in_window[:, None], 0)
    pool = avg_pool1d if options["pool"] == "avg" else max_pool1d
    score = pool(before, options["kernel"], stride=1, padding=options["kernel"] // 2)
    return score.masked_fill(in_window[:, None], torch.inf)
