# SPDX-License-Identifier: Apache-2.0
"""Pictures of a profile: vision attention against depth, and per layer and head.

Needs matplotlib (``pip install plphp[plots]``). The figures are drawn without a display.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .plots import COLOURS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from plphp.studies.profile_report import AttentionProfile

LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours of the lines: Okabe and Ito's palette, safe for colour-blind eyes."""
MARKERS = ("o", "^", "s", "D", "v", "P", "X")
"""Markers of the lines, for prints in grey."""


def plot_profile(profile: AttentionProfile) -> Figure:
    """Draw the vision attention score against depth, a line for each choice of query rows.

    Parameters
    ----------
    profile : AttentionProfile
        What `plphp.profile` measured.

    Returns
    -------
    matplotlib.figure.Figure
        Lines are means over the prompts, bands their standard deviation. A ring marks the bottom of the deepest
        valley where re-attention appears.

    Raises
    ------
    BackendUnavailableError
        If matplotlib is not installed.
    """
    figure = new_figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, rows in enumerate(profile.query_rows):
        colour = LINES[number % len(LINES)]
        scores, valley = profile.layer_scores(rows), profile.re_attention(rows)
        mean = scores.mean(0)
        spread = scores.std(0, ddof=1) if len(scores) > 1 else np.zeros_like(mean)
        marker = MARKERS[number % len(MARKERS)]
        axes.plot(profile.layers, mean, label=rows_name(rows), color=colour, marker=marker, markersize=4)
        low, high = np.clip(mean - spread, 0, 1), np.clip(mean + spread, 0, 1)
        axes.fill_between(profile.layers, low, high, color=colour, alpha=0.15, linewidth=0)
        if valley.appears:
            axes.scatter([valley.layer], [valley.score], s=120, facecolors="none", edgecolors=colour, linewidths=1.5)
    prompts = len(profile.prompts)
    axes.set(xlabel="layer", ylabel="vision attention score", ylim=(0, None))
    axes.set_title(f"mean and standard deviation over {prompts} prompt{'s' * (prompts > 1)}", fontsize="medium")
    axes.locator_params(axis="x", integer=True)
    axes.legend(title="query rows", fontsize="small")
    return figure


def plot_heads(profile: AttentionProfile) -> Figure:
    """Draw the mean score of every layer and query head, a panel for each choice of query rows.

    Parameters
    ----------
    profile : AttentionProfile
        What `plphp.profile` measured.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    BackendUnavailableError
        If matplotlib is not installed.
    """
    panels = len(profile.query_rows)
    figure = new_figure(figsize=(2 + 3 * panels, 4.5), layout="constrained")
    means = [profile.head_scores(rows).mean(0) for rows in profile.query_rows]
    top = max(float(np.nanmax(mean)) for mean in means)
    drawn: Any = None
    grid = figure.subplots(1, panels, squeeze=False, sharey=True)
    for axes, rows, mean in zip(grid.flat, profile.query_rows, means, strict=True):
        drawn = axes.imshow(mean, cmap=COLOURS, vmin=0, vmax=top, aspect="auto", interpolation="nearest")
        axes.set(title=rows_name(rows), xlabel="query head")
        axes.locator_params(axis="x", integer=True)
    step = -(-len(profile.layers) // 16)  # 16 ticks at most
    ticks = range(0, len(profile.layers), step)
    grid[0, 0].set(ylabel="layer", yticks=ticks, yticklabels=[str(profile.layers[tick]) for tick in ticks])
    figure.colorbar(drawn, ax=grid).set_label("attention to vision tokens")
    return figure


def rows_name(rows: int | str) -> str:
    """Name a choice of query rows in a legend.

    Examples
    --------
    >>> rows_name(1), rows_name(8), rows_name("text")
    ('last token', 'last 8 tokens', 'text after the images')
    """
    if rows == "text":
        return "text after the images"
    return "last token" if rows == 1 else f"last {rows} tokens"
