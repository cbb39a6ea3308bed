# SPDX-License-Identifier: Apache-2.0
"""Whether two runs of ``plphp eval`` answered alike: the check of a change that must change no answer.

On the commit before and on the one after::

    plphp eval --methods fastv,none,plphp,pyramidkv,query_bank:bank=bundled,random,recall_rank,shared,snapkv,\\
    snapkv_vision,uniform,value_norm,vl_cache,vtw,zipvl,oracle,downsample,zero,blank \\
        --target-retention 0.4,0.1 --samples 20 --out before          # and --out after
    python benchmarks/same_predictions.py before after
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def records(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of a run by task: texts, scores, kept entries, agreement and KL of every variant and sample."""
    files = sorted((folder / "predictions").glob("*.jsonl"))
    if not files:
        sys.exit(f"{folder} holds no predictions: name the --out folder of a run of plphp eval.")
    return {file.stem: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files}


def main() -> None:
    """Compare, and end with status 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    arguments = parser.parse_args()
    before, after = records(arguments.before), records(arguments.after)
    if before.keys() != after.keys():
        sys.exit(f"Different tasks: {sorted(before.keys() ^ after.keys())}.")
    differing = [
        f"{task}: {first['id']}"
        for task, samples in before.items()
        for first, second in zip(samples, after[task], strict=True)
        if first != second
    ]
    print(f"{sum(map(len, before.values()))} samples, {len(differing)} of them differ")
    print("\n".join(differing))
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
