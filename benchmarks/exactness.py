# SPDX-License-Identifier: Apache-2.0
"""How exact pruning is, per model family: largest difference of the logits of four generated tokens.

On the tests' small models with random weights in float32. Run ``python benchmarks/exactness.py``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import measuring
import torch
import transformers
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import plphp
from invariants import evicted_entries_masked, generate, max_difference, pruned
from tiny_models import TINY, tiny_model

ROWS = [2, 0, 1]
PRUNE = plphp.PLPHPConfig(retention_rate=0.3, attentive_threshold=0.6, indifferent_threshold=0.5)


def measure(family: str) -> dict[str, Any]:
    """Compare one family with stock generate, with a masked full cache, and row by row."""
    model, tiny = tiny_model(family), TINY[family]
    inputs = tiny.inputs(model, ROWS)
    stock = generate(model, inputs)
    kept, _ = pruned(model, inputs, plphp.PLPHPConfig(retention_rate=1.0))
    output, report = pruned(model, inputs, PRUNE)
    with evicted_entries_masked(model, report):
        masked = generate(model, inputs)
    alone = [pruned(model, row, PRUNE)[0] for row in tiny.rows(model, ROWS)]
    return {
        "kept_all_against_stock": max_difference(stock, kept),
        "pruned_against_masked": max_difference(masked, output),
        "padded_against_alone": max(
            float((step[row] - single.logits[index][0]).abs().max())
            for row, single in enumerate(alone)
            for index, step in enumerate(output.logits)
        ),
        "tokens_equal": bool(
            torch.equal(stock.sequences, kept.sequences) and torch.equal(masked.sequences, output.sequences)
        ),
        "effect_of_pruning": max_difference(stock, output),
        "retention": report.retention,
    }


def main() -> None:
    """Measure all families and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    results = {family: measure(family) for family in sorted(TINY)}
    table = Table(title="largest difference of logits")
    for name in ("model", *next(iter(results.values()))):
        table.add_column(name.replace("_", " "), justify="left" if name == "model" else "right")
    for family, one in results.items():
        table.add_row(family, *(f"{value:.1e}" if isinstance(value, float) else str(value) for value in one.values()))
    Console(width=120).print(table)
    measuring.write(args.out, {**measuring.origin("exactness", args), "results": results})


if __name__ == "__main__":
    main()
