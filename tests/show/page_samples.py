# SPDX-License-Identifier: Apache-2.0
"""Answered questions of made-up reports, for the tests of the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from plphp import PLPHPConfig, PruneReport
from plphp.pruning.prompt_report import ImageReport, LayerReport, PromptReport, RowReport
from plphp.pruning.tier_report import TierReport
from plphp.studies.question_runs import FULL, Answer, AnsweredQuestion, Question, Setting

ORIGIN = {"model": "tiny", "dtype": "float32", "hardware": "CPU", "plphp": "0.1", "date": "2026-01-01"}
HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\"> @SCRIPT@"
"""A text that would do harm if any of it were taken for markup or code."""
SETTINGS = [
    FULL,
    Setting("t10", None, PLPHPConfig(method="quantized", tiers="c3")),
    *(Setting("plphp", rate, PLPHPConfig(target_retention=rate)) for rate in (0.5, 0.25)),
    Setting("random", 0.5, PLPHPConfig(method="random")),
]
NAMES = [setting.name for setting in SETTINGS]


def images(grids: Sequence[tuple[int, int, int] | None]) -> list[ImageReport]:
    """Images one after another, behind five text tokens each; without a grid of six tokens."""
    made, start = [], 0
    for grid in grids:
        start += 5
        tokens = 6 if grid is None else int(np.prod(grid))
        made.append(ImageReport(list(range(start, start + tokens)), grid))
        start += tokens
    return made


def report(
    shown: list[ImageReport],
    retention: float,
    *,
    layers: int = 3,
    heads: int = 2,
    rungs: Sequence[str] = (),
    seed: int = 0,
    **changes: Any,
) -> PruneReport:
    """A report of kept tokens that are drawn by chance, shared out to the rungs and to what is held whole."""
    random = np.random.default_rng(seed)
    positions = [position for image in shown for position in image.positions]
    made = []
    for layer in range(layers):
        kept, tiers = [], {name: [] for name in rungs}
        for _ in range(heads):
            own = random.choice(positions, size=round(retention * len(positions)), replace=False)
            kept.append(sorted(map(int, own)))
            for number, name in enumerate(rungs):
                tiers[name].append(sorted(map(int, own[number :: len(rungs) + 1])))
        coded = [
            TierReport(name, own, [(number + 2) * len(head) for head in own])
            for number, (name, own) in enumerate(tiers.items())
        ]
        row = RowReport(0.1 * layer, "balanced", retention, len(positions), kept, entry_bytes=16, tiers=coded)
        made.append(LayerReport(layer, [row]))
    values: dict[str, Any] = {"kv_bytes_full": 1000, "kv_bytes": round(1000 * retention), "reserved_bytes": 0}
    values |= {"batch": 1, "tokens": len(positions) + 9, "pruning_seconds": 0.0}
    prompt = PromptReport(0, len(positions) + 9, [shown], made, **changes)
    return PruneReport("llava", "Llava", {}, prompts=[prompt], **values)


def picture(seed: int = 0, side: int = 64) -> Image.Image:
    """A picture of noise, which no format makes small."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def answered(
    text: str = "What is there?",
    *,
    references: tuple[str, ...] = ("a red heart",),
    grids: Sequence[tuple[int, int, int] | None] = ((1, 4, 5),),
    answers: Sequence[str] = ("a red heart", "a red heart", "a red star", "a  red\nheart"),
) -> AnsweredQuestion:
    """A question with an answer for each of `SETTINGS`; the last of them refuses."""
    shown = images(grids)
    reports = [report(shown, 1.0), report(shown, 0.8, rungs=("pq", "c3"), seed=1)]
    reports += [report(shown, rate, seed=2) for rate in (0.5, 0.25)]
    made = [Answer(text, report) for text, report in zip(answers, reports, strict=True)]
    pictures = [picture(seed) for seed in range(len(grids))]
    return AnsweredQuestion(
        Question(text, pictures, references), [*made, Answer("", None, "random cannot <b>do</b> it")]
    )
