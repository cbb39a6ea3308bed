# SPDX-License-Identifier: Apache-2.0
"""How exact pruning is, per model family: largest difference of the logits of four generated tokens.

On the tests' small models with random weights: in float64, where noise is 1e-14 and a mistake 1e-4, and in float32
beside what stock ``generate`` differs by between a padded row and the row alone. Run ``python
benchmarks/exactness.py``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import measuring
import torch
import transformers
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import plphp
from invariants import evicted_entries_masked, generate, logit_difference, pruned
from precision import float64, max_difference
from tiny_models import TINY, tiny_model

ROWS = [2, 0, 1]
PRUNE = plphp.PLPHPConfig(retention_rate=0.3, attentive_threshold=0.6, indifferent_threshold=0.5)
DTYPES = {"float64": float64, "float32": nullcontext}


def measure(family: str) -> dict[str, Any]:
    """Compare one family with stock generate, with a masked full cache, and row by row."""
    model, tiny = tiny_model(family), TINY[family]
    inputs, rows = tiny.inputs(model, ROWS), tiny.rows(model, ROWS)
    stock = generate(model, inputs)
    kept, _ = pruned(model, inputs, plphp.PLPHPConfig(retention_rate=1.0))
    output, report = pruned(model, inputs, PRUNE)
    with evicted_entries_masked(model, report):
        masked = generate(model, inputs)
    return {
        "kept_all_against_stock": logit_difference(stock, kept),
        "pruned_against_masked": logit_difference(masked, output),
        "padded_against_alone": from_rows(output, [pruned(model, row, PRUNE)[0] for row in rows]),
        "stock_padded_against_alone": from_rows(stock, [generate(model, row) for row in rows]),
        "tokens_equal": bool(
            torch.equal(stock.sequences, kept.sequences) and torch.equal(masked.sequences, output.sequences)
        ),
        "effect_of_pruning": logit_difference(stock, output),
        "retention": report.retention,
    }


def from_rows(batch: Any, alone: Sequence[Any]) -> float:
    """Largest difference of the logits of a batch from those of its rows alone."""
    return max(
        max_difference(step[row], single.logits[index][0])
        for row, single in enumerate(alone)
        for index, step in enumerate(batch.logits)
    )


def show(dtype: str, results: dict[str, dict[str, Any]]) -> None:
    """Print one table."""
    table = Table(title=f"largest difference of logits, {dtype}")
    for name in ("model", *next(iter(results.values()))):
        table.add_column(name.replace("_", " "), justify="left" if name == "model" else "right")
    for family, one in results.items():
        table.add_row(family, *(f"{value:.1e}" if isinstance(value, float) else str(value) for value in one.values()))
    Console(width=130).print(table)


def main() -> None:
    """Measure all families in both dtypes and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    results = {}
    for dtype, context in DTYPES.items():
        with context():
            results[dtype] = {family: measure(family) for family in sorted(TINY)}
        show(dtype, results[dtype])
    measuring.write(args.out, {**measuring.origin("exactness", args), "results": results})


if __name__ == "__main__":
    main()
