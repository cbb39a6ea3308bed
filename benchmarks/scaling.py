# SPDX-License-Identifier: Apache-2.0
"""Whether a decoding step costs what it *reads*: ``python benchmarks/scaling.py``.

Steps are measured as in ``decode.py`` over prompt lengths, batches, retentions and ladders, in several passes over all
of them, so that a slow minute of the machine does not hit one length alone. For each kind of cache a line is fitted to
the times: a fixed cost, and seconds per byte of keys and values that a step reads. Where one line fits all points,
however the bytes come about, the cost is linear in what is read. Codes have lines of their own: a byte of them stands
for more than a byte of whole entries, and is worked on longer.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import decode
import measuring
import torch
from measuring import BASELINE
from rich.console import Console
from shapes import build_model, twin

from plphp.engines.hf.attachment import Lease
from plphp.show.tables import human_bytes


def line(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Fit ``seconds = fixed + per_byte * read_bytes``, and say which share of the variance it explains."""
    read = torch.tensor([row["read_bytes"] for row in rows], dtype=torch.float64)
    taken = torch.tensor([row["seconds"] for row in rows], dtype=torch.float64)
    factors = torch.stack([torch.ones_like(read), read], 1)
    fixed, per_byte = torch.linalg.lstsq(factors, taken[:, None]).solution[:, 0]
    missed = (taken - fixed - per_byte * read).square().sum()
    explained = 1 - missed / (taken - taken.mean()).square().sum()
    return {"fixed_seconds": float(fixed), "seconds_per_byte": float(per_byte), "explained": float(explained)}


def main() -> None:
    """Measure the grid, print one table."""
    on_gpu = torch.cuda.is_available()
    parser = measuring.arguments(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32] if on_gpu else [1, 4])
    parser.add_argument("--vision-tokens", type=int, nargs="+", default=[1000, 4000, 16000])
    parser.add_argument("--retention", type=float, nargs="+", default=[1.0, 0.4, 0.1])
    parser.add_argument("--tiers", type=decode.Tiers.parse, nargs="*", default=decode.TIERS)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each variant in a pass")
    parser.add_argument("--passes", type=int, default=3, help="over all points; their median counts")
    args = parser.parse_args()
    args.compiled = args.graphs = False

    stock = build_model(args.shape, getattr(torch, args.dtype), torch.device(args.device))
    ours = twin(stock)
    lease = Lease.of(ours)
    points = list(itertools.product(args.batch, args.vision_tokens))
    passes = [
        [row for batch, vision in points for row in decode.measure(stock, lease, batch, vision, args)]
        for _ in range(args.passes)
    ]
    rows = [
        {**same[0], "seconds": statistics.median(row["seconds"] for row in same)} for same in zip(*passes, strict=True)
    ]
    lease.end()
    kinds = {BASELINE: [BASELINE], "plphp, all retentions": [f"plphp {rate:g}" for rate in args.retention]}
    kinds |= {tiers.name: [tiers.name] for tiers in args.tiers}
    lines = {kind: line([row for row in rows if row["variant"] in names]) for kind, names in kinds.items()}

    console = Console(width=120)
    title = f"Decoding, {args.shape} shape, {args.dtype}, {args.device}; ms a step, {args.passes} x {args.steps} steps"
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    table = measuring.table(title, ("batch", "vision", *variants))
    for (batch, vision), of_point in itertools.groupby(rows, lambda row: (row["batch"], row["vision_tokens"])):
        cells = (f"{1000 * row['seconds']:.1f} ({human_bytes(row['read_bytes'])})" for row in of_point)
        table.add_row(str(batch), str(vision), *cells)
    console.print(table)
    for name, one in lines.items():
        rate = 1e-9 / one["seconds_per_byte"]
        fixed = 1000 * one["fixed_seconds"]
        console.print(f"{name}: {fixed:.1f} ms + bytes read at {rate:.1f} GB/s; explains {one['explained']:.1%}.")
    measuring.write(args.out, {**measuring.origin("scaling", args), "lines": lines, "results": rows})


if __name__ == "__main__":
    main()
