# SPDX-License-Identifier: Apache-2.0
"""The main job: answer questions about image files unpruned and pruned by several methods, side by side."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from plphp import PLPHPConfig
from plphp.evaluation import make_variants
from plphp.inputs.loading import load_model
from plphp.inputs.media import load_image
from plphp.inputs.prompt import build_inputs
from plphp.settings.presets import compared
from plphp.show.html_report import html_report
from plphp.show.tables import human_bytes, layer_table
from plphp.studies.compare import Comparison, Run, compare
from plphp.studies.provenance import provenance
from plphp.studies.question_runs import Question, Setting, answer_by_each

IMAGES = Path(__file__).parent / "images"
PAPER = "plphp:target_retention=0.4"
ANY = ("quantized:tiers=c3", PAPER)
"""What a model is shown with: `plphp generate`'s default, and the paper's method."""
BUNDLED = ("query_bank:bank=bundled,tiers=t10", PAPER)
"""The same for the bundled model, which has a query bank with codebooks."""


@dataclass(frozen=True)
class Answered:
    """A question with the comparisons of all methods, by the method's name."""

    question: dict
    comparisons: dict[str, Comparison]

    def runs(self) -> dict[str, Run]:
        """All ways to answer by name, the unpruned one first."""
        first = next(iter(self.comparisons.values()))
        return {"unpruned": first.unpruned, **{name: one.pruned for name, one in self.comparisons.items()}}

    def right(self, run: Run) -> str:
        """Whether an answer is the expected one."""
        return "yes" if run.texts[0] == self.question["answer"].strip() else "no"


def choose(questions: list[dict], per_kind: int) -> list[dict]:
    """Take the first few questions of each kind: one image, several images, an answer of several lines."""
    kinds = ("single", "several", "lines")
    return [one for kind in kinds for one in [q for q in questions if q["kind"] == kind][:per_kind]]


def milliseconds(run: Run) -> str:
    """Decode time per token."""
    return f"{1000 * (run.seconds_per_token or 0):.2f} ms"


def side_by_side(answered: Answered) -> Table:
    """One question: a column for each way to answer it."""
    runs = answered.runs()
    table = Table("", show_lines=True)
    for name in runs:
        table.add_column(name, overflow="fold", ratio=1)
    # Answers are the model's words: as Text, so that their brackets are not taken for markup.
    table.add_row("answer", *(Text(run.texts[0]) for run in runs.values()))
    table.add_row("right", *map(answered.right, runs.values()))
    table.add_row("KV cache", *(human_bytes(run.kv_bytes) for run in runs.values()))
    table.add_row("decode per token", *map(milliseconds, runs.values()))
    return table


def totals(results: list[Answered]) -> Table:
    """One line per question: right or wrong and KV bytes each way, then the number of right answers."""
    names = list(results[0].runs())
    table = Table(title="all questions", show_footer=True)
    table.add_column("kind", "right answers")
    table.add_column("images", justify="right")
    for name in names:
        right = sum(one.right(one.runs()[name]) == "yes" for one in results)
        table.add_column(f"{name}\nright", f"{right} of {len(results)}", justify="right")
    for name in names:
        table.add_column(f"{name}\nKV cache", justify="right")
    for one in results:
        runs = one.runs().values()
        sizes = (human_bytes(run.kv_bytes) for run in runs)
        table.add_row(one.question["kind"], str(len(one.question["images"])), *map(one.right, runs), *sizes)
    return table


def write_page(arguments: argparse.Namespace, questions: list[dict], model: Any, processor: Any) -> None:
    """Write a page to look at, with a question of each kind: the settings given, or those of `plphp report`."""
    given = [f"{text.partition(':')[0]}={text}" for text in arguments.config or ()]
    lines, retention = compared(bundled=arguments.model is None)
    variants = make_variants(given or lines, retention)
    settings = [Setting(variant.label, variant.retention, variant.config) for variant in variants]
    answered = []
    for one in {one["kind"]: one for one in reversed(questions)}.values():
        images = [load_image(arguments.images / name) for name in one["images"]]
        question = Question(one["question"], images, (one["answer"],))
        length = arguments.max_new_tokens
        answered.append(answer_by_each(model, processor, question, settings, max_new_tokens=length))
    arguments.html.write_text(html_report(answered, settings, provenance(model)), encoding="utf-8")


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="hub id or folder; default: the bundled model")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder with questions.json and its images")
    parser.add_argument("--config", action="append", help="settings, as for plphp generate; may be repeated")
    parser.add_argument("--per-kind", type=int, default=2, help="questions of each kind")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer")
    parser.add_argument("--html", type=Path, default=Path("demo.html"), help="page to write; default: demo.html")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each question, unpruned and pruned")
    arguments = parser.parse_args()

    started = time.perf_counter()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    texts = arguments.config or (BUNDLED if arguments.model is None else ANY)
    configs = {text.partition(":")[0]: PLPHPConfig.parse(text) for text in texts}
    questions = json.loads((arguments.images / "questions.json").read_text(encoding="utf-8"))
    model, processor = load_model(arguments.model)
    results = []
    for question in choose(questions, arguments.per_kind):
        images = [load_image(arguments.images / name) for name in question["images"]]
        inputs = build_inputs(processor, question["question"], images=images)
        generation = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False, "rounds": arguments.rounds}
        found = {name: compare(model, processor, inputs, config, **generation) for name, config in configs.items()}
        results.append(Answered(question, found))
        console.rule(f"{question['kind']}: {', '.join(question['images'])}")
        console.print(f"[bold]{escape(question['question'])}[/bold]\nexpected: {escape(question['answer'])}")
        console.print(side_by_side(results[-1]))
    console.rule("what the layers kept for the last question")
    console.print(*(layer_table(one.report) for one in results[-1].comparisons.values()), totals(results))
    console.print(f"{len(results)} questions in {time.perf_counter() - started:.0f} s")
    write_page(arguments, [one.question for one in results], model, processor)
    console.print(f"To look at, in a browser: {arguments.html.resolve()}", soft_wrap=True)


if __name__ == "__main__":
    main()
