# SPDX-License-Identifier: Apache-2.0
"""Profiles and measured retention as tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from rich.table import Table

from plphp.policy.allocation import LayerClass

if TYPE_CHECKING:
    from plphp.studies.calibration import RetentionMeasurement
    from plphp.studies.profile_report import AttentionProfile


def profile_table(profile: AttentionProfile) -> Table:
    """Per layer, the vision attention score of each choice of query rows: mean and spread over the prompts.

    Parameters
    ----------
    profile : AttentionProfile
        See `plphp.profile`.
    """
    scores = [profile.layer_scores(rows) for rows in profile.query_rows]
    table = Table(title=f"vision attention score (mean ± std of {len(profile.prompts)})")
    table.add_column("layer", justify="right")
    for rows in profile.query_rows:
        table.add_column("text" if rows == "text" else f"last {rows}", justify="right")
    for place, layer in enumerate(profile.layers):
        spreads = [one[:, place].std(ddof=1) if len(one) > 1 else 0.0 for one in scores]
        cells = (f"{one[:, place].mean():.3f} ± {spread:.3f}" for one, spread in zip(scores, spreads, strict=True))
        table.add_row(str(layer), *cells)
    return table


def class_table(measured: RetentionMeasurement) -> Table:
    """Per layer, how many prompts put it in each class."""
    known = [name for name in get_args(LayerClass) if any(name in counts for counts in measured.classes.values())]
    table = Table(title=f"classes of the layers over {len(measured.retentions)} prompt(s)")
    for heading in ("layer", *known):
        table.add_column(heading, justify="right", overflow="fold")
    for layer, counts in measured.classes.items():
        table.add_row(str(layer), *(str(counts.get(name, 0)) for name in known))
    return table


def retention_line(measured: RetentionMeasurement) -> str:
    """One line: mean, spread and extremes of the retention over the prompts."""
    values = measured.summary()
    fewest, most = values["vision_tokens_min"], values["vision_tokens_max"]
    line = (
        f"{values['retention_mean']:.3f} of the vision entries kept (standard deviation {values['retention_std']:.3f}, "
        f"{values['retention_min']:.3f} to {values['retention_max']:.3f}) over {values['prompts']} prompt(s) of "
        f"{f'{fewest}' if fewest == most else f'{fewest} to {most}'} vision tokens"
    )
    exempt = measured.retentions != measured.retentions_all_layers
    return line + (f"; {values['retention_mean_all_layers']:.3f} with the exempt layers" if exempt else "")
