# SPDX-License-Identifier: Apache-2.0
"""Pictures mark the tokens that a layer never got, by the stage at which they left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from plphp import PLPHPConfig, PruneReport
from plphp.pruning.prompt_report import ImageReport, LayerReport, PromptReport, RowReport
from plphp.pruning.stage_report import StageReport
from plphp.show.left_tokens import COLOURS, NAMES, left_shares
from plphp.show.plots import plot_kept

IMAGE = ImageReport(list(range(1, 7)), (1, 2, 3))
STRIP = ImageReport([9, 10, 11], None)
STAGES = [
    StageReport("encoder", "divprune", 0, [9], [[1, 3, 5, 9, 10]]),
    StageReport("prefill", "fastv", 1, [5], [[1, 9]]),
    StageReport("prefill", "fastv", 2, [2], [[1]]),
]


def marked(image: ImageReport, layer: int) -> dict[str, Any]:
    return {name: share.tolist() for name, share in left_shares(image, STAGES, 0, layer).items()}


def report(stages: list[StageReport]) -> PruneReport:
    layers = [LayerReport(layer, [RowReport(0.3, "uniform", 0.4, 9, [[1], [1]])]) for layer in (0, 2)]
    prompt = PromptReport(0, 12, [[IMAGE, STRIP]], layers, stages=stages)
    bytes_ = {"tokens": 12, "kv_bytes_full": 20, "kv_bytes": 10, "reserved_bytes": 0, "pruning_seconds": 0.0}
    return PruneReport("llava", "Llava", PLPHPConfig().to_dict(), 1, **bytes_, prompts=[prompt])


def legends(figure: Any) -> list[list[str]]:
    return [[text.get_text() for legend in part.legends for text in legend.get_texts()] for part in figure.subfigs]


def test_a_token_is_marked_by_the_stage_at_which_it_left() -> None:
    before = [[0, 1, 0], [1, 0, 1]]
    assert marked(IMAGE, 0) == {"encoder": before}
    assert marked(IMAGE, 1) == {"encoder": before, "prefill": [[0, 0, 1], [0, 1, 0]]}
    assert marked(IMAGE, 2) == marked(IMAGE, 1)
    assert marked(STRIP, 1) == {"encoder": [[0, 0, 1]], "prefill": [[0, 1, 0]]}
    assert marked(STRIP, 2) == {"encoder": [[0, 0, 1]], "prefill": [[1, 1, 0]]}


def test_frames_of_a_video_are_averaged() -> None:
    video = ImageReport(list(range(1, 7)), (2, 1, 3))
    assert marked(video, 0) == {"encoder": [[0.5, 0.5, 0.5]]}


@pytest.mark.parametrize("layer", [None, 2], ids=["layers", "heads"])
def test_the_picture(layer: int | None) -> None:
    figure = plot_kept(report(STAGES), layer=layer)
    first, second = (axes for axes in figure.subfigs[0].axes[:2])
    [_, *of_first], [_, *of_second] = first.images, second.images
    assert len(of_first) == (1 if layer is None else 2)
    assert len(of_second) == 2
    drawn = np.asarray(of_second[1].get_array())
    assert drawn[..., 3].tolist() == [[0, 0, 1], [0, 1, 0]]
    assert drawn[0, 2, :3].tolist() == pytest.approx(to_rgb(COLOURS["prefill"]))
    assert legends(figure) == 2 * [[NAMES["encoder"], NAMES["prefill"]]]


def test_nothing_is_marked_where_nothing_left() -> None:
    figure = plot_kept(report([]))
    assert legends(figure) == [[], []]
    assert {len(axes.images) for part in figure.subfigs for axes in part.axes[:2]} == {1}
