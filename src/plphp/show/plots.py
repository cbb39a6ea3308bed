# SPDX-License-Identifier: Apache-2.0
"""Pictures of a report: where on the image the kept tokens stand, and how much each layer attends to it.

Needs matplotlib (``pip install plphp[plots]``). The figures are drawn without a display.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from plphp.errors import BackendUnavailableError, ConfigError
from plphp.pruning.prompt_report import ImageReport, RowReport
from plphp.pruning.report import PruneReport

from .left_tokens import add_legend, by_place, draw_left, left_shares
from .tables import layer_rows, select_prompt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = "viridis"
"""Where there is no image: safe for colour-blind eyes, and in order when printed in grey."""
VEIL = (38 / 255, 45 / 255, 64 / 255)
"""Dark slate, laid over what is dropped of an image in its own colours. Not black, which pictures have themselves."""
OPAQUE = 0.9
"""How much of a dropped token the veil covers: one still sees what is gone."""
CLASS_MARKERS = {
    "attentive": ("^", "#E69F00"),
    "balanced": ("o", "#56B4E9"),
    "indifferent": ("v", "#0072B2"),
    "uniform": ("s", "#56B4E9"),
    "exempt": ("D", "#999999"),
    "non-finite": ("x", "#d62728"),
}
"""Marker and colour (Okabe and Ito's palette) of each layer class."""
COLUMNS = 8
"""Tiles side by side, at most."""
THUMBNAIL = 256
"""Pixels of the longer side of an image as it is drawn under its tokens."""


class Scale(NamedTuple):
    """What the colours say: a name, and levels in [0, 1] by what is written at them."""

    name: str
    ticks: dict[str, float]


def plot_kept(
    report: PruneReport,
    images: Sequence[Image.Image] | None = None,
    *,
    layer: int | None = None,
    prompt: int = 0,
    row: int = 0,
    columns: int = COLUMNS,
) -> Figure:
    """Draw which vision tokens stayed: on each image in its colours, with what is dropped dark and few bits dimmed.

    Without images a heat map shows the same. Tokens that a layer never got have a colour by where they left: before the
    text model, or inside prefill.

    Parameters
    ----------
    report : PruneReport
        Report of a run.
    images : sequence of Image, optional
        The images of the row, in prompt order; they are stretched over the grid of their tokens.
    layer : int, optional
        Layer of which a tile per KV head is drawn. Default: a tile per layer, with the fraction of heads that keep
        each token, or with tiers their mean place between "dropped" and the rung of most bits.
    prompt, row : int
        Which prompt (turn) and which row of the batch.
    columns : int
        Tiles side by side, at most.

    Returns
    -------
    matplotlib.figure.Figure
        An image whose tokens form no grid (several tiles, newline tokens) is a strip by token index.

    Raises
    ------
    ConfigError
        If the report has no such prompt, row or layer, or the number of images differs.
    BackendUnavailableError
        If matplotlib is not installed.
    """
    selected = select_prompt(report, prompt, row)
    shown = selected.images[row]
    if not shown:
        raise ConfigError(f"Row {row} of the report has no images.")
    if images and len(images) != len(shown):
        raise ConfigError(f"The row has {len(shown)} image(s), but {len(images)} are given.")
    rows = dict(layer_rows(report, prompt, row))
    if layer is not None and layer not in rows:
        raise ConfigError(f"The report has the layers {', '.join(map(str, rows))}, not {layer}.")
    levels = _levels(rows.values())
    tiles = _layer_tiles(rows, levels) if layer is None else _head_tiles(rows[layer], levels)
    if any(own.tiers for own in rows.values()):
        scale = Scale("held in, mean over KV heads" if layer is None else f"held in, layer {layer}", levels)
    else:
        what = "fraction of KV heads keeping it" if layer is None else f"kept in layer {layer}"
        scale = Scale(what, {"0": 0.0, "0.5": 0.5, "1": 1.0})
    numbers = list(rows) if layer is None else [layer] * len(tiles)
    left = [[left_shares(image, selected.stages, row, number) for number in numbers] for image in shown]
    return _tile_figure(tiles, shown, images, scale, left, columns)


def plot_vision_attention(report: PruneReport, *, prompt: int = 0, row: int = 0) -> Figure:
    """Draw the vision attention score of each layer, with the layer's class and the thresholds of the config.

    Parameters
    ----------
    report : PruneReport
        Report of a run.
    prompt, row : int
        Which prompt (turn) and which row of the batch.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ConfigError
        If the report has no such prompt or row.
    BackendUnavailableError
        If matplotlib is not installed.
    """
    layers = layer_rows(report, prompt, row)
    figure = new_figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    numbers, scores = [number for number, _ in layers], [layer.vision_score for _, layer in layers]
    axes.plot(numbers, scores, color="#555555", linewidth=1, zorder=1)
    for name, (marker, colour) in CLASS_MARKERS.items():
        members = [(number, layer.vision_score) for number, layer in layers if layer.layer_class == name]
        if members:
            x, y = zip(*members, strict=True)
            axes.scatter(x, y, marker=marker, color=colour, s=50, label=name, zorder=2)
    by_threshold = any(layer.layer_class in ("attentive", "balanced", "indifferent") for _, layer in layers)
    # With a target retention, or a ladder, the classes come from the order of the layers, and the thresholds lie idle.
    if by_threshold and report.config.get("target_retention") is None and report.config.get("tiers") is None:
        for name, style in (("attentive_threshold", "--"), ("indifferent_threshold", ":")):
            label = f"{name.replace('_', ' ')} {report.config[name]:g}"
            axes.axhline(report.config[name], color="black", linestyle=style, linewidth=1, label=label)
    axes.set(xlabel="layer", ylabel="vision attention score", ylim=(0, None))
    axes.locator_params(axis="x", integer=True)
    axes.legend(fontsize="small")
    return figure


def new_figure(**options: Any) -> Figure:
    """Make a figure that is drawn without a display.

    Raises
    ------
    BackendUnavailableError
        If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendUnavailableError("Plots need matplotlib: pip install 'plphp[plots]'.") from error
    figure = Figure(**options)
    FigureCanvasAgg(figure)
    return figure


Head = list[tuple[float, list[int]]]
"""Levels in [0, 1], with the positions that a head holds in each."""
Tile = tuple[str, list[Head]]
"""Title, and the heads that the tile stands for."""
DROPPED, WHOLE = "dropped", "whole"


def _levels(rows: Iterable[RowReport]) -> dict[str, float]:
    """A level in [0, 1] for each way to hold a vision token in these layers, evenly spaced by the order of bytes.

    The highest is that of a token held whole, though there be none: what is in few bits is dimmed in every picture.
    """
    nbytes: dict[str, float] = {}
    for row in rows:
        for tier in row.tiers:
            nbytes[tier.rung] = max(nbytes.get(tier.rung, 0.0), sum(tier.nbytes) / max(1, sum(tier.entries)))
    ways = [DROPPED, *sorted(nbytes, key=nbytes.__getitem__), WHOLE]
    return {name: number / (len(ways) - 1) for number, name in enumerate(ways)}


def _layer_tiles(rows: dict[int, RowReport], levels: dict[str, float]) -> list[Tile]:
    return [(f"layer {number}\n{_rate(row)}", _heads(row, levels)) for number, row in rows.items()]


def _heads(row: RowReport, levels: dict[str, float]) -> list[Head]:
    """The heads of a layer. What is in a rung is drawn over what is held at all, which is whole elsewhere."""
    return [
        [(levels.get(WHOLE, 1.0), kept), *((levels[tier.rung], tier.positions[head]) for tier in row.tiers)]
        for head, kept in enumerate(row.kept_positions)
    ]


def _rate(row: RowReport) -> str:
    """Class and rate of a layer, with the share of the vision entries where text left, too, and of their bytes."""
    vision = f", {row.vision_kept:.2f} of vision" if any(row.evicted_text) else ""
    held = f"\n{row.vision_held:.1%} of the bytes" if row.tiers else ""
    return f"{row.layer_class} {row.rate:.2f}{vision}{held}"


def _head_tiles(row: RowReport, levels: dict[str, float]) -> list[Tile]:
    return [(f"head {number}", [head]) for number, head in enumerate(_heads(row, levels))]


def _tile_figure(
    tiles: list[Tile],
    shown: list[ImageReport],
    images: Sequence[Image.Image] | None,
    scale: Scale,
    left: list[list[dict[str, Any]]],
    most: int,
) -> Figure:
    """Draw the tiles of each image; ``left`` has for each image and tile the tokens that never came to it, by stage."""
    columns = min(most, len(tiles))
    lines = math.ceil(len(tiles) / columns)
    figure = new_figure(figsize=(1.5 * max(columns, 4) + 1, (1.9 * lines + 0.6) * len(shown)), layout="constrained")
    parts: Any = figure.subfigures(len(shown), 1, squeeze=False)
    for number, (part, image) in enumerate(zip(parts[:, 0], shown, strict=True)):
        part.suptitle(_image_title(number, len(shown), image), fontsize="medium")
        grid = part.subplots(lines, columns, squeeze=False)
        drawn = None
        picture = _thumbnail(images[number]) if images else None
        for axes, (title, kept), gone in zip(grid.flat, tiles, left[number], strict=False):
            drawn = _draw(axes, _mean_level(image, kept), picture if image.grid else None)
            draw_left(axes, gone)
            axes.set_title(title, fontsize="x-small")
        add_legend(part, list(dict.fromkeys(name for gone in left[number] for name in gone)))
        for axes in grid.flat:
            axes.set_axis_off()
        bar = part.colorbar(drawn, ax=grid, shrink=0.8, ticks=list(scale.ticks.values()))
        bar.ax.set_yticklabels(list(scale.ticks))
        bar.set_label(scale.name, fontsize="x-small")
        bar.ax.tick_params(labelsize="x-small")
    return figure


def _image_title(number: int, images: int, image: ImageReport) -> str:
    name = f"image {number + 1} of {images}" if images > 1 else "image"
    if image.grid is None:
        return f"{name}: {len(image.positions)} tokens without a grid, by token index"
    frames, height, width = image.grid
    return f"{name}: {height} x {width} tokens" + (f", mean over {frames} frames" if frames > 1 else "")


def _mean_level(image: ImageReport, heads: list[Head]) -> Any:
    """Mean over heads of the level in which each holds a token, [height, width]; without a grid [1, tokens]."""
    levels = np.zeros((len(heads), len(image.positions)))
    for own, head in zip(levels, heads, strict=True):
        for level, positions in head:
            own[np.isin(image.positions, positions)] = level
    return by_place(image, levels.mean(axis=0))


def _thumbnail(image: Image.Image) -> Any:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return np.asarray(small)


def _draw(axes: Any, levels: Any, picture: Any) -> Any:
    height, width = levels.shape
    extent = (0, width, height, 0)
    if picture is not None:
        axes.imshow(picture, extent=extent, aspect="equal")
    return axes.imshow(
        levels,
        extent=extent,
        cmap=COLOURS if picture is None else _veil(),
        vmin=0,
        vmax=1,
        interpolation="nearest",
        aspect="auto" if height == 1 else "equal",
    )


def _veil() -> Any:
    """Colours from all but opaque, for what is dropped, to clear, for what is held whole."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("veil", [(*VEIL, OPAQUE), (*VEIL, 0.0)])
