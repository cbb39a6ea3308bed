# SPDX-License-Identifier: Apache-2.0
"""All that needs a GPU to be seen, within nine minutes: ``python benchmarks/on_gpu.py --out on_gpu.json``.

1. ``kernels``: every kernel against its reference, in every dtype and at head dimensions 64 and 128.
2. ``graphs``: steps that are replayed from a CUDA graph against eager ones of an equal cache.
3. ``decode``, ``prefill``, ``capacity``: as in ``decode.py``, ``prefill.py`` and ``capacity.py``, on models of random
   weights: whole entries, ladders, and DynamicCache.
4. ``stages``: a first token of the text model alone where vision tokens leave before it or inside prefill, or attention
   runs among some of them, as in ``first_token.py``.

Every part has a time to be done by, which is printed. What fails is named with its error, and what was not reached by
its name; results are written after every part. On a CPU it runs all but the graphs, to try the script: ``--shapes
tiny``.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import capacity
import codes
import decode
import first_token
import measuring
import prefill
import torch
from measuring import BASELINE
from rich.console import Console
from rich.table import Table
from shapes import TEXT_TOKENS, build_model, twin
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from plphp import PLPHPConfig, PrunedCache
from plphp.engines.hf.attachment import Lease
from plphp.engines.hf.cache_argument import passed
from plphp.engines.hf.graph import TOLERANCE, GraphedDecoding
from plphp.kernels import TRIALS, choice
from plphp.show.tables import human_bytes
from plphp.studies.compare import kv_bytes
from plphp.studies.doctor import diagnose
from plphp.studies.model_cost import model_cost

RETENTION = [1.0, 0.4]
SHARES = {"kernels": 0.1, "graphs": 0.1, "decode": 0.3, "prefill": 0.15, "stages": 0.2, "capacity": 0.15}
"""Shares of the time of the parts; what a part leaves over goes to those behind it."""
GRAPH_STEPS = 8
"""Steps that are compared; of the first replays the graph compares some itself."""


class OutOfTimeError(Exception):
    """The time of a part is up."""


class Part:
    """A part of the run: its rows, what failed, and what was not reached.

    Parameters
    ----------
    name : str
    seconds : float
        How long it may take.
    """

    def __init__(self, name: str, seconds: float) -> None:
        self.name = name
        self.rows: list[dict[str, Any]] = []
        self.failed: dict[str, str] = {}
        self.not_reached: list[str] = []
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def run(self, item: str, work: Callable[[], list[dict[str, Any]]]) -> None:
        """Do an item if there is time left, and take its rows."""
        left = self._end - time.monotonic()
        if left <= 0:
            self.not_reached.append(item)
            return
        try:
            with _alarm(left):
                self.rows += work()
        except OutOfTimeError:
            self.not_reached.append(item)
        except Exception as error:  # a failure is a result here
            self.failed[item] = _told(error)
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def to_dict(self) -> dict[str, Any]:
        """What was measured, what failed and what was not reached."""
        return {"results": self.rows, "failed": self.failed, "not_reached": self.not_reached}


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise `OutOfTimeError` in so many seconds, as soon as Python has a say."""

    def ring(*_: Any) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


class Model:
    """A model of random weights, and a twin of it that is attached."""

    def __init__(self, shape: str, args: argparse.Namespace) -> None:
        self.shape = shape
        self.stock = build_model(shape, getattr(torch, args.dtype), torch.device(args.device))
        self._attach()

    def _attach(self) -> None:
        self.ours = twin(self.stock)
        self.lease = Lease.of(self.ours)

    def again(self) -> Model:
        """The same with another twin."""
        other = Model.__new__(Model)
        other.shape, other.stock = self.shape, self.stock
        other._attach()
        return other

    def makers(self, vision: int, args: argparse.Namespace) -> dict[str, Callable[[int], Cache]]:
        """What makes our caches for a batch, by name."""
        made: dict[str, Callable[[int], Cache]] = {}
        for rate in RETENTION:
            made[f"plphp {rate:g}"] = partial(decode.pruned_cache, self.lease, vision=vision, rate=rate)
        for tiers in args.tiers:
            made[tiers.name] = partial(decode.tiered_cache, self.lease, vision=vision, tiers=tiers)
        return made


def kernels(part: Part, args: argparse.Namespace, model: Model) -> None:
    """Every kernel against its reference, and what plphp doctor says."""
    device = torch.device(args.device)
    for ((operation, language), trial), dtype, dim in itertools.product(TRIALS.items(), choice.TOLERANCE, (64, 128)):
        states = torch.empty(1, 1, 1, dim, dtype=dtype, device=device)
        if choice.UNSUPPORTED[language](states) is not None:  # plphp doctor says why
            continue
        short = str(dtype).removeprefix("torch.")

        def compare(trial: choice.Trial = trial, dtype: torch.dtype = dtype, dim: int = dim) -> list[dict[str, Any]]:
            bound = choice.TOLERANCE[dtype]
            difference = trial(device, (dtype, dtype), dim, dim)
            return [{"difference": difference, "bound": bound, "agrees": difference <= bound}]

        name = f"{operation}, {language}, {short}, {dim}"
        before = len(part.rows)
        part.run(name, compare)
        for row in part.rows[before:]:
            row["kernel"] = name

    def doctor() -> list[dict[str, Any]]:
        return [{"kernel": f"doctor: {c.name}", "agrees": c.ok, "detail": c.detail} for c in diagnose().kernels]

    part.run("doctor", doctor)


