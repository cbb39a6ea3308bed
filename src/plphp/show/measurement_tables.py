# SPDX-License-Identifier: Apache-2.0
"""Profiles and measured retention as tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from rich.table import Table

from plphp.policy.allocation import LayerClass

if TYPE_CHECKING:
    import numpy as np

    from plphp.studies.calibration import RetentionMeasurement
    from plphp.studies.profile_report import AttentionProfile


def profile_table(profile: AttentionProfile) -> Table:
    """Table of the vision attention score per layer and choice of query rows: mean and spread over the prompts.

    Parameters
    ----------
    profile : AttentionProfile
        What `plphp.profile` measured.
    """
    scores = [profile.layer_scores(rows) for rows in profile.query_rows]
    table = Table(title=f"vision attention score (mean ± std of {len(profile.prompts)})")
    table.add_column("layer", justify="right")
    for rows in profile.query_rows:
        table.add_column("text" if rows == "text" else f"last {rows}", justify="right")
    for index, layer in enumerate(profile.layers):
        table.add_row(str(layer), *(_mean_and_spread(choice[:, index]) for choice in scores))
    return table


def class_table(measured: RetentionMeasurement) -> Table:
    """Table of how many prompts put each layer in each class."""
    known = [name for name in get_args(LayerClass) if any(name in counts for counts in measured.classes.values())]
    table = Table(title=f"classes of the layers over {len(measured.retentions)} prompt(s)")
    for heading in ("layer", *known):
        table.add_column(heading, justify="right", overflow="fold")
    for layer, counts in measured.classes.items():
        table.add_row(str(layer), *(str(counts.get(name, 0)) for name in known))
    return table


def retention_line(measured: RetentionMeasurement) -> str:
    """Line with the mean, spread and extremes of the retention over the prompts."""
    values = measured.summary()
    fewest, most = values["vision_tokens_min"], values["vision_tokens_max"]
    line = (
        f"{values['retention_mean']:.3f} of the vision entries kept (standard deviation {values['retention_std']:.3f}, "
        f"{values['retention_min']:.3f} to {values['retention_max']:.3f}) over {values['prompts']} prompt(s) of "
        f"{f'{fewest}' if fewest == most else f'{fewest} to {most}'} vision tokens"
    )
    exempt = measured.retentions != measured.retentions_all_layers
    return line + (f"; {values['retention_mean_all_layers']:.3f} with the exempt layers" if exempt else "")


def _mean_and_spread(scores: np.ndarray) -> str:
    """Mean and standard deviation (of the sample) of the scores of prompts, float64 [prompt]."""
    spread = scores.std(ddof=1) if len(scores) > 1 else 0.0
    return f"{scores.mean():.3f} ± {spread:.3f}"
