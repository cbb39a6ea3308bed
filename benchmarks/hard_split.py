# SPDX-License-Identifier: Apache-2.0
"""Scores on the samples that VTC-Bench calls difficult (arXiv:2510.07143), from lmms-eval's files of samples.

Simple are those that the model still answers right from smaller images, which say nothing about a method that prunes;
difficult are those that it answers right from the images as they are, and wrong from smaller ones. Of the runs::

    python benchmarks/hard_split.py --metric relaxed_overall full.jsonl smaller.jsonl pruned.jsonl [more.jsonl ...]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

RIGHT = 0.5
"""Score from which an answer counts as right, as in VTC-Bench."""


def scores(file: Path, metric: str) -> dict[int, float]:
    """The score of every sample that a run has written with ``--log_samples``, by the number of its document."""
    result = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        sample: dict[str, Any] = json.loads(line)
        if metric not in sample:
            sys.exit(f"{file} has no metric {metric!r}; it has {', '.join(sample)}.")
        value = sample[metric]
        result[sample["doc_id"]] = float(value["score"] if isinstance(value, dict) else value)
    return result


def split(full: dict[int, float], smaller: dict[int, float]) -> tuple[list[int], list[int]]:
    """The difficult samples and the simple ones, of those that are right with the whole images."""
    right = [number for number, score in full.items() if score >= RIGHT and number in smaller]
    difficult = [number for number in right if smaller[number] < RIGHT]
    return difficult, [number for number in right if smaller[number] >= RIGHT]


def share_right(run: dict[int, float], numbers: list[int]) -> str:
    """How many of some samples a run has right, in per cent."""
    return f"{100 * sum(run[number] >= RIGHT for number in numbers) / len(numbers):.1f}" if numbers else "-"


def main() -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--metric", required=True, help="the metric of the task, such as relaxed_overall for chartqa")
    parser.add_argument("full", type=Path, help="samples of the run with the full cache")
    parser.add_argument("smaller", type=Path, help="samples of the run with smaller images")
    parser.add_argument("pruned", type=Path, nargs="+", help="samples of pruned runs")
    arguments = parser.parse_args()
    full, smaller = (scores(file, arguments.metric) for file in (arguments.full, arguments.smaller))
    difficult, simple = split(full, smaller)
    print(f"{len(difficult)} difficult and {len(simple)} simple samples of {len(full)}")
    for file in arguments.pruned:
        run = scores(file, arguments.metric)
        missing = {*difficult, *simple} - run.keys()
        if missing:
            sys.exit(f"{file} lacks {len(missing)} of the samples of {arguments.full}: run it with the same --limit.")
        print(f"{file}: difficult {share_right(run, difficult)} %, simple {share_right(run, simple)} %")


if __name__ == "__main__":
    main()
