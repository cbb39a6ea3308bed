# SPDX-License-Identifier: Apache-2.0
"""Draw docs/images/kept.png, the picture of README: ``python docs/make_picture.py``.

One question about one example image, answered by the bundled model with the full cache, by the paper's method and by
the model's default. Needs matplotlib (``pip install '.[plots]'``).
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from plphp import PLPHPConfig
from plphp.inputs.loading import load_model
from plphp.inputs.media import load_image
from plphp.inputs.prompt import build_inputs
from plphp.pruning.report import PruneReport
from plphp.show.plots import new_figure
from plphp.show.tables import layer_rows
from plphp.studies.compare import Comparison, compare

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "examples" / "images"
PICTURE = ROOT / "docs" / "images" / "kept.png"
QUESTION = "Please list everything in row 4, from left to right."
"""One of examples/images/questions.json, which has its image and its answer."""
METHODS = ("plphp:target_retention=0.4", "query_bank:bank=bundled,retention_rate=0.4")
ROOM = 0.08
"""Paper between two tokens, as a fraction of a token's side: it shows the grid where all tokens are kept."""
PALEST = 0.06
"""Opacity of a token that no head of any layer keeps: so much that one sees what is gone."""
PIXELS = 448
MARKS = {True: ("✓", "#007a5e"), False: ("✗", "#b2182b")}
"""Mark and colour of a right and of a wrong answer; the mark is for those who cannot tell the colours apart."""


def kept_fraction(report: PruneReport) -> Any:
    """Fraction of all layers' KV heads that keep each token of the only image, [height, width]."""
    (image,) = report.prompts[0].images[0]
    heads = [positions for _, row in layer_rows(report) for positions in row.kept_positions]
    _, height, width = image.grid or (1, 1, len(image.positions))
    return np.mean([np.isin(image.positions, positions) for positions in heads], axis=0).reshape(height, width)


def faded(image: Image.Image, fraction: Any) -> Any:
    """The image in colour, each token as opaque as the share of heads that keep it; floats [pixels, pixels, rgb]."""
    colours = np.asarray(image.convert("RGB").resize((PIXELS, PIXELS)), dtype=float) / 255
    side = PIXELS // len(fraction)
    opacity = np.kron(PALEST + (1 - PALEST) * fraction, _window(side))[..., None]
    return 1 - opacity * (1 - colours)


def _window(side: int) -> Any:
    """A token's square with its margin left blank, [side, side]."""
    margin = max(1, round(ROOM * side / 2))
    square = np.zeros((side, side))
    square[margin:-margin, margin:-margin] = 1
    return square


def draw(image: Image.Image, comparisons: dict[str, Comparison], expected: str) -> Any:
    """The whole image and the unpruned answer, then those of each method; an expected answer is green."""
    whole = next(iter(comparisons.values())).unpruned.texts[0]
    panels = [("everything kept", np.asarray(image.resize((PIXELS, PIXELS))), whole)]
    for name, comparison in comparisons.items():
        title = f"{name}: {comparison.report.retention:.0%} of the vision KV"
        panels.append((title, faded(image, kept_fraction(comparison.report)), comparison.pruned.texts[0]))
    figure = new_figure(figsize=(9.6, 4.0), layout="constrained")
    figure.suptitle(f"“{QUESTION}”", fontsize=12)
    for axes, (title, pixels, answer) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        mark, colour = MARKS[answer == expected]
        axes.imshow(pixels)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel(f"{mark} {textwrap.fill(answer, 38)}", fontsize=10, color=colour)
        axes.set(xticks=[], yticks=[])
    return figure


def main() -> None:
    """Ask, draw and save."""
    model, processor = load_model()
    questions = json.loads((IMAGES / "questions.json").read_text(encoding="utf-8"))
    asked = next(question for question in questions if question["question"] == QUESTION)
    image = load_image(IMAGES / asked["images"][0])
    inputs = build_inputs(processor, QUESTION, images=[image])
    configs = {text.partition(":")[0]: PLPHPConfig.parse(text) for text in METHODS}
    comparisons = {name: compare(model, processor, inputs, config, rounds=1) for name, config in configs.items()}
    PICTURE.parent.mkdir(exist_ok=True)
    draw(image, comparisons, asked["answer"]).savefig(PICTURE, dpi=120)
    Image.open(PICTURE).convert("RGB").save(PICTURE, optimize=True)  # not fewer colours: the shades are the figures


if __name__ == "__main__":
    main()
