# SPDX-License-Identifier: Apache-2.0
"""Transformers' own quantized caches beside ours, in one run: ``python benchmarks/quantized_caches.py``.

Needs `pip install optimum-quanto hqq`, or both in a folder of their own, without what they ask for beside torch, that
is on PYTHONPATH::

    pip install --no-deps --target FOLDER optimum-quanto==0.2.7 hqq==0.2.8 ninja termcolor einops

- Score: the bundled model answers samples of the test split with ordinary ``generate``, one prompt at a time.
- Held: bytes of the live tensors of a cache right after the prompt, codes, scales and zero points of quanto and hqq
  among them, over those of DynamicCache. Transformers' caches code text like vision; the share of vision is in
  proportion. Codebooks belong to a model, and do not count.
- A step: of a model of random weights in a public shape, with caches that are filled with random entries; steps of
  all caches take turns, and figures are medians. Transformers' caches code everything anew whenever ``residual_length``
  further tokens have come (by default 128), which the median step does not show; with 0 every step does.

What does not run is in the results with its error.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import answers
import decode
import measuring
import torch
from answers import Held, Question
from measuring import BASELINE
from rich.console import Console
from shapes import TEXT_TOKENS, build_model, twin
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache

import plphp
from plphp.engines.hf.attachment import Lease
from plphp.engines.hf.cache_argument import passed
from plphp.inputs.loading import load_model
from plphp.settings.config import PLPHPConfig
from plphp.studies.compare import kv_bytes

THEIRS: dict[str, dict[str, Any]] = {
    "quanto, 4 bits": {"backend": "quanto", "nbits": 4},
    "quanto, 2 bits": {"backend": "quanto", "nbits": 2},
    "hqq, 4 bits": {"backend": "hqq", "nbits": 4},
    "hqq, 2 bits": {"backend": "hqq", "nbits": 2},
    "hqq, 4 bits, axis 1": {"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1},
    "hqq, 2 bits, axis 1": {"backend": "hqq", "nbits": 2, "axis_key": 1, "axis_value": 1},
    "quanto, 4 bits, residual 0": {"backend": "quanto", "nbits": 4, "residual_length": 0},
    "quanto, 2 bits, residual 0": {"backend": "quanto", "nbits": 2, "residual_length": 0},
}
"""Transformers' caches, with its defaults where nothing is said: groups of 64, axis 0, a residual of 128 tokens. Its
documentation advises axis 1 for hqq."""
OURS = {
    "t10": PLPHPConfig(method="query_bank", options={"bank": "bundled"}, tiers="t10"),
    "c3": PLPHPConfig(method="quantized", tiers="c3"),
    "kivi2": PLPHPConfig(method="quantized", tiers="kivi2"),
}
"""Ours."""


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The plain tensors in something that a cache holds: nested in containers, and inside of tensors of a subclass."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from tensors_of(getattr(value, name))
        else:
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_of(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_of(part)


def live_bytes(cache: Cache) -> int:
    """Bytes of all that is alive in the layers of a cache; memory that two tensors share counts once."""
    if isinstance(cache, (plphp.PrunedCache, DynamicCache)):
        return kv_bytes(cache)
    memories = {}
    for layer in cache.layers:
        for tensor in tensors_of(vars(layer)):
            storage = tensor.untyped_storage()
            memories[storage.data_ptr()] = storage.nbytes()
    return sum(memories.values())


def held_of(cache: Cache, question: Question) -> Held:
    """What a cache holds of a prompt, and of its vision tokens: in proportion where it knows no difference."""
    whole = live_bytes(cache)
    if isinstance(cache, plphp.PrunedCache):
        text = question.tokens - question.vision
        return Held(whole, whole - sum(layer.entry_nbytes * text for layer in cache.layers))
    return Held(whole, round(whole * question.vision / question.tokens))


def answer_with(
    model: Any, make_cache: Callable[[dict[str, Any]], Cache], question: Question
) -> tuple[list[int], Held]:
    """Answer a question with a new cache."""
    cache = make_cache(question.prompt)
    return answers.generated(model, question, passed(cache), partial(held_of, cache, question))


def makers(model: Any) -> dict[str, Callable[[dict[str, Any]], Cache]]:
    """What makes an empty cache for a prompt, by the name of the variant."""
    text = model.config.get_text_config(decoder=True)
    made: dict[str, Callable[[dict[str, Any]], Cache]] = {BASELINE: lambda prompt: DynamicCache(config=text)}
    for name, settings in THEIRS.items():
        made[name] = lambda prompt, settings=settings: QuantizedCache(config=text, **settings)
    for name, config in OURS.items():
        made[name] = lambda prompt, config=config: plphp.PrunedCache.for_inputs(model, prompt, config)
    return made


def quality(count: int, tasks: Sequence[str]) -> dict[str, Any]:
    """Scores and bytes of every cache on the bundled model."""
    model, processor = load_model(None)
    made = makers(model)
    scores = answers.Scores(list(made), "vision")
    for task, sample in answers.chosen_samples(count, tasks):
        grade = partial(answers.graded, processor, task, sample, answers.questions(model, processor, sample))
        scores.add(task, {name: partial(grade, partial(answer_with, model, make)) for name, make in made.items()})
    about = {"model": "bundled", "dtype": str(model.dtype).removeprefix("torch."), "split": "test"}
    return {**about, "samples_a_task": count, **scores.results()}


def their_cache(model: Any, settings: dict[str, Any], batch: int, vision: int) -> Cache:
    """Transformers' quantized cache with random entries."""
    cache = QuantizedCache(config=model.config.get_text_config(), **settings)
    for number in range(len(cache.layers)):
        cache.update(*decode.entries(model, batch, vision + TEXT_TOKENS, number), number)
    return cache


def speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of a decoding step with every cache."""
    stock = build_model(args.shape, getattr(torch, args.dtype), torch.device(args.device))
    ours = twin(stock)
    lease = Lease.of(ours)
    rows = []
    for batch in args.batch:
        made: dict[str, tuple[Any, Callable[[], Cache]]] = {}
        made[BASELINE] = stock, partial(decode.dynamic_cache, stock, batch, args.vision_tokens)
        for name, settings in THEIRS.items():
            made[name] = stock, partial(their_cache, stock, settings, batch, args.vision_tokens)
        for name in OURS:
            tiers = decode.Tiers.parse(name)
            made[name] = ours, partial(decode.tiered_cache, lease, batch, args.vision_tokens, tiers)
        rows += _timed(made, batch, args)
        gc.collect()
    lease.end()
    return rows


def _timed(
    made: dict[str, tuple[Any, Callable[[], Cache]]], batch: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    caches: dict[str, Cache] = {}
    steps: dict[str, Callable[[], Any]] = {}
    failed: dict[str, str] = {}
    for name, (model, make_cache) in made.items():
        try:
            cache = make_cache()
            step = decode.stepper(model, cache, batch)
            step()
        except Exception as error:  # whatever a library raises here belongs into the results
            failed[name] = answers.told(error)
        else:
            caches[name], steps[name] = cache, step
    times = measuring.interleaved(steps, torch.device(args.device), args.steps)
    point = {"batch": batch, "vision_tokens": args.vision_tokens}
    return [
        {**point, "variant": name, "seconds": times[name], "bytes": live_bytes(caches[name])}
        if name in times
        else {**point, "variant": name, "failed": failed[name]}
        for name in made
    ]


def show(results: dict[str, Any], rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print the tables."""
    console = Console(width=120)
    if results:
        title = f"Bundled model, {results['samples_a_task']} samples a task"
        table = measuring.table(title, answers.headings("vision"))
        for row in results["results"]:
            table.add_row(row["variant"], *answers.cells(row, "vision"))
        console.print(table)
        for name, failure in results["failed"].items():
            console.print(f"{name} fails on {failure['prompts']} of {failure['of']} prompts: {failure['error']}")
    if rows:
        title = f"A decoding step, {args.shape} shape, {args.dtype}, {args.device}; median of {args.steps}"
        table = measuring.table(title, ("variant", "batch", "vision", "ms", "x DynamicCache", "held %"))
        for row in rows:
            [base] = [own for own in rows if own["variant"] == BASELINE and own["batch"] == row["batch"]]
            figures = ("failed", "", "")
            if "seconds" in row:
                figures = (
                    f"{1000 * row['seconds']:.1f}",
                    f"{base['seconds'] / row['seconds']:.2f}",
                    f"{100 * row['bytes'] / base['bytes']:.1f}",
                )
            table.add_row(row["variant"], str(row["batch"]), str(row["vision_tokens"]), *figures)
        console.print(table)


def main() -> None:
    """Answer and measure, print two tables."""
    parser = measuring.arguments(__doc__)
    parser.add_argument("--samples", type=int, default=20, help="of each task; 0 for no scores")
    parser.add_argument("--tasks", nargs="*", default=(), help="default: all that count in the mean")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8], help="of the timed steps; none for no times")
    parser.add_argument("--vision-tokens", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    about = measuring.origin("quantized_caches", args)
    for package in ("optimum-quanto", "hqq"):
        try:
            about["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            about["versions"][package] = None
    results = quality(args.samples, args.tasks) if args.samples else {}
    rows = speed(args)
    show(results, rows, args)
    measuring.write(args.out, {**about, "quality": results, "speed": rows})


if __name__ == "__main__":
    main()
