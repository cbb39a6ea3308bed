# SPDX-License-Identifier: Apache-2.0
"""Score against the bytes held, per group of tasks: a line for each method, with its interval as a band.

Needs matplotlib (``pip install plphp[plots]``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plphp.errors import ConfigError, did_you_mean
from plphp.evaluation.settings import FULL
from plphp.show.plots import new_figure
from plphp.show.profile_plots import LINES, MARKERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLES = ("-", "--", ":", "-.")


def plot_scores(metrics: Mapping[str, Any], group: str) -> Figure:
    """Draw the score of each method against the bytes that it holds of the vision KV.

    Parameters
    ----------
    metrics : mapping
        What `plphp.evaluation.evaluate` returned.
    group : str
        Name of a group of tasks.

    Returns
    -------
    matplotlib.figure.Figure
        A method at a single retention is a point with an error bar; the full cache is a horizontal line.

    Raises
    ------
    ConfigError
        If there is no such group, or it has no scores.
    BackendUnavailableError
        If matplotlib is not installed.
    """
    if group not in metrics["groups"]:
        raise ConfigError(f"There is no group {group!r}.{did_you_mean(group, metrics['groups'])}")
    figures = metrics["groups"][group]["variants"]
    if not _has_scores(figures):
        raise ConfigError(f"The group {group!r} has no scores to draw: it was compared without labels.")
    figure = new_figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for variant in metrics["variants"]:
        lines.setdefault(variant["label"], []).append(figures[variant["name"]])
    for number, (label, line) in enumerate(lines.items()):
        if label == FULL:
            axes.axhline(100 * line[0]["score"]["mean"], color="#888888", linewidth=1, label="full KV")
        else:
            _draw(axes, line, label, *_look(number))
    axes.set(xlabel="bytes held of the vision KV, measured (%)", ylabel="score (%)", title=group.replace("_", " "))
    axes.set_xlim(-2, 102)
    axes.grid(alpha=0.3, linewidth=0.5)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def save_score_plots(metrics: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write ``score-<group>.png`` for each group that has scores; return the files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for group, values in metrics["groups"].items():
        if _has_scores(values["variants"]):
            files.append(folder / f"score-{group}.png")
            plot_scores(metrics, group).savefig(files[-1], dpi=150)
    return files


def _has_scores(figures: Mapping[str, Mapping[str, Any]]) -> bool:
    return all("score" in values for values in figures.values())


def _look(number: int) -> tuple[str, str, str]:
    """Colour, style and marker of a line; where the colours are used up, they return in another style."""
    turn = number // len(LINES)
    return LINES[number % len(LINES)], STYLES[turn % len(STYLES)], MARKERS[(number + turn) % len(MARKERS)]


def _draw(axes: Any, line: list[Mapping[str, Any]], label: str, colour: str, style: str, marker: str) -> None:
    points = sorted(line, key=lambda point: point["kept"])
    kept = [100 * point["kept"] for point in points]
    mean, low, high = ([100 * point["score"][bound] for point in points] for bound in ("mean", "low", "high"))
    if len(points) == 1:
        error = [[mean[0] - low[0]], [high[0] - mean[0]]]
        axes.errorbar(kept, mean, yerr=error, fmt=marker, color=colour, label=label, capsize=3)
        return
    axes.plot(kept, mean, color=colour, linestyle=style, marker=marker, markersize=4, linewidth=1.4, label=label)
    axes.fill_between(kept, low, high, color=colour, alpha=0.15, linewidth=0)
