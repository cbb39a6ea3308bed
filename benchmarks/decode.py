# SPDX-License-Identifier: Apache-2.0
"""Time of a decoding step against the bytes that it has to read: ``python benchmarks/decode.py``.

Caches are filled with random keys and values, as if prompts of so many vision tokens and 100 text tokens had been read;
what is kept of them differs between layers and between the rows of a batch, as it does with plphp. Variants are
interleaved step by step in one process; figures are medians. The floor is the time in which the memory moves the
weights and the kept keys and values once at the bandwidth of a large copy, measured beforehand; reading alone may be
faster than copying, so that more than all of the floor can be reached. Entries in few bits are coded with random
codebooks, a ladder's shares in sum over the heads of a layer, and all layers and rows hold copies of the same codes; of
them the floor counts the bytes that one step was seen to read. On a GPU two more
are measured: transformers' StaticCache with a compiled model, and our steps replayed from a CUDA graph.
"""

from __future__ import annotations

import argparse
import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import codes
import measuring
import torch
from measuring import BASELINE
from rich.console import Console
from shapes import TEXT_TOKENS, build_model, twin
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers.cache_utils import Cache, DynamicCache, StaticCache

import plphp
from plphp.engines.hf.attachment import Lease
from plphp.engines.hf.cache_argument import passed
from plphp.engines.hf.graph import GraphedDecoding
from plphp.kernels.coded_attention import counting_reads
from plphp.kernels.coded_bytes import read_nbytes, row_nbytes
from plphp.pruning.placement import whole_or_dropped
from plphp.settings.ladder import Ladder
from plphp.show.tables import human_bytes
from plphp.studies.compare import kv_bytes
from plphp.studies.model_cost import model_cost

WARM_UP = 4
"""Steps that are not timed: with a graph the first is eager, the second captured, and it and the third compared."""

COMPILED = "StaticCache, compiled"


@dataclass(frozen=True)
class Tiers:
    """A ladder, and which share of the coded entries a step reads."""

    text: str
    ladder: Ladder
    read: float
    name: str

    def __str__(self) -> str:
        return self.text

    @classmethod
    def parse(cls, text: str) -> Tiers:
        """Read ``LADDER`` or ``LADDER:read=SHARE``."""
        ladder, _, read = text.partition(":read=")
        return cls(
            text, Ladder.parse(ladder), float(read or 1), f"{ladder}, read {float(read):.0%}" if read else ladder
        )


TIERS = [Tiers.parse(text) for text in ("t10", "t10:read=0.2", "c3")]
"""What is measured by default."""


def entries(model: LlavaForConditionalGeneration, batch: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random keys and values [batch, kv_heads, length, dim] of one layer, the same for every variant."""
    text = model.config.get_text_config()
    shape = (batch, text.num_key_value_heads, length, text.hidden_size // text.num_attention_heads)
    generator = torch.Generator(model.device).manual_seed(seed)
    keys, values = (torch.empty(shape, dtype=model.dtype, device=model.device) for _ in range(2))
    return keys.normal_(generator=generator), values.normal_(generator=generator)


def kept(rate: float, layer: int, layers: int, batch: int, heads: int, vision: int) -> Tensor:
    """Random entries to keep, bool [batch, heads, tokens]: layers take turns in keeping less, as many, and more."""
    spread = min(rate, 1 - rate, 0.3) if layer < layers // 3 * 3 else 0.0
    generator = torch.Generator().manual_seed(layer)
    keep = torch.ones(batch, heads, vision + TEXT_TOKENS, dtype=torch.bool)
    for row in range(batch):
        count = round((rate + spread * ((layer + row) % 3 - 1)) * vision)
        order = torch.rand(heads, vision, generator=generator).argsort(-1)
        keep[row, :, TEXT_TOKENS // 2 :][:, :vision].scatter_(1, order[:, count:], False)
    return keep


def dynamic_cache(model: LlavaForConditionalGeneration, batch: int, vision: int) -> Cache:
    """Transformers' own cache."""
    cache = DynamicCache(config=model.config.get_text_config())
    for number in range(len(cache.layers)):
        cache.update(*entries(model, batch, vision + TEXT_TOKENS, number), number)
    return cache


def static_cache(model: LlavaForConditionalGeneration, batch: int, vision: int, room: int) -> Cache:
    """Transformers' own cache of a fixed size, for compiled models."""
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=vision + TEXT_TOKENS + room)
    for number in range(len(cache.layers)):
        cache.update(*entries(model, batch, vision + TEXT_TOKENS, number), number)
    return cache


