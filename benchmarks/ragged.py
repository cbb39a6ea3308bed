# SPDX-License-Identifier: Apache-2.0
"""What budgets that differ between heads cost against equal ones: ``python benchmarks/ragged.py``.

Caches are filled as in ``decode.py``. In one of each pair all heads of a layer hold as many entries; in the other they
hold as many together, and the largest head of a row so many times the mean as ragged budgets make it at that retention.
Timed are a decoding step, its attention alone, a second turn of some tokens, and the scores of a second turn with an
image, each interleaved between the two caches; figures are medians. The ratio is the time with ragged heads over that
with equal ones.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import decode
import measuring
import torch
from rich.console import Console
from shapes import TEXT_TOKENS, build_model
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import plphp
from plphp.engines.hf.attachment import Lease
from plphp.engines.hf.cache_argument import passed
from plphp.kernels import decode_attention, window_scores
from plphp.show.tables import human_bytes
from plphp.studies.compare import kv_bytes

LARGEST = {0.25: 1.5, 0.1: 1.8, 0.05: 2.1}
"""Entries of the largest head over the mean of its layer, by retention: what ``query_bank`` gives heads of the bundled
model on the development split."""
LEAST = 0.05
"""What the heads beside the largest hold at least, over the mean, together."""
QUICK = {"batch": 2, "vision_tokens": 1000, "steps": 3, "turns": 1}
WINDOW, IMAGE_TOKENS = 16, 729
"""Query rows that score a second turn, and its vision tokens."""


def shares(largest: float, heads: int, generator: torch.Generator) -> list[float]:
    """Random shares of heads, their mean 1 and one of them the largest, as far as the rest can make up for it."""
    largest = min(largest, heads - LEAST) if heads > 1 else 1.0
    rest = 0.5 + torch.rand(heads - 1, generator=generator)
    of_heads = torch.cat([torch.tensor([largest]), rest * (heads - largest) / rest.sum()])
    chosen: list[float] = of_heads[torch.randperm(heads, generator=generator)].tolist()
    return chosen


def kept(
    rate: float, layer: int, layers: int, batch: int, heads: int, vision: int, largest: float | None = None
) -> Tensor:
    """Random entries to keep, bool [batch, heads, tokens], as many of every row and layer: of every head alike, or with
    a largest head."""
    generator = torch.Generator().manual_seed(layer)
    keep = torch.ones(batch, heads, vision + TEXT_TOKENS, dtype=torch.bool)
    mean = round(rate * vision)
    for row in range(batch):
        order = torch.rand(heads, vision, generator=generator).argsort(-1)
        of_heads = [1.0] * heads if largest is None else shares(largest, heads, generator)
        ends = [round(mean * end) for end in itertools.accumulate(of_heads)]
        for head, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            keep[row, head, TEXT_TOKENS // 2 :][:vision][order[head, min(end - start, vision) :]] = False
    return keep


def attention(model: LlavaForConditionalGeneration, cache: plphp.PrunedCache, batch: int) -> Callable[[], Any]:
    """Make a function that does the attention of a decoding step in all layers."""
    query, new = _states(model, batch, 1)

    @torch.inference_mode()
    def attend() -> None:
        for layer in cache.layers:
            decode_attention(query, layer.prefix, new, new, None, 0.1)

    return attend


def turn(model: LlavaForConditionalGeneration, cache: plphp.PrunedCache, batch: int, tokens: int) -> Callable[[], Any]:
    """Make a function that reads a turn of text, and forgets it."""
    ids = torch.arange(batch * tokens, device=model.device).view(batch, tokens) % 400 + 10
    positions = (int(cache.get_seq_length()) + torch.arange(tokens, device=model.device)).expand(batch, -1)

    @torch.inference_mode()
    def read() -> None:
        model(input_ids=ids, position_ids=positions, **passed(cache), use_cache=True, logits_to_keep=1)
        for layer in cache.layers:
            layer.crop(-tokens)

    return read


def scores(model: LlavaForConditionalGeneration, cache: plphp.PrunedCache, batch: int) -> Callable[[], Any]:
    """Make a function that scores the entries of a second turn with an image in all layers."""
    seq = IMAGE_TOKENS + TEXT_TOKENS
    query, _ = _states(model, batch, WINDOW)
    _, keys = _states(model, batch, seq)
    weight = torch.full((batch, WINDOW), 1 / WINDOW, device=model.device)
    position = torch.arange(seq - WINDOW, seq, device=model.device)
    valid = torch.ones(batch, seq, dtype=torch.bool, device=model.device)

    @torch.inference_mode()
    def score() -> None:
        for layer in cache.layers:
            window_scores(query, weight, position, keys, valid, layer.prefix, 0.1)

    return score


def _states(model: LlavaForConditionalGeneration, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Random queries [batch, q_heads, tokens, dim] and keys [batch, kv_heads, tokens, dim]."""
    text = model.config.get_text_config()
    dim = text.hidden_size // text.num_attention_heads
    generator = torch.Generator(model.device).manual_seed(0)
    like = {"dtype": model.dtype, "device": model.device}
    queries = torch.empty(batch, text.num_attention_heads, tokens, dim, **like).normal_(generator=generator)
    return queries, torch.empty(batch, text.num_key_value_heads, tokens, dim, **like).normal_(generator=generator)


