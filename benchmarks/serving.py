# SPDX-License-Identifier: Apache-2.0
"""vLLM with the plugin and without, in the same pool: how many answers it writes at once, and how fast.

Two tables. For the first all requests come at once to an engine whose pool is too small for them: the steps are
counted, and with the bundled model the right answers to the example questions. For the second clients of vLLM's own
benchmark tool send images over HTTP to servers that stand side by side, in turns. Run it where vLLM is installed, see
docs/serving.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import measuring
import torch
from rich.console import Console
from serving_load import OFF, load, server
from shapes import SHAPES, build_model
from transformers import AutoConfig, AutoProcessor, LlavaProcessor, SiglipImageProcessor

from plphp.inputs.sources import bundled_model_path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from training.weights import publish_names  # noqa: E402 - a folder beside this one, and no part of the package

QUESTIONS = HERE.parent / "examples" / "images" / "questions.json"
"""Those of the bundled model, with up to three images each."""


def main() -> None:
    """Run all variants and print both tables."""
    args = parse()
    import vllm

    with tempfile.TemporaryDirectory() as folder:
        model = checkpoint(args.shape, Path(folder)) if args.shape else args.model or str(bundled_model_path())
        counted = [count(args, model, variant, Path(folder)) for variant in (OFF, *args.settings)]
        show_counts(args, counted)
        timed = [] if args.rounds == 0 else measure_load(args, model, Path(folder))
    if timed:
        show_load(args, timed)
    origin = measuring.origin("serving", args)
    origin["versions"]["vllm"] = vllm.__version__
    measuring.write(args.out, {**origin, "capacity": counted, "load": timed})


def parse() -> argparse.Namespace:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="hub id or folder; default: the bundled model")
    model.add_argument("--shape", choices=SHAPES, help="a model with random weights instead, 729 tokens an image")
    parser.add_argument("--settings", nargs="+", default=["plphp:target_retention=0.4"], help="beside no plugin at all")
    parser.add_argument("--blocks", type=int, default=150, help="blocks of the pool, each with a page of every layer")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--requests", type=int, default=16, help="of a run")
    parser.add_argument("--images", type=int, default=4, help="of a request")
    parser.add_argument("--side", type=int, default=112, help="of the square images that clients send, in pixels")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="runs of every server; 0 leaves servers out")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    return parser.parse_args()


def checkpoint(shape: str, folder: Path) -> str:
    """Write a model with random weights, and the bundled model's tokenizer."""
    bundled = AutoProcessor.from_pretrained(bundled_model_path())
    model = build_model(shape, torch.bfloat16, torch.device("cpu"))
    tower = model.config.vision_config
    model.config.image_token_id = bundled.image_token_id
    side = {"height": tower.image_size, "width": tower.image_size}
    processor = LlavaProcessor(
        SiglipImageProcessor(size=side),
        bundled.tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy="full",
        chat_template=bundled.chat_template,
        image_token=bundled.image_token,
        num_additional_image_tokens=0,
    )
    target = folder / "checkpoint"
    model.save_pretrained(target)
    processor.save_pretrained(target)
    publish_names(target / "model.safetensors")
    return str(target)


def pool(args: argparse.Namespace, model: str, variant: str) -> dict[str, Any]:
    """Options of an engine: the same bytes of KV cache with the plugin and without."""
    layers = AutoConfig.from_pretrained(model).get_text_config().num_hidden_layers
    return {
        "dtype": args.dtype,
        "block_size": args.block_size,
        # A block holds a page of one layer with the plugin, of all layers without; one more is nobody's.
        "num_gpu_blocks_override": args.blocks * (1 if variant == OFF else layers) + 1,
        "max_model_len": min((args.blocks - 1) * args.block_size, 4096),
        "max_num_seqs": args.requests,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "limit_mm_per_prompt": {"image": max(args.images, 3)},
    }


def count(args: argparse.Namespace, model: str, variant: str, folder: Path) -> dict[str, Any]:
    """Count the steps of one engine, in a process of its own: its memory cannot be had back."""
    job, result = folder / "job.json", folder / "result.json"
    given = {
        "model": model,
        "variant": variant,
        "engine": pool(args, model, variant),
        "questions": str(QUESTIONS) if model == str(bundled_model_path()) else None,
        **{name: getattr(args, name) for name in ("requests", "images", "side", "new_tokens")},
    }
    job.write_text(json.dumps(given))
    command = [sys.executable, str(HERE / "serving_capacity.py"), str(job), str(result)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{variant}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def environment() -> dict[str, str]:
    """Of the processes of vLLM; what is set already stays."""
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    return {**quiet, **os.environ}


def measure_load(args: argparse.Namespace, model: str, folder: Path) -> list[dict[str, Any]]:
    """Time one server for each variant, in turns."""
    names = (OFF, *args.settings)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with ExitStack() as stack:
        ports = {
            name: stack.enter_context(server(model, name, pool(args, model, name), environment(), folder))
            for name in names
        }
        for number in range(args.rounds + 1):
            for name in names:
                shape = (args.requests, args.images, args.side, args.new_tokens)
                found = load(ports[name], model, shape, folder, seed=number)
                if number:  # the first run warms up
                    runs[name].append(found)
    return [{"variant": name, "runs": runs[name], **medians(runs[name])} for name in names]


def medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Of each figure of several runs."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def show_counts(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Print the first table."""
    title = f"{args.requests} requests at once, {args.images} images each, a pool of {args.blocks} blocks"
    headings = ("variant", "vision KV kept", "running, mean", "x off", "most", "steps", "x off", "preempted", "right")
    table = measuring.table(title, headings)
    first = results[0]
    for row in results:
        kept = "-" if row["retention"] is None else f"{row['retention']:.2f}"
        running = (f"{row['running_mean']:.2f}", f"{row['running_mean'] / first['running_mean']:.2f}")
        steps = (str(row["steps"]), f"{row['steps'] / first['steps']:.2f}")
        right = f"{row['right']} of {row['questions']}" if "right" in row else "-"
        table.add_row(row["variant"], kept, *running, str(row["running_most"]), *steps, str(row["preempted"]), right)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def show_load(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Print the second table."""
    title = f"{args.requests} clients at once over HTTP, medians of {args.rounds} runs in turns"
    headings = ("variant", "answers/s", "x off", "tokens/s", "x off", "first token, s", "per token, ms")
    table = measuring.table(title, headings)
    first = results[0]
    for row in results:
        rates = (
            f"{row[name]:.2f}" if ratio is None else f"{row[name] / first[name]:.2f}"
            for name in ("request_throughput", "output_throughput")
            for ratio in (None, 1)
        )
        table.add_row(row["variant"], *rates, f"{row['median_ttft_ms'] / 1000:.2f}", f"{row['median_tpot_ms']:.1f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
