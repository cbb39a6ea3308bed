# SPDX-License-Identifier: Apache-2.0
"""Time of a decoding step over entries in few bits, and of encoding them: ``python benchmarks/tiers.py``.

Caches are filled as in ``decode.py``, with random codebooks: what is looked up does not depend on what is found.
Variants are interleaved step by step; figures are medians. ``torch`` is the same attention without
kernels, for scale. Encoding is measured on prompts of ``--prompt`` tokens, layer by layer, against reading them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import codes
import decode
import measuring
import torch
from measuring import BASELINE
from rich.console import Console
from shapes import TEXT_TOKENS, build_model, twin
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers.cache_utils import DynamicCache

from plphp.engines.hf.attachment import Lease
from plphp.kernels.coded_attention import counting_reads
from plphp.kernels.coder import Coder
from plphp.show.tables import human_bytes
from plphp.studies.compare import kv_bytes

WHOLE = 0.4
"""Retention of the cache of whole entries."""
QUICK = {"batch": 2, "vision_tokens": 500, "steps": 3, "prompt": 300, "reference_steps": 1}


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
    caches |= {tiers.name: decode.tiered_cache(lease, batch, vision, tiers) for tiers in decode.TIERS}
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
    keys, values = decode.entries(model, 1, tokens + TEXT_TOKENS, 0)
    vision = decode.is_vision(tokens).to(model.device)
    for tiers in decode.TIERS:
        if tiers.read == 1:
            placement = codes.random_placement(tiers.ladder, vision.cpu(), keys.shape[1]).to(model.device)
            coder = codes.random_coder(tiers.ladder, 1.0, keys.shape[1], keys.shape[3], model.device)

            def encode(coder: Coder = coder, placement: Tensor = placement) -> None:
                for _ in range(layers):
                    coder.encode(keys, values, vision, placement)

            works[tiers.name] = encode
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
