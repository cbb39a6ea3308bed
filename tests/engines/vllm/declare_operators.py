# SPDX-License-Identifier: Apache-2.0
"""Let a torchvision without its compiled part be imported: declare the operators that it describes at import."""

from __future__ import annotations

import importlib.util
from pathlib import Path

MARK = "# declared for plphp's tests"
DECLARATION = f"""

{MARK}: there is no compiled part for this torch
if not torchvision.extension._has_ops():
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{{_name}}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
AFTER = "import torchvision.extension  # noqa: F401\n"


def main() -> None:
    """Write the declaration behind the import of the compiled part, once."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise SystemExit("torchvision is not installed")
    file = Path(spec.origin).parent / "_meta_registrations.py"
    text = file.read_text(encoding="utf-8")
    if AFTER not in text:
        raise SystemExit(f"{file} is not as expected: it does not hold the line {AFTER!r}")
    if MARK not in text:
        file.write_text(text.replace(AFTER, AFTER + DECLARATION, 1), encoding="utf-8")


if __name__ == "__main__":
    main()
