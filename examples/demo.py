# SPDX-License-Identifier: Apache-2.0
"""The main job: answer questions about image files unpruned and pruned, side by side."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from plphp import PLPHPConfig
from plphp.compare import Comparison, compare
from plphp.loading import load_model
from plphp.media import load_image
from plphp.prompt import build_inputs
from plphp.tables import comparison_table, human_bytes, layer_table

IMAGES = Path(__file__).parent / "images"


def choose(questions: list[dict], per_kind: int) -> list[dict]:
    """Take the first few questions of each kind: one image, several images, an answer of several lines."""
    kinds = ("single", "several", "lines")
    return [one for kind in kinds for one in [q for q in questions if q["kind"] == kind][:per_kind]]


def totals(results: list[tuple[dict, Comparison]]) -> Table:
    """One line per question: right or wrong both ways, KV bytes and decode time per token before and after."""
    table = Table(title="all questions")
    for heading in ("kind", "images", "right", "pruned right", "KV before", "after", "ms/token before", "after"):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    for question, found in results:
        runs = (found.unpruned, found.pruned)
        right = ["yes" if run.texts[0] == question["answer"].strip() else "no" for run in runs]
        sizes = [human_bytes(run.kv_bytes) for run in runs]
        times = [f"{1000 * (run.seconds_per_token or 0):.2f}" for run in runs]
        table.add_row(question["kind"], str(len(question["images"])), *right, *sizes, *times)
    return table


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="hub id or folder; default: the bundled model")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder with questions.json and its images")
    parser.add_argument(
        "--config", default="plphp:target_retention=0.4,query_rows=text", help="settings, as for plphp generate"
    )
    parser.add_argument("--per-kind", type=int, default=2, help="questions of each kind")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each question, unpruned and pruned")
    arguments = parser.parse_args()

    started = time.perf_counter()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    config = PLPHPConfig.parse(arguments.config)
    questions = json.loads((arguments.images / "questions.json").read_text(encoding="utf-8"))
    model, processor = load_model(arguments.model)
    results = []
    for question in choose(questions, arguments.per_kind):
        images = [load_image(arguments.images / name) for name in question["images"]]
        inputs = build_inputs(processor, question["question"], images=images)
        generation = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False}
        found = compare(model, processor, inputs, config, rounds=arguments.rounds, **generation)
        results.append((question, found))
        console.rule(f"{question['kind']}: {', '.join(question['images'])}")
        console.print(f"[bold]{escape(question['question'])}[/bold]\nexpected: {escape(question['answer'])}")
        console.print(comparison_table(found))
    console.rule("what the layers kept for the last question")
    console.print(layer_table(results[-1][1].report), totals(results))
    console.print(f"{len(results)} questions in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
