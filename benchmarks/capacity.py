# SPDX-License-Identifier: Apache-2.0
"""How many sequences fit into a memory, by allocating them: ``python benchmarks/capacity.py --memory 4``.

For each cache the largest batch is searched that can be filled, layer by layer, and decode a token of every sequence,
in so much memory beside the weights. On a GPU the allocator is limited, on a CPU the process (Linux). "worked out" is
what `plphp estimate` says of the same; of ladders, how often the bytes of one sequence go into the memory.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import decode
import measuring
import torch
from measuring import BASELINE
from rich.console import Console
from shapes import TEXT_TOKENS, build_model, twin
from transformers.cache_utils import Cache

from plphp.engines.hf.attachment import Lease
from plphp.errors import CacheMemoryError
from plphp.pruning.room import lacks_memory
from plphp.studies.compare import kv_bytes
from plphp.studies.model_cost import model_cost

ONEDNN = "could not create a primitive"
"""What oneDNN says where there is no memory for its workspace."""
MMAP_THRESHOLD = -3
"""`M_MMAP_THRESHOLD` of glibc's malloc.h."""


@contextmanager
def limited(memory: int, device: torch.device) -> Iterator[None]:
    """Let no more than ``memory`` bytes be allocated beside what is."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        share = (torch.cuda.memory_allocated(device) + memory) / total
        if share > 1:
            raise SystemExit(f"--memory {memory / 2**30:g} is more than the {total / 2**30:.0f} GiB of the GPU allow.")
        torch.cuda.set_per_process_memory_fraction(share, device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    status = dict(one.split(":", 1) for one in Path("/proc/self/status").read_text().splitlines())
    used = 1024 * int(status["VmData"].split()[0])
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + memory, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def fits(make_cache: Callable[[int], Cache], model: Any, batch: int, memory: int) -> bool:
    """Whether a batch can be filled, and decode a token, in ``memory`` bytes.

    What libraries allocate once for a batch, as oneDNN does for its primitives, is allocated before and does not count.
    """
    cache = None
    try:
        decode.stepper(model, decode.dynamic_cache(model, batch, 0), batch)()
        with limited(memory, model.device):
            cache = make_cache(batch)
            decode.stepper(model, cache, batch)()
    except CacheMemoryError:
        return False
    except RuntimeError as error:
        if not lacks_memory(error) and ONEDNN not in str(error):
            raise
        return False
    finally:
        del cache
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def largest(works: Callable[[int], bool]) -> int:
    """The largest number for which something works, where it works for all smaller ones: doubled, then halved."""
    low, high = 0, 1
    while works(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if works(middle) else (low, middle)
    return low


def main() -> None:
    """Search, print one table."""
    on_gpu = torch.cuda.is_available()
    parser = measuring.arguments(__doc__)
    parser.add_argument("--memory", type=float, default=64 if on_gpu else 2, help="GiB beside the weights")
    parser.add_argument("--vision-tokens", type=int, default=7000)
    parser.add_argument("--retention", type=float, nargs="+", default=[1.0, 0.6, 0.4, 0.2])
    parser.add_argument("--tiers", type=decode.Tiers.parse, nargs="*", default=decode.TIERS)
    args = parser.parse_args()

    if sys.platform == "linux":  # what is freed is to be given back: else it counts as used
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**16)
    device, vision, memory = torch.device(args.device), args.vision_tokens, int(args.memory * 2**30)
    stock = build_model(args.shape, getattr(torch, args.dtype), device)
    ours = twin(stock)
    lease, cost = Lease.of(ours), model_cost(stock)
    makers: dict[str, tuple[Any, int, Callable[[int], Cache]]] = {}

    def at(rate: float) -> int:
        return cost.kv_bytes(vision + TEXT_TOKENS + 1, vision, rate)

    makers[BASELINE] = stock, at(1.0), partial(decode.dynamic_cache, stock, vision=vision)
    for rate in args.retention:
        makers[f"plphp {rate:g}"] = ours, at(rate), partial(decode.pruned_cache, lease, vision=vision, rate=rate)
    for tiers in args.tiers:
        make = partial(decode.tiered_cache, lease, vision=vision, tiers=tiers)
        makers[tiers.name] = ours, kv_bytes(make(1)), make
    rows: list[dict[str, Any]] = []
    for name, (model, each, make_cache) in makers.items():
        found = largest(lambda batch, model=model, make=make_cache: fits(make, model, batch, memory))
        rows.append({"variant": name, "largest_batch": found, "worked_out": memory // each, "sequence_bytes": each})
    lease.end()

    title = f"{args.shape} shape, {args.dtype}, {vision} vision tokens in {args.memory:g} GiB of {device}"
    table = measuring.table(title, ("variant", "largest batch", "x DynamicCache", "worked out"))
    for row in rows:
        ratio = f"{row['largest_batch'] / rows[0]['largest_batch']:.2f}" if rows[0]["largest_batch"] else ""
        table.add_row(row["variant"], str(row["largest_batch"]), ratio, str(row["worked_out"]))
    Console(width=120).print(table)
    measuring.write(args.out, {**measuring.origin("capacity", args), "results": rows})


if __name__ == "__main__":
    main()
