# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: where a figure comes from, the memory's bandwidth, and interleaved timing."""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table
from shapes import SHAPES
from torch.profiler import ProfilerActivity, profile

import plphp

BASELINE = "DynamicCache"
"""Transformers' own cache, which every variant is compared with."""


def arguments(description: str) -> argparse.ArgumentParser:
    """Make a parser with what every script asks for; the shape of the model is smaller where there is no GPU."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="7B" if on_gpu else "0.5B")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    return parser


def table(title: str, headings: Iterable[str]) -> Table:
    """Make an empty table of figures, with the names of variants to the left."""
    made = Table(title=title)
    for heading in headings:
        made.add_column(heading, justify="left" if heading == "variant" else "right")
    return made


def origin(script: str, args: argparse.Namespace) -> dict[str, Any]:
    """Describe where a file of results comes from, of a script's arguments; without ``device`` it ran on the CPU."""
    device = torch.device(getattr(args, "device", "cpu"))
    settings = json.loads(json.dumps({name: value for name, value in vars(args).items() if name != "out"}, default=str))
    return {
        "script": f"benchmarks/{script}.py",
        "date": datetime.date.today().isoformat(),
        "settings": settings,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
        "versions": {
            "plphp": plphp.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _cpu() -> str:
    """Name of the processor where the system tells it, the widest instructions that torch uses, and AMX."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    matrices = ", AMX" if any("amx_bf16" in line for line in lines) else ""
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}{matrices}"


def write(out: Path | None, results: Mapping[str, Any]) -> None:
    """Write results as JSON, if a file was asked for."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Time of one call, until the device is done."""
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def interleaved(
    works: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, warm_up: int = 2
) -> dict[str, float]:
    """Median seconds of each of several works, done in turn, so that a slow moment of the machine hits all alike."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(warm_up + rounds):
        for name, work in works.items():
            taken = seconds(work, device)
            if number >= warm_up:
                found[name].append(taken)
    return {name: statistics.median(times) for name, times in found.items()}


def copy_bandwidth(device: torch.device, size: int = 2**29, rounds: int = 9) -> float:
    """Bytes per second, read and written ones together, of a large copy: the median of several."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, device, rounds)
    return 2 * size / times["copy"]


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that are alive during one call above those before it, by the allocator's own account."""
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    changes, _ = memory_events(work)
    return max(itertools.accumulate((change for _, change in changes), initial=0))


def memory_events(work: Callable[[], Any], mark: str = "") -> tuple[list[tuple[int, int]], list[int]]:
    """What torch's CPU allocator did during one call.

    Returns
    -------
    tuple
        Moments with changes in bytes, in order; and the moments of the records named ``mark``.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return changes, [event.start_ns() for event in events if mark and event.name() == mark]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