def graphs(part: Part, args: argparse.Namespace, model: Model) -> None:
    """Replayed steps against eager ones, each kind of cache with a twin of its own: a failure stays with a model."""
    if torch.device(args.device).type != "cuda":
        part.not_reached.append("graphs: a CPU has no CUDA graphs")
        return
    batch, vision = 2, min(args.vision_tokens, 1000)
    for name in model.makers(vision, args):
        part.run(name, partial(_graph_against_eager, name, batch, vision, args, model))


def _graph_against_eager(
    name: str, batch: int, vision: int, args: argparse.Namespace, model: Model
) -> list[dict[str, Any]]:
    own = model.again()
    try:
        make_cache = own.makers(vision, args)[name]
        caches = make_cache(batch), make_cache(batch)
        replayed: Any = GraphedDecoding(caches[1], own.ours.forward, GRAPH_STEPS + 1, required=True)
        tokens = torch.arange(batch, device=own.ours.device)[:, None] % 400 + 10
        largest = 0.0
        with torch.inference_mode():
            for step in range(GRAPH_STEPS):
                logits: list[Tensor] = []
                for forward, cache in zip((own.ours, replayed), caches, strict=True):
                    positions = torch.full_like(tokens, vision + TEXT_TOKENS + step)
                    options = {"input_ids": tokens, "position_ids": positions, "use_cache": True}
                    logits.append(forward(**options, **passed(cache)).logits.float())
                largest = max(largest, float((logits[1] - logits[0]).abs().max() / logits[0].abs().max()))
        bound = TOLERANCE[own.stock.dtype]
        return [{"kernel": f"graph: {name}", "difference": largest, "bound": bound, "agrees": largest <= bound}]
    finally:
        own.lease.end()


def decoding(part: Part, args: argparse.Namespace, model: Model) -> None:
    """Steps of every cache that can be made, in turn."""
    on_gpu = torch.device(args.device).type == "cuda"
    settings = argparse.Namespace(
        retention=RETENTION, tiers=args.tiers, steps=args.steps + decode.WARM_UP, compiled=False, graphs=on_gpu
    )
    bandwidth = measuring.copy_bandwidth(torch.device(args.device), 2**29 if on_gpu else 2**26)
    weights = model_cost(twin(model.stock)).step_weight_bytes

    def measure(batch: int) -> list[dict[str, Any]]:
        made: dict[str, decode.Subject] = {}
        for name, make in decode.subjects(model.stock, model.lease, batch, args.vision_tokens, settings).items():
            try:
                subject = make()
                for _ in range(decode.WARM_UP):  # a graph is captured and compared meanwhile
                    subject.step()
            except OutOfTimeError:
                raise
            except Exception as error:
                part.failed[f"{model.shape}, batch {batch}, {name}"] = _told(error)
            else:
                made[name] = subject
        steps = {name: subject.step for name, subject in made.items()}
        times = measuring.interleaved(steps, model.stock.device, args.steps, 1)
        point = {"shape": model.shape, "batch": batch, "vision_tokens": args.vision_tokens}
        rows: list[dict[str, Any]] = []
        for name, subject in made.items():
            row = {**point, "variant": name, "seconds": times[name], "kv_bytes": kv_bytes(subject.cache)}
            row["read_bytes"] = subject.read_bytes
            row["floor_seconds"] = (weights + subject.read_bytes) / bandwidth
            row["ratio"] = times[BASELINE] / times[name]
            rows.append(row)
        return rows

    for batch in args.batch:
        part.run(f"{model.shape}, batch {batch}", partial(measure, batch))


def prefilling(part: Part, args: argparse.Namespace, model: Model) -> None:
    """A prefill of one prompt into every cache, in turn."""
    inputs, is_vision = prefill.make_inputs(model.stock, 1, args.vision_tokens)
    ladders = list(dict.fromkeys(tiers.text.partition(":")[0] for tiers in args.tiers))

    def measure() -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            bank = codes.random_bank(model.ours, Path(folder) / "bank.safetensors")
            made = prefill.variants(model.ours, inputs, is_vision, RETENTION[1:], ladders, bank)
            return _prefills(part, args, model, inputs, made)

    part.run(model.shape, measure)


def stages(part: Part, args: argparse.Namespace, model: Model) -> None:
    """A prefill of one prompt, without a vision tower, by methods of the stages before the KV cache, in turn."""
    inputs, is_vision = prefill.make_inputs(model.stock, 1, args.vision_tokens)
    made: dict[str, Callable[[], Cache]] = {
        BASELINE: lambda: DynamicCache(config=model.stock.config.get_text_config()),
    }
    for name, line in first_token.lines(len(model.stock.get_decoder().layers), with_tower=False).items():
        settings = PLPHPConfig.parse(line)
        made[name] = partial(PrunedCache.for_inputs, model.ours, inputs, settings, vision_mask=is_vision)
    part.run(model.shape, partial(_prefills, part, args, model, inputs, made))


