# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's kvpress on the bundled model, beside its own DynamicCache: ``python benchmarks/kvpress_besides.py``.

kvpress 0.5.5 wants transformers below 5.3 and plphp at least 5.17, so it runs in an environment of its own, which has
this repository's ``src`` on PYTHONPATH for the model, the samples and the metrics (they need no newer transformers)::

    python -m venv KVPRESS && KVPRESS/bin/pip install kvpress==0.5.5 \
        scipy pillow rapidfuzz scikit-learn rich matplotlib
    PYTHONPATH=src KVPRESS/bin/python benchmarks/kvpress_besides.py

Figures are compared within this run alone, with DynamicCache of the same transformers. A prompt is read inside of the
press, the question too, as in kvpress's README, and the answer comes from ordinary ``generate``. In a dialogue the
first prompt is read inside of the press; as ``generate`` takes the length of what is left for that of the conversation,
the rest is read and answered with the positions named, as kvpress's own pipeline does it.

kvpress knows no vision tokens: text and vision are evicted alike, and its windows are of 64 tokens by default, here
most of the text of a prompt. AdaKV masks what it evicts, and frees no memory; "held" is what the tensors take, "seen"
what attention still sees of them.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import answers
import kvpress
import torch
from answers import Held, Question
from rich.console import Console
from rich.table import Table
from transformers.cache_utils import DynamicCache

from plphp.evaluation.running.conversation import end_tokens
from plphp.inputs.loading import load_model

BASELINE = "DynamicCache"
RATIOS = (0.5, 0.75, 0.9)
"""Fractions of the prompt that are evicted."""
PRESSES: dict[str, Callable[[float], Any]] = {
    "SnapKV": kvpress.SnapKVPress,
    "SnapKV, window 8": partial(kvpress.SnapKVPress, window_size=8),
    "AdaKV of SnapKV": lambda ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(ratio)),
    "AdaKV of SnapKV, window 8": lambda ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(ratio, window_size=8)),
}
"""By name, what makes a press of the fraction that it is to evict."""


@contextmanager
def opened(press: Any, model: Any) -> Iterator[None]:
    """The press on the model, or nothing at all."""
    if press is None:
        yield
        return
    with press(model):
        yield


def forget_masks(model: Any) -> None:
    """Take off what AdaKV left on the layers of the model."""
    for module in model.modules():
        if getattr(module, "masked_key_indices", None) is not None:
            module.masked_key_indices = None


def held_of(model: Any, cache: DynamicCache, question: Question) -> Held:
    """Bytes of the prompt that are held, and those that attention still sees."""
    held = sum(states.untyped_storage().nbytes() for layer in cache.layers for states in (layer.keys, layer.values))
    masked, entries = 0, 0
    for layer, own in zip(model.model.language_model.layers, cache.layers, strict=True):
        indices = getattr(layer.self_attn, "masked_key_indices", None)
        masked += 0 if indices is None else len(indices[0])
        entries += own.keys.shape[0] * own.keys.shape[1] * own.keys.shape[2]
    return Held(held, round(held * (1 - masked / entries)))


def answer_with(model: Any, ends: tuple[int, ...], press: Any, question: Question) -> tuple[list[int], Held]:
    """Answer a question with a new cache, of which a press evicts a part."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    forget_masks(model)
    held = partial(held_of, model, cache, question)
    with opened(press, model):
        if not question.history.shape[1]:
            return answers.generated(model, question, {"past_key_values": cache}, held)
        with torch.inference_mode():
            model(**question.prompt, past_key_values=cache, use_cache=True)
    seen = held()
    return _continued(model, cache, question, ends), seen


@torch.inference_mode()
def _continued(model: Any, cache: DynamicCache, question: Question, ends: tuple[int, ...]) -> list[int]:
    """Read the history of a dialogue behind a prompt, and answer greedily."""
    new, position = question.history, question.tokens
    answer: list[int] = []
    while len(answer) < question.limit and not (answer and answer[-1] in ends):
        positions = torch.arange(position, position + new.shape[1])[None]
        output = model(input_ids=new, past_key_values=cache, position_ids=positions, use_cache=True, logits_to_keep=1)
        position += new.shape[1]
        new = output.logits[:, -1].argmax(-1, keepdim=True)
        answer.append(int(new))
    return answer


def show(results: dict[str, Any], samples: int) -> None:
    """Print the table."""
    table = Table(title=f"kvpress on the bundled model, {samples} samples a task")
    for heading in answers.headings("seen"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for row in results["results"]:
        table.add_row(row["variant"], *answers.cells(row, "seen"))
    console = Console(width=120)
    console.print(table)
    for name, failure in results["failed"].items():
        console.print(f"{name} fails on {failure['prompts']} of {failure['of']} prompts: {failure['error']}")


def main() -> None:
    """Answer with every press, print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=20, help="of each task")
    parser.add_argument("--tasks", nargs="*", default=(), help="default: all that count in the mean")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()

    model, processor = load_model(None)
    ends = end_tokens(model, processor)
    makers: dict[str, Callable[[], Any]] = {BASELINE: lambda: None}
    for name, make in PRESSES.items():
        makers |= {f"{name}, {1 - ratio:.0%}": partial(make, ratio) for ratio in RATIOS}
    scores = answers.Scores(list(makers), "seen")
    for task, sample in answers.chosen_samples(args.samples, args.tasks):
        grade = partial(answers.graded, processor, task, sample, answers.questions(model, processor, sample))
        scores.add(
            task, {name: partial(grade, partial(answer_with, model, ends, make())) for name, make in makers.items()}
        )
    results = scores.results()
    show(results, args.samples)
    about = {
        "script": "benchmarks/kvpress_besides.py",
        "date": datetime.date.today().isoformat(),
        "settings": {"samples": args.samples, "tasks": list(args.tasks)},
        "hardware": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("kvpress", "torch", "transformers")},
    }
    if args.out is not None:
        args.out.write_text(json.dumps({**about, **results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
