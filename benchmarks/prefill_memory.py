# SPDX-License-Identifier: Apache-2.0
"""Memory during prefill: are the full keys and values of a layer freed as soon as it is compacted?

Every allocation of the run is read from the allocator: torch's CPU allocator events through the profiler, or CUDA's
allocator statistics. Nothing is computed from shapes. Run ``python benchmarks/prefill_memory.py``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import record_function
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.cache_utils import Cache, DynamicCache

import plphp
from plphp.engines.hf.cache_argument import passed
from plphp.extend import KVStage, Method, by_vision_attention, per_head, register_method

IMAGE = 1
HELD = Method(
    name="held-in-full",
    summary="plphp without a bound of what a layer can keep in the end",
    paper="arXiv:2502.14504",
    kv=KVStage(allocate=by_vision_attention, score=per_head, uses_class_rule=lambda config: True),
)
MARK = "layer-done"


def build_model(args: argparse.Namespace) -> LlavaForConditionalGeneration:
    """LLaVA with random weights; 336-pixel images of 14-pixel patches, 576 vision tokens each."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=512,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=65536,
    )
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
    dtype = getattr(torch, args.dtype)
    return LlavaForConditionalGeneration._from_config(config, dtype=dtype).to(args.device).eval()


def build_inputs(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """A prompt with ``--images`` images and 64 text tokens."""
    text = torch.arange(32) % 500 + 2
    ids = torch.cat([text, torch.full((576 * args.images,), IMAGE), text])[None]
    pixels = torch.rand(args.images, 3, 336, 336, dtype=getattr(torch, args.dtype))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {name: value.to(args.device) for name, value in inputs.items()}


def variants(model: Any, inputs: dict[str, Any]) -> dict[str, Callable[[], Cache | None]]:
    """What is compared, each with the cache that it prefills; `HELD` has to be registered."""

    def pruned(**settings: Any) -> Callable[[], Cache]:
        return lambda: plphp.PrunedCache.for_inputs(model, inputs, plphp.PLPHPConfig(**settings))

    return {
        "no cache (activations alone)": lambda: None,
        "DynamicCache": lambda: DynamicCache(config=model.config.get_text_config()),
        "plphp uniform 0.4": pruned(method="uniform", retention_rate=0.4),
        "plphp uniform 0.2": pruned(method="uniform", retention_rate=0.2),
        "plphp 3 bits": pruned(method="quantized", tiers="c3"),
        "plphp target 0.4": pruned(target_retention=0.4),
        "plphp target 0.4, all layers held": pruned(method=HELD.name, target_retention=0.4),
    }


def run_cpu(prefill: Callable[[], None]) -> dict[str, Any]:
    """Peak of the live bytes, and the live bytes after each layer, from the allocator's events."""
    changes, marks = measuring.memory_events(prefill, MARK)
    live = peak = 0
    after_layer: list[int] = []
    for moment, change in changes:
        while len(after_layer) < len(marks) and marks[len(after_layer)] <= moment:
            after_layer.append(live)
        live += change
        peak = max(peak, live)
    after_layer += [live] * (len(marks) - len(after_layer))
    return {"peak": peak, "after_layer": after_layer}


def run_cuda(prefill: Callable[[], None]) -> dict[str, Any]:
    """The same from CUDA's allocator statistics."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _cuda_marks.clear()
    prefill()
    torch.cuda.synchronize()
    return {
        "peak": torch.cuda.max_memory_allocated() - before,
        "after_layer": [mark - before for mark in _cuda_marks],
    }


_cuda_marks: list[int] = []


def mark_layer(*_: Any) -> None:
    """Forward hook of a decoder layer: note the moment (CPU) or the live bytes (CUDA)."""
    with record_function(MARK):
        if torch.cuda.is_available():
            _cuda_marks.append(torch.cuda.memory_allocated())


@torch.no_grad()
def measure(model: Any, inputs: dict[str, Any], make_cache: Callable[[], Cache | None]) -> dict[str, Any]:
    """Prefill once with a fresh cache."""
    cache = make_cache()

    def prefill() -> None:
        model(**inputs, **passed(cache), use_cache=cache is not None, logits_to_keep=1)

    started = time.perf_counter()
    result = (run_cuda if model.device.type == "cuda" else run_cpu)(prefill)
    result["seconds"] = time.perf_counter() - started
    if isinstance(cache, plphp.PrunedCache):
        result["layer_bytes"] = [layer.nbytes for layer in cache.layers]
        result["kv_bytes"] = cache.nbytes
    elif cache is not None:
        result["layer_bytes"] = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
        result["kv_bytes"] = sum(result["layer_bytes"])
    return result


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()

    register_method(HELD)
    model, inputs = build_model(args), build_inputs(args)
    for layer in model.get_decoder().layers:
        layer.register_forward_hook(mark_layer)
    measure(model, inputs, lambda: None)
    results = {name: measure(model, inputs, make) for name, make in variants(model, inputs).items()}

    activations = results["no cache (activations alone)"]["peak"]
    full_layer = results["DynamicCache"]["layer_bytes"][0]
    table = Table(title=f"Prefill of {inputs['input_ids'].shape[1]} tokens, {args.layers} layers, {args.dtype}")
    for name in ("variant", "peak MB", "above no cache MB", "KV after prefill MB", "KV / full"):
        table.add_column(name, justify="left" if name == "variant" else "right", no_wrap=name == "variant")
    full = results["DynamicCache"]["kv_bytes"]
    for name, one in results.items():
        kv = one.get("kv_bytes", 0)
        row = (one["peak"], one["peak"] - activations, kv)
        table.add_row(name, *(f"{value / 1e6:.1f}" for value in row), f"{kv / full:.2f}")
    console = Console()
    console.print(table)
    console.print(f"Keys and values of one full layer: {full_layer / 1e6:.1f} MB (part of the peak without a cache).")
    measuring.write(args.out, {**measuring.origin("prefill_memory", args), "results": results})


if __name__ == "__main__":
    main()
