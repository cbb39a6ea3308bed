# SPDX-License-Identifier: Apache-2.0
"""Time of a decoding step over entries in few bits, and of encoding them: ``python benchmarks/tiers.py``.

Caches are filled with random keys and values as in ``decode.py``, and codebooks are random, too: what is looked up does
not depend on what is found. The ladder of a layer takes random entries of all heads; layers hold copies of the first
layer's codes. Variants are interleaved step by step; figures are medians. ``torch`` is the same attention without
kernels, for scale. Encoding is measured on prompts of ``--prompt`` tokens, layer by layer, against reading them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import decode
import measuring
import torch
from measuring import BASELINE
from rich.console import Console
from shapes import TEXT_TOKENS, build_model, twin
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers.cache_utils import DynamicCache

import plphp
from plphp.engines.hf.attachment import Lease
from plphp.kernels.books import CENTROIDS, COARSE_PART, PART, Books, LayerBooks
from plphp.kernels.codecs import Codes
from plphp.kernels.coded import CodedKV, Reading
from plphp.kernels.coded_attention import counting_reads
from plphp.kernels.coder import Coder
from plphp.kernels.rungs import RUNGS
from plphp.pruning.placement import Placement
from plphp.settings.ladder import Ladder
from plphp.show.tables import human_bytes
from plphp.studies.compare import kv_bytes

WHOLE = 0.4
"""Retention of the cache of whole entries."""
VARIANTS = {"t10": ("t10", 1.0), "t10, read 0.2": ("t10", 0.2), "c3": ("c3", 1.0)}
"""Ladders, and the share of the coded entries that a step reads."""
QUICK = {"batch": 2, "vision_tokens": 500, "steps": 3, "prompt": 300, "reference_steps": 1}


def coder_of(model: LlavaForConditionalGeneration, ladder: Ladder, read: float) -> Coder:
    """A coder with random codebooks."""
    text = model.config.get_text_config()
    heads, dim = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
    generator = torch.Generator(model.device).manual_seed(0)

    def book(channels: int, scale: float) -> Tensor:
        shape = (heads, dim // channels, CENTROIDS, channels)
        return (scale * torch.randn(shape, generator=generator, device=model.device)).half()

    def books() -> Books:
        coarse = book(COARSE_PART, 1.0) if dim % COARSE_PART == 0 else None
        return Books(book(PART, 1.0), book(PART, 0.3), coarse)

    return Coder(tuple(RUNGS[name] for name in ladder.names), LayerBooks(books(), books()), Reading(read))


def placed(ladder: Ladder, batch: int, heads: int, vision: int) -> tuple[Tensor, Tensor]:
    """A random placement, uint8 [batch, heads, tokens], as many entries of every row in a rung; and the vision tokens,
    bool [batch, tokens]."""
    generator = torch.Generator().manual_seed(0)
    placement = torch.full((batch, heads, vision + TEXT_TOKENS), Placement.WHOLE, dtype=torch.uint8)
    order = torch.rand(batch, heads * vision, generator=generator).argsort(-1)
    of_vision = torch.zeros(batch, heads * vision, dtype=torch.uint8)
    ends = [round(share * heads * vision) for share in ladder.cumulative()]
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False), 1):
        of_vision.scatter_(1, order[:, start:end], number)
    placement[:, :, TEXT_TOKENS // 2 :][:, :, :vision] = of_vision.view(batch, heads, vision)
    is_vision = torch.zeros(batch, vision + TEXT_TOKENS, dtype=torch.bool)
    is_vision[:, TEXT_TOKENS // 2 :][:, :vision] = True
    return placement, is_vision


def tiered_cache(lease: Lease, batch: int, vision: int, ladder: Ladder, read: float) -> plphp.PrunedCache:
    """A cache of which every layer holds its vision entries in a ladder."""
    model = lease.attachment.model
    cache = plphp.PrunedCache(lease.attachment, plphp.PLPHPConfig())
    coder, first = coder_of(model, ladder, read), None
    for number, layer in enumerate(cache.layers):
        keys, values = decode.entries(model, batch, vision + TEXT_TOKENS, number)
        placement, is_vision = (state.to(model.device) for state in placed(ladder, batch, keys.shape[1], vision))
        layer.update(keys, values)
        first = coder.encode(keys, values, is_vision, placement) if first is None else first
        layer.compact(placement * (placement == Placement.WHOLE))
        layer.coded = () if first is None else (_copied(first),)
    return cache


def _copied(block: CodedKV) -> CodedKV:
    """The same codes in memory of their own."""

    def own(codes: Codes) -> Codes:
        return Codes(
            tuple(stream.clone() for stream in codes.streams),
            None if codes.scales is None else codes.scales.clone(),
            None if codes.groups is None else codes.groups.clone(),
        )

    return replace(block, tiers=tuple(replace(t, keys=own(t.keys), values=own(t.values)) for t in block.tiers))


def without_kernels(step: Callable[[], Any]) -> Callable[[], Any]:
    """A step that attends to codes in torch."""

    def work() -> None:
        with counting_reads():
            step()

    return work


def steps_of(args: argparse.Namespace, stock: LlavaForConditionalGeneration, lease: Lease) -> list[dict[str, Any]]:
    """Time a step with every cache."""
    batch, vision = args.batch, args.vision_tokens
    caches = {BASELINE: decode.dynamic_cache(stock, batch, vision)}
    caches[f"whole {WHOLE:g}"] = decode.pruned_cache(lease, batch, vision, WHOLE)
    for name, (ladder, read) in VARIANTS.items():
        caches[name] = tiered_cache(lease, batch, vision, Ladder.parse(ladder), read)
    ours, device = lease.attachment.model, stock.device
    steps = {name: decode.stepper(stock if name == BASELINE else ours, cache, batch) for name, cache in caches.items()}
    held = {name: kv_bytes(cache) for name, cache in caches.items()}
    times = measuring.interleaved(steps, device, args.steps, decode.WARM_UP)
    if args.reference_steps:
        slow = {"t10, torch": without_kernels(steps["t10"])}
        times |= measuring.interleaved(slow, device, args.reference_steps, 1)
        held |= dict.fromkeys(slow, held["t10"])
    return [
        {
            "variant": name,
            "seconds": seconds,
            "kv_bytes": held[name],
            "ratio_to_whole": seconds / times[f"whole {WHOLE:g}"],
        }
        for name, seconds in times.items()
    ]


def encoding(args: argparse.Namespace, model: LlavaForConditionalGeneration) -> list[dict[str, Any]]:
    """Time encoding the entries of all layers against reading the prompt."""
    tokens = args.prompt
    ids = torch.arange(tokens, device=model.device)[None] % 400 + 10

    @torch.inference_mode()
    def prefill() -> None:
        model(input_ids=ids, past_key_values=DynamicCache(config=model.config.get_text_config()), logits_to_keep=1)

    works: dict[str, Callable[[], Any]] = {"prefill": prefill}
    layers = model.config.get_text_config().num_hidden_layers
    for name in dict.fromkeys(ladder for ladder, _ in VARIANTS.values()):
        ladder = Ladder.parse(name)
        keys, values = decode.entries(model, 1, tokens + TEXT_TOKENS, 0)
        placement, vision = (state.to(model.device) for state in placed(ladder, 1, keys.shape[1], tokens))
        coder = coder_of(model, ladder, 1.0)

        def encode(coder: Coder = coder, states: tuple[Tensor, ...] = (keys, values, vision, placement)) -> None:
            for _ in range(layers):
                coder.encode(*states)

        works[name] = encode
    times = measuring.interleaved(works, model.device, args.turns, 1)
    return [
        {"ladder": name, "seconds": seconds, "share_of_prefill": seconds / times["prefill"]}
        for name, seconds in times.items()
        if name != "prefill"
    ] + [{"ladder": "prefill", "seconds": times["prefill"], "share_of_prefill": 1.0}]


def main() -> None:
    """Measure steps and encoding, print two tables."""
    parser = measuring.arguments(__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--vision-tokens", type=int, default=8000)
    parser.add_argument("--steps", type=int, default=40, help="timed decoding steps")
    parser.add_argument("--reference-steps", type=int, default=1, help="timed decoding steps without kernels")
    parser.add_argument("--prompt", type=int, default=2000, help="vision tokens of the prompt that is encoded")
    parser.add_argument("--turns", type=int, default=5, help="timed prefills")
    parser.add_argument("--quick", action="store_true", help=f"to try it: {QUICK}")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    stock = build_model(args.shape, getattr(torch, args.dtype), torch.device(args.device))
    ours = twin(stock)
    lease = Lease.of(ours)
    encoded, rows = encoding(args, stock), steps_of(args, stock, lease)
    lease.end()
    title = f"Tiers, {args.shape} shape, {args.dtype}, {args.device}, batch {args.batch} x {args.vision_tokens} tokens"
    table = measuring.table(f"{title}; medians", ("variant", "ms a step", f"x whole {WHOLE:g}", "KV"))
    for row in rows:
        ratio = f"{row['ratio_to_whole']:.3f}"
        table.add_row(row["variant"], f"{1000 * row['seconds']:.1f}", ratio, human_bytes(row["kv_bytes"]))
    shares = measuring.table(f"Encoding {args.prompt} tokens", ("variant", "ms", "of prefill"))
    for row in encoded:
        shares.add_row(row["ladder"], f"{1000 * row['seconds']:.1f}", f"{100 * row['share_of_prefill']:.1f} %")
    for shown in (table, shares):
        Console(width=120).print(shown)
    measuring.write(args.out, {**measuring.origin("tiers", args), "results": rows, "encoding": encoded})


if __name__ == "__main__":
    main()
