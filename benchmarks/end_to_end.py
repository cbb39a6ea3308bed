# SPDX-License-Identifier: Apache-2.0
"""Images and a question in, an answer out: ``python benchmarks/end_to_end.py``.

The vision tower reads random pixels, then so many tokens are generated, with ``generate``: the time to the first token,
the time of a further one, and of the whole. Every layer keeps the same share, and which tokens those are is decided by
the model's own attention. Unpruned and pruned runs take turns; figures are medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import measuring
import torch
from measuring import BASELINE
from rich.console import Console
from shapes import IMAGE, SMALL, SO400M, TEXT_TOKENS, build_model
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import plphp
from plphp.settings.config import DECODE_MODES
from plphp.show.tables import human_bytes
from plphp.studies.compare import Run, compare


class NoWords:
    """Stands in for a processor: random weights have nothing to say."""

    def batch_decode(self, rows: Sequence[Any], **_: Any) -> list[str]:
        """An empty answer for each row."""
        return [""] * len(rows)


def make_inputs(model: LlavaForConditionalGeneration, batch: int, images: int) -> dict[str, Tensor]:
    """Prompts of so many images each, in the middle of the text."""
    tower = model.config.vision_config
    size = tower.image_size
    before = torch.arange(TEXT_TOKENS // 2) + 10
    row = torch.cat([before, torch.full((images * (size // tower.patch_size) ** 2,), IMAGE), before + 100])
    pixels = torch.rand(batch * images, 3, size, size, generator=torch.Generator().manual_seed(0))
    ids = row.repeat(batch, 1)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}
    return {name: one.to(model.device) for name, one in made.items()}


def figures(variant: str, run: Run, against: Run, new_tokens: int) -> dict[str, Any]:
    """One row of the table: of a run, and of the unpruned one that it took turns with."""

    def each(one: Run) -> float:
        assert one.seconds_per_token is not None
        return one.seconds_per_token

    def total(one: Run) -> float:
        return one.prefill_seconds + (new_tokens - 1) * each(one)

    return {
        "variant": variant,
        "first_token_seconds": run.prefill_seconds,
        "seconds_per_token": each(run),
        "total_seconds": total(run),
        "kv_bytes": run.kv_bytes,
        "ratio_first_token": against.prefill_seconds / run.prefill_seconds,
        "ratio_per_token": each(against) / each(run),
        "ratio_total": total(against) / total(run),
    }


def show(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print the table."""
    title = (
        f"{args.images} images, {args.new_tokens} new tokens, batch {args.batch}, {args.shape} shape, {args.dtype}, "
        f"{args.device}; median of {args.rounds}"
    )
    headings = ("variant", "first token s", "x", "ms a token", "x", "total s", "x", "KV")
    table = measuring.table(title, headings)
    for row in rows:
        table.add_row(
            row["variant"],
            f"{row['first_token_seconds']:.2f}",
            f"{row['ratio_first_token']:.2f}",
            f"{1000 * row['seconds_per_token']:.1f}",
            f"{row['ratio_per_token']:.2f}",
            f"{row['total_seconds']:.2f}",
            f"{row['ratio_total']:.2f}",
            human_bytes(row["kv_bytes"]),
        )
    console = Console(width=120)
    console.print(table)
    console.print(f"x: times as fast as the runs with {BASELINE} that it took turns with.")


def main() -> None:
    """Measure, print one table."""
    on_gpu = torch.cuda.is_available()
    parser = measuring.arguments(__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--images", type=int, default=10 if on_gpu else 4, help="of 729 tokens, in each prompt")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--retention", type=float, nargs="+", default=[0.4, 0.2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--decode", choices=DECODE_MODES, default="auto", help="how the pruned runs decode")
    args = parser.parse_args()
    if args.new_tokens < 2:
        parser.error("--new-tokens must be at least 2: the first one comes out of the prompt.")

    tower = SMALL if args.shape == "tiny" else SO400M
    model = build_model(args.shape, getattr(torch, args.dtype), torch.device(args.device), tower)
    inputs = make_inputs(model, args.batch, args.images)
    rows = []
    for rate in args.retention:
        found = compare(
            model,
            NoWords(),
            inputs,
            plphp.PLPHPConfig(retention_rate=rate, retention_delta=0.0),
            rounds=args.rounds,
            decode=args.decode,
            max_new_tokens=args.new_tokens,
            do_sample=False,
        )
        if not rows:
            rows.append(figures(BASELINE, found.unpruned, found.unpruned, args.new_tokens))
        rows.append(figures(f"plphp {rate:g}", found.pruned, found.unpruned, args.new_tokens))
    show(rows, args)
    measuring.write(args.out, {**measuring.origin("end_to_end", args), "results": rows})


if __name__ == "__main__":
    main()
