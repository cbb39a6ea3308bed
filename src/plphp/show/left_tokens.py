# SPDX-License-Identifier: Apache-2.0
"""Marks on a picture of kept tokens: those that a layer never got, as they had left before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from plphp.pruning.prompt_report import ImageReport
from plphp.pruning.stage_report import StageReport

COLOURS = {"encoder": "#DCDCDC", "prefill": "#E7A6C4"}
"""By the stage at which a token left; both lighter than the colour of a token that is dropped from the cache."""
NAMES = {"encoder": "left before the text model", "prefill": "left inside prefill"}


def left_shares(image: ImageReport, stages: Sequence[StageReport], row: int, layer: int) -> dict[str, Any]:
    """By stage, where a layer does not get tokens of an image.

    Parameters
    ----------
    image : ImageReport
        The image.
    stages : sequence of StageReport
        Those of its prompt, in the order of the layers.
    row : int
        Row of the batch.
    layer : int
        Decoder layer.

    Returns
    -------
    dict of str to ndarray
        float [height, width], the share of the frames in which the token had left at that stage; without a grid
        [1, tokens]. Stages at which nothing of the image left are missing.
    """
    there = np.ones(len(image.positions), dtype=bool)
    left: dict[str, Any] = {}
    for stage in (stage for stage in stages if stage.layer <= layer):
        stays = np.isin(image.positions, stage.positions[row])
        left[stage.stage] = left.get(stage.stage, False) | (there & ~stays)
        there &= stays
    return {name: by_place(image, marks.astype(float)) for name, marks in left.items() if marks.any()}


def by_place(image: ImageReport, values: Any) -> Any:
    """Values of the tokens of an image where they stand, [height, width], the mean over frames; else [1, tokens]."""
    return values[None] if image.grid is None else values.reshape(image.grid).mean(axis=0)


def draw_left(axes: Any, left: dict[str, Any]) -> None:
    """Lay the colours of stages over what is drawn, as opaque as the share of the frames that they are of."""
    from matplotlib.colors import to_rgb

    for name, share in left.items():
        height, width = share.shape
        colour = np.broadcast_to(to_rgb(COLOURS[name]), (height, width, 3))
        aspect = "auto" if height == 1 else "equal"
        drawn = np.concatenate([colour, share[..., None]], axis=-1)
        axes.imshow(drawn, extent=(0, width, height, 0), interpolation="nearest", aspect=aspect)


def add_legend(part: Any, stages: Sequence[str]) -> None:
    """Name the colours of the stages under a figure."""
    from matplotlib.patches import Patch

    if stages:
        patches = [Patch(facecolor=COLOURS[name], edgecolor="#555555", label=NAMES[name]) for name in stages]
        part.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize="x-small")
