# SPDX-License-Identifier: Apache-2.0
"""Train the shipped model: ``python -m training.train_all --out DIR [--text-steps N] [--resume]``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

# Large tensors come and go every step; without these the allocator returns them to the system each time.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    "OMP_WAIT_POLICY": "passive",
}
VISION_STEPS, TEXT_STEPS = 2800, 5600


def _restart_with_allocator() -> None:
    """Set what the C library reads at start, by starting again."""
    if any(key not in os.environ for key in ALLOCATOR):
        os.environ.update({key: os.environ.get(key, value) for key, value in ALLOCATOR.items()})
        os.execv(sys.executable, [sys.executable, "-m", "training.train_all", *sys.argv[1:]])


def main() -> None:
    """Run the stages that are not done yet: vision tower, text model, export, evaluation with results and card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="run folder for checkpoints, log and the export")
    parser.add_argument("--vision-steps", type=int, default=VISION_STEPS, help="batches of stage 1")
    parser.add_argument("--text-steps", type=int, default=TEXT_STEPS, help="batches of stage 2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--samples", type=int, default=200, help="held-out samples per task")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoints in --out")
    parser.add_argument("--no-compile", action="store_true", help="run the forward pass without torch.compile")
    parser.add_argument("--no-evaluation", action="store_true", help="stop after the export")
    args = parser.parse_args()
    _restart_with_allocator()

    import torch

    from training import export, pretrain_vision, results, train

    args.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(args.out / "train.log")],
    )
    torch.set_num_threads(args.threads)
    vision = args.out / "vision.pt"
    if not (args.resume and vision.exists()):
        model = export.new_model(args.seed).to(args.device)
        pretrain_vision.pretrain(model, args.out, steps=args.vision_steps, seed=args.seed, compiled=not args.no_compile)
    model = export.new_model(args.seed + 1).to(args.device)
    train.prepare(model, vision, args.seed)
    train.train(
        model,
        args.out,
        steps=args.text_steps,
        seed=args.seed,
        resume=args.resume,
        compiled=not args.no_compile,
    )
    results.write_facts(args.out, seed=args.seed, threads=args.threads, device=args.device)
    folder = export.export(args.out, args.out / results.MODEL)
    if not args.no_evaluation:
        results.write(args.out, folder, samples=args.samples, workers=args.threads)


if __name__ == "__main__":
    main()