def pruned_cache(
    lease: Lease, batch: int, vision: int, rate: float, choose: Callable[..., Tensor] = kept
) -> plphp.PrunedCache:
    """Ours, at a retention rate, for the model of a lease; ``choose`` is asked for entries to keep as `kept` is."""
    model = lease.attachment.model
    cache = plphp.PrunedCache(lease.attachment, plphp.PLPHPConfig())
    for number, layer in enumerate(cache.layers):
        keys, values = entries(model, batch, vision + TEXT_TOKENS, number)
        layer.update(keys, values)
        keep = choose(rate, number, len(cache.layers), batch, keys.shape[1], vision)
        layer.compact(whole_or_dropped(keep.to(keys.device)))
    return cache


def is_vision(tokens: int) -> Tensor:
    """Which tokens of a prompt are vision tokens, bool [1, seq]: so many in the middle of the text."""
    mask = torch.zeros(1, tokens + TEXT_TOKENS, dtype=torch.bool)
    mask[:, TEXT_TOKENS // 2 :][:, :tokens] = True
    return mask


def tiered_cache(lease: Lease, batch: int, vision: int, tiers: Tiers) -> plphp.PrunedCache:
    """Ours, with the vision tokens on a ladder, for the model of a lease; all rows are copies of one that is coded."""
    model = lease.attachment.model
    cache = plphp.PrunedCache(lease.attachment, plphp.PLPHPConfig())
    states = entries(model, 1, vision + TEXT_TOKENS, 0)
    row = codes.coded_row(*states, is_vision(vision), tiers.ladder, tiers.read)
    for layer in cache.layers:
        codes.fill(layer, row, batch)
    return cache


def read_bytes(cache: Cache, step: Callable[[], Any]) -> int:
    """Bytes of a cache that a step reads, which is done for it."""
    blocks = [block for layer in cache.layers for block in getattr(layer, "coded", ())]
    if not any(block.recalls for block in blocks):
        return kv_bytes(cache)
    with counting_reads() as counts:
        step()
    unread = sum(
        row_nbytes(block, row) - read_nbytes(block, row, entries)
        for block, read in zip(blocks, counts, strict=True)
        for row, entries in enumerate(read.tolist())
    )
    return round(kv_bytes(cache) - unread)


def stepper(
    model: LlavaForConditionalGeneration, cache: Cache, batch: int, forward: Callable[..., Any] | None = None
) -> Callable[[], Any]:
    """Make a function that decodes one token of every row, with another forward than the model's if one is given."""
    tokens = torch.arange(batch, device=model.device)[:, None] % 400 + 10
    place = itertools.count(int(cache.get_seq_length()))

    @torch.inference_mode()
    def step() -> None:
        positions = torch.full_like(tokens, next(place))
        (forward or model)(input_ids=tokens, position_ids=positions, **passed(cache), use_cache=True)

    return step


@dataclass(frozen=True)
class Subject:
    """What is timed: a cache, a function that decodes one token with it, and the bytes that a step reads of it."""

    cache: Cache
    step: Callable[[], Any]
    read_bytes: int


def subjects(
    stock: LlavaForConditionalGeneration,
    lease: Lease,
    batch: int,
    vision: int,
    args: argparse.Namespace,
) -> dict[str, Callable[[], Subject]]:
    """What is compared, by name, each to be made when it is needed; the steps of eager decoding first."""
    ours = lease.attachment.model
    makers = {f"plphp {rate:g}": partial(pruned_cache, lease, batch, vision, rate) for rate in args.retention}
    makers |= {tiers.name: partial(tiered_cache, lease, batch, vision, tiers) for tiers in args.tiers}
    room = args.steps + WARM_UP + 1

    def dynamic() -> Subject:
        cache = dynamic_cache(stock, batch, vision)
        return Subject(cache, stepper(stock, cache, batch), kv_bytes(cache))

    def compiled() -> Subject:
        cache = static_cache(stock, batch, vision, room)
        step = stepper(stock, cache, batch, torch.compile(stock.forward, mode="reduce-overhead"))
        return Subject(cache, step, kv_bytes(cache))

    def eager(make_cache: Callable[[], Cache]) -> Subject:
        cache = make_cache()
        step = stepper(ours, cache, batch)
        return Subject(cache, step, read_bytes(cache, step))

    def graph(make_cache: Callable[[], Cache]) -> Subject:
        read = eager(make_cache).read_bytes
        cache = make_cache()
        step = stepper(ours, cache, batch, GraphedDecoding(cache, ours.forward, room, required=True))
        return Subject(cache, step, read)

    made: dict[str, Callable[[], Subject]] = {BASELINE: dynamic}
    made |= {name: partial(eager, make_cache) for name, make_cache in makers.items()}
    if args.compiled:
        made[COMPILED] = compiled
    if args.graphs:
        made |= {f"{name}, graph": partial(graph, make_cache) for name, make_cache in makers.items()}
    return made


def measure(
    stock: LlavaForConditionalGeneration,
    lease: Lease,
    batch: int,
    vision: int,
    args: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Time a step with every cache at one batch and length."""
    made = {name: make() for name, make in subjects(stock, lease, batch, vision, args).items()}
    times = measuring.interleaved(
        {name: subject.step for name, subject in made.items()}, stock.device, args.steps, WARM_UP
    )
    for name, subject in made.items():
        point = {"batch": batch, "vision_tokens": vision, "variant": name, "seconds": times[name]}
        yield {**point, "kv_bytes": kv_bytes(subject.cache), "read_bytes": subject.read_bytes}


def show(rows: list[dict[str, Any]], args: argparse.Namespace, weights: int, bandwidth: float) -> None:
    """Print the table."""
    title = f"Decoding, {args.shape} shape, {args.dtype}, {args.device}; one step, median of {args.steps}"
    headings = ("batch", "vision", "variant", "ms", "tokens/s", "KV", "read", "floor ms", "of floor", "x DynamicCache")
    table = measuring.table(title, headings)
    for row in rows:
        table.add_row(
            str(row["batch"]),
            str(row["vision_tokens"]),
            row["variant"],
            f"{1000 * row['seconds']:.1f}",
            f"{row['batch'] / row['seconds']:.1f}",
            human_bytes(row["kv_bytes"]),
            human_bytes(row["read_bytes"]),
            f"{1000 * row['floor_seconds']:.1f}",
            f"{row['floor_seconds'] / row['seconds']:.0%}",
            f"{row['ratio']:.2f}",
            end_section=row["variant"] == rows[-1]["variant"],
        )
    console = Console(width=120)
    console.print(table)
    console.print(f"{human_bytes(weights)} of weights are read in a step; a copy moves {bandwidth / 1e9:.1f} GB/s.")


def main() -> None:
    """Measure the grid, print one table."""
    on_gpu = torch.cuda.is_available()
    parser = measuring.arguments(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32] if on_gpu else [1, 8])
    parser.add_argument("--vision-tokens", type=int, nargs="+", default=[7000] if on_gpu else [2000, 8000])
    parser.add_argument("--retention", type=float, nargs="+", default=[1.0, 0.6, 0.4, 0.2])
    parser.add_argument("--tiers", type=Tiers.parse, nargs="*", default=TIERS, help="LADDER or LADDER:read=SHARE")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each variant")
    parser.add_argument(
        "--compiled", action=argparse.BooleanOptionalAction, default=on_gpu, help="also StaticCache, compiled"
    )
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=on_gpu, help="also CUDA graphs")
    args = parser.parse_args()
    if args.graphs and torch.device(args.device).type != "cuda":
        parser.error("--graphs needs --device cuda: a CPU has no CUDA graphs.")

    device = torch.device(args.device)
    stock = build_model(args.shape, getattr(torch, args.dtype), device)
    ours = twin(stock)
    lease = Lease.of(ours)
    bandwidth = measuring.copy_bandwidth(device)
    weights = model_cost(stock).step_weight_bytes
    rows = []
    for batch, vision in itertools.product(args.batch, args.vision_tokens):
        found = list(measure(stock, lease, batch, vision, args))
        for row in found:
            row["floor_seconds"] = (weights + row["read_bytes"]) / bandwidth
            row["ratio"] = found[0]["seconds"] / row["seconds"]
        rows += found
        gc.collect()
    lease.end()
    show(rows, args, weights, bandwidth)
    about = measuring.origin("decode", args)
    measuring.write(args.out, {**about, "copy_bandwidth": bandwidth, "step_weight_bytes": weights, "results": rows})


if __name__ == "__main__":
    main()