def measure(lease: Lease, rate: float, largest: float, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time the works with equal and with ragged heads at a retention rate."""
    model, batch = lease.attachment.model, args.batch
    choices: dict[str, Callable[..., Tensor]] = {"equal": kept, "ragged": functools.partial(kept, largest=largest)}
    caches = {
        name: decode.pruned_cache(lease, batch, args.vision_tokens, rate, choose) for name, choose in choices.items()
    }
    held = {name: kv_bytes(cache) for name, cache in caches.items()}
    vision = torch.tensor([layer.prefix.counts for layer in caches["ragged"].layers]).float() - TEXT_TOKENS
    spread = (vision.amax(-1) / vision.mean(-1)).mean().item()
    # A decoding step grows the tail, so it comes last. What takes long is warm after a round.
    works: dict[str, tuple[int, Callable[[plphp.PrunedCache], Callable[[], Any]]]] = {
        "second turn": (args.turns, lambda cache: turn(model, cache, batch, args.turn_tokens)),
        "scores of a second turn": (args.turns, lambda cache: scores(model, cache, batch)),
        "attention of a step": (args.steps, lambda cache: attention(model, cache, batch)),
        "decoding step": (args.steps, lambda cache: decode.stepper(model, cache, batch)),
    }
    for name, (rounds, work) in works.items():
        timed = {heads: work(cache) for heads, cache in caches.items()}
        times = measuring.interleaved(timed, model.device, rounds, 1 if rounds == args.turns else decode.WARM_UP)
        yield {
            "retention": rate,
            "largest_head": spread,
            "work": name,
            "rounds": rounds,
            **{f"{heads}_seconds": seconds for heads, seconds in times.items()},
            **{f"{heads}_kv_bytes": size for heads, size in held.items()},
            "ratio": times["ragged"] / times["equal"],
        }


def main() -> None:
    """Measure all retentions, print one table."""
    parser = measuring.arguments(__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--vision-tokens", type=int, default=8000)
    parser.add_argument("--retention", type=float, nargs="+", default=list(LARGEST))
    parser.add_argument("--largest", type=float, nargs="+", help="of each retention, the largest head over the mean")
    parser.add_argument("--steps", type=int, default=60, help="timed decoding steps")
    parser.add_argument("--turns", type=int, default=9, help="timed second turns, and scores of one")
    parser.add_argument("--turn-tokens", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help=f"to try it: {QUICK}")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    args.largest = args.largest or [LARGEST.get(rate, 1.5) for rate in args.retention]
    if len(args.largest) != len(args.retention):
        parser.error(f"--largest has {len(args.largest)} numbers, and --retention {len(args.retention)}.")

    model = build_model(args.shape, getattr(torch, args.dtype), torch.device(args.device))
    lease = Lease.of(model)
    rows = []
    title = f"Ragged heads, {args.shape} shape, {args.dtype}, {args.device}, batch {args.batch}; medians"
    headings = ("retention", "largest head", "variant", "equal ms", "ragged ms", "ratio", "KV")
    table = measuring.table(title, headings)
    for rate, largest in zip(args.retention, args.largest, strict=True):
        found = list(measure(lease, rate, largest, args))
        for row in found:
            table.add_row(
                f"{rate:g}",
                f"{row['largest_head']:.2f}",
                row["work"],
                f"{1000 * row['equal_seconds']:.2f}",
                f"{1000 * row['ragged_seconds']:.2f}",
                f"{row['ratio']:.3f}",
                human_bytes(row["ragged_kv_bytes"]),
                end_section=row is found[-1],
            )
        rows += found
        gc.collect()
    lease.end()
    Console(width=120).print(table)
    measuring.write(args.out, {**measuring.origin("ragged", args), "results": rows})


if __name__ == "__main__":
    main()