def _prefills(
    part: Part,
    args: argparse.Namespace,
    model: Model,
    inputs: dict[str, Tensor],
    made: dict[str, Callable[[], Cache]],
) -> list[dict[str, Any]]:
    """Prefills into every cache that can be filled, in turn."""
    works: dict[str, Callable[[], Any]] = {}
    for name, make_cache in made.items():
        used = model.stock if name == BASELINE else model.ours
        work = partial(prefill.prefill, used, inputs, make_cache)
        try:
            work()
        except OutOfTimeError:
            raise
        except Exception as error:
            part.failed[f"{model.shape}, {name}"] = _told(error)
        else:
            works[name] = work
    times = measuring.interleaved(works, model.stock.device, args.rounds, 1)
    return [
        {
            "shape": model.shape,
            "vision_tokens": args.vision_tokens,
            "variant": name,
            "seconds": times[name],
            "peak_bytes": measuring.peak_bytes(works[name], model.stock.device),
            "ratio": times[BASELINE] / times[name],
        }
        for name in works
    ]


def capacities(part: Part, args: argparse.Namespace, model: Model) -> None:
    """The largest batch of every cache in so much memory."""
    memory, vision = int(args.memory * 2**30), args.vision_tokens
    stock: Callable[[int], Cache] = partial(decode.dynamic_cache, model.stock, vision=vision)
    makers = {BASELINE: stock, **model.makers(vision, args)}

    def search(name: str) -> list[dict[str, Any]]:
        used = model.stock if name == BASELINE else model.ours
        found = capacity.largest(lambda batch: capacity.fits(makers[name], used, batch, memory))
        return [{"shape": model.shape, "variant": name, "memory": memory, "largest_batch": found}]

    for name in makers:
        part.run(f"{model.shape}, {name}", partial(search, name))


PARTS: dict[str, Callable[[Part, argparse.Namespace, Model], None]] = {
    "kernels": kernels,
    "graphs": graphs,
    "decode": decoding,
    "prefill": prefilling,
    "stages": stages,
    "capacity": capacities,
}
ONCE = ("kernels", "graphs")
"""Parts that need no model of every shape."""


def show(part: Part, console: Console) -> None:
    """Print a part."""
    if part.rows:
        names = list(dict.fromkeys(key for row in part.rows for key in row))
        table: Table = measuring.table(part.name, names)
        for row in part.rows:
            table.add_row(*(_cell(name, row.get(name, "")) for name in names))
        console.print(table)
    for name, error in part.failed.items():
        console.print(f"{part.name}, {name}, failed: {error}")
    if part.not_reached:
        console.print(f"{part.name}, not reached: {', '.join(part.not_reached)}")


def _cell(name: str, value: Any) -> str:
    if name.endswith("seconds"):
        return f"{1000 * value:.2f} ms"
    if name.endswith("bytes") or name == "memory":
        return human_bytes(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Run all parts, print a table of each."""
    on_gpu = torch.cuda.is_available()
    parser = measuring.arguments(__doc__)
    parser.add_argument(
        "--shapes", nargs="+", default=["0.5B", "7B"] if on_gpu else ["tiny"], help="instead of --shape"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=8.5, help="for everything")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32] if on_gpu else [1, 2])
    parser.add_argument("--vision-tokens", type=int, default=7000 if on_gpu else 500)
    parser.add_argument("--tiers", type=decode.Tiers.parse, nargs="*", default=decode.TIERS)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3, help="timed prefills")
    parser.add_argument("--memory", type=float, default=16 if on_gpu else 0.05, help="GiB for the part capacity")
    args = parser.parse_args()

    started, about = time.monotonic(), measuring.origin("on_gpu", args)
    console, done = Console(width=160), {}
    jobs = [(name, shape) for name in args.parts for shape in (args.shapes[:1] if name in ONCE else args.shapes)]
    models: dict[str, Model] = {}
    for number, (name, shape) in enumerate(jobs):
        left = 60 * args.minutes - (time.monotonic() - started)
        ahead = sum(SHARES[own] / sum(job[0] == own for job in jobs) for own, _ in jobs[number:])
        part = Part(f"{name}, {shape}", left * SHARES[name] / sum(job[0] == name for job in jobs) / ahead)
        console.print(f"{part.name}: {part.seconds:.0f} s of the {left:.0f} s that are left")
        if shape not in models:
            models[shape] = Model(shape, args)
        PARTS[name](part, args, models[shape])
        show(part, console)
        done[part.name] = part.to_dict()
        measuring.write(args.out, {**about, "seconds": time.monotonic() - started, "parts": done})
    for model in models.values():
        model.lease.end()


if __name__ == "__main__":
    main()
