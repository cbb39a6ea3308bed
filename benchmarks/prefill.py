# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of prefill, and what pruning adds to it: ``python benchmarks/prefill.py``.

The text model reads random embeddings, as they come from the vision tower and the projector; the tower itself, whose
cost pruning does not change, is left out. Every layer keeps the same share. Ladders with codebooks are filled by
`query_bank`, with a bank of random queries and random codebooks; the others take everything. Variants are interleaved;
figures are medians. Pruning as a whole, and scoring and compaction in it, are timed in runs of their own, as waiting
for the device after each of them slows a run down; the rest of it is ranking, allocation and the account for the
report.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import codes
import measuring
import torch
from measuring import BASELINE
from rich.console import Console
from shapes import TEXT_TOKENS, build_model
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers.cache_utils import Cache, DynamicCache

import plphp
from plphp.engines.hf.cache_argument import passed
from plphp.kernels.rungs import RUNGS
from plphp.pruning.entries import LayerEntries
from plphp.pruning.scoring import Scoring
from plphp.settings.ladder import Ladder
from plphp.show.tables import human_bytes
from plphp.studies.compare import kv_bytes

PARTS = {
    "pruning": (plphp.PrunedCache, "after_attention"),
    "scoring": (Scoring, "score"),
    "compaction": (LayerEntries, "compact"),
}
"""Pruning and steps of it, with the method that does each once a layer."""


