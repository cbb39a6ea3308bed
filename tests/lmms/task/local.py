# SPDX-License-Identifier: Apache-2.0
"""How lmms-eval reads and scores the samples beside this file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image


def images(document: dict[str, Any]) -> list[Image.Image]:
    folder = Path(__file__).parent
    return [Image.open(folder / name).convert("RGB") for name in document["images"]]


def score(document: dict[str, Any], answers: list[str]) -> dict[str, float]:
    return {"exact": float(answers[0].split() == document["answer"].split())}


def round_text(
    document: dict[str, Any],
    lmms_eval_specific_kwargs: Any = None,
    previous_output: Any = None,
    round_idx: int | None = None,
    previous_round_info: Any = None,
) -> Any:
    """The question twice, the second time without images."""
    if round_idx is None:
        return document["question"]
    if round_idx == 2:
        return None, None, True, previous_output, None
    return None, f"You said: {previous_output[-1]} {document['question']}", False, previous_output, None


def score_rounds(document: dict[str, Any], answers: list[list[str]]) -> dict[str, float]:
    return {"rounds": float(len(answers[0]))}