def make_inputs(model: LlavaForConditionalGeneration, batch: int, vision: int) -> tuple[dict[str, Tensor], Tensor]:
    """Embeddings [batch, tokens, hidden] and which of the tokens are vision tokens, bool [batch, tokens]."""
    length = vision + TEXT_TOKENS
    hidden = model.config.get_text_config().hidden_size
    embeddings = torch.randn(batch, length, hidden, device=model.device).to(model.dtype)
    is_vision = torch.zeros(batch, length, dtype=torch.bool)
    is_vision[:, TEXT_TOKENS // 2 :][:, :vision] = True
    mask = torch.ones(batch, length, dtype=torch.long, device=model.device)
    return {"inputs_embeds": embeddings, "attention_mask": mask}, is_vision


def variants(
    model: LlavaForConditionalGeneration,
    inputs: dict[str, Tensor],
    is_vision: Tensor,
    retention: Sequence[float],
    ladders: Sequence[str] = (),
    bank: str = "",
) -> dict[str, Callable[[], Cache]]:
    """What is compared: each makes its cache for one prefill; ``bank`` is a file for ladders that need codebooks."""

    def pruned(settings: plphp.PLPHPConfig) -> Cache:
        return plphp.PrunedCache.for_inputs(model, inputs, settings, vision_mask=is_vision)

    made: dict[str, Callable[[], Cache]] = {BASELINE: lambda: DynamicCache(config=model.config.get_text_config())}
    for rate in retention:
        made[f"plphp {rate:g}"] = partial(pruned, plphp.PLPHPConfig(retention_rate=rate, retention_delta=0.0))
    for name in ladders:
        settings = plphp.PLPHPConfig(method="quantized", tiers=name)
        if any(RUNGS[rung].needs_books for rung in Ladder.parse(name).names):
            settings = plphp.PLPHPConfig(method="query_bank", options={"bank": bank}, tiers=name)
        made[name] = partial(pruned, settings)
    return made


@torch.inference_mode()
def prefill(model: LlavaForConditionalGeneration, inputs: dict[str, Tensor], make_cache: Callable[[], Cache]) -> Cache:
    """Read the prompt into a new cache."""
    cache = make_cache()
    model(**inputs, **passed(cache), use_cache=True, logits_to_keep=1)
    return cache


@contextmanager
def timed_parts(device: torch.device) -> Iterator[dict[str, float]]:
    """Add up the seconds of every part of pruning while the context is open."""
    spent = dict.fromkeys(PARTS, 0.0)
    originals = {part: getattr(owner, name) for part, (owner, name) in PARTS.items()}

    def timing(part: str) -> Callable[..., Any]:
        @wraps(originals[part])
        def run(*args: Any, **kwargs: Any) -> Any:
            results: list[Any] = []
            spent[part] += measuring.seconds(lambda: results.append(originals[part](*args, **kwargs)), device)
            return results[0]

        return run

    for part, (owner, name) in PARTS.items():
        setattr(owner, name, timing(part))
    try:
        yield spent
    finally:
        for part, (owner, name) in PARTS.items():
            setattr(owner, name, originals[part])


def measure(
    model: LlavaForConditionalGeneration, batch: int, vision: int, args: argparse.Namespace, bank: str
) -> list[dict[str, Any]]:
    """Every variant at one batch and length."""
    inputs, is_vision = make_inputs(model, batch, vision)
    made = variants(model, inputs, is_vision, args.retention, args.tiers, bank)
    works = {name: partial(prefill, model, inputs, make_cache) for name, make_cache in made.items()}
    times = measuring.interleaved(works, model.device, args.rounds, warm_up=1)
    rows = []
    for name, work in works.items():
        row = {"batch": batch, "vision_tokens": vision, "variant": name, "seconds": times[name]}
        row["kv_bytes"] = kv_bytes(work())
        row["peak_bytes"] = measuring.peak_bytes(work, model.device)
        parts: dict[str, list[float]] = {part: [] for part in PARTS}
        for _ in range(args.rounds if name != BASELINE else 0):
            with timed_parts(model.device) as spent:
                work()
            for part, taken in spent.items():
                parts[part].append(taken)
        row |= {f"{part}_seconds": statistics.median(taken) if taken else 0.0 for part, taken in parts.items()}
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print the table."""
    title = f"Prefill, {args.shape} shape, {args.dtype}, {args.device}; median of {args.rounds}"
    headings = ("batch", "vision", "variant", "s", "ratio", *(f"{part} ms" for part in PARTS), "share", "KV", "peak")
    table = measuring.table(title, headings)
    baseline: dict[str, Any] = {}
    for row in rows:
        baseline = row if row["variant"] == BASELINE else baseline
        parts = [row[f"{part}_seconds"] for part in PARTS]
        table.add_row(
            str(row["batch"]),
            str(row["vision_tokens"]),
            row["variant"],
            f"{row['seconds']:.3f}",
            f"{baseline['seconds'] / row['seconds']:.3f}",
            *(f"{1000 * taken:.1f}" if row is not baseline else "" for taken in parts),
            f"{row['pruning_seconds'] / baseline['seconds']:.1%}" if row is not baseline else "",
            human_bytes(row["kv_bytes"]),
            human_bytes(row["peak_bytes"]),
        )
    console = Console(width=120)
    console.print(table)
    console.print("ratio of speed and share of pruning: of DynamicCache; peak: above what is alive before.")


def main() -> None:
    """Measure the grid, print one table."""
    on_gpu = torch.cuda.is_available()
    parser = measuring.arguments(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8] if on_gpu else [1])
    parser.add_argument("--vision-tokens", type=int, nargs="+", default=[2000, 7000] if on_gpu else [2000, 4000])
    parser.add_argument("--retention", type=float, nargs="+", default=[1.0, 0.4])
    parser.add_argument("--tiers", nargs="*", default=["t10", "c3"], help="ladders")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    model = build_model(args.shape, getattr(torch, args.dtype), torch.device(args.device))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bank = codes.random_bank(model, Path(folder) / "bank.safetensors")
        points = itertools.product(args.batch, args.vision_tokens)
        rows = [row for batch, vision in points for row in measure(model, batch, vision, args, bank)]
    show(rows, args)
    about = measuring.origin("prefill", args)
    measuring.write(args.out, {**about, "seconds": time.perf_counter() - started, "results": rows})


if __name__ == "__main__":
    main()
