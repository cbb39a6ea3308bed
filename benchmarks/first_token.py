# SPDX-License-Identifier: Apache-2.0
"""Time to the first token where vision tokens leave early: ``python benchmarks/first_token.py``.

Twice: the text model alone reads random embeddings, as they come from the projector; and the whole model reads images
through a vision tower of SigLIP so400m's shape, 729 tokens an image. Weights are random, so that methods choose by
noise; their time is what it is with any weights. Variants are interleaved; figures are medians, ratios are of
DynamicCache in the same run. Tokens are counted where the layers compute them, by hooks on their feed-forward parts.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import measuring
import prefill
import torch
from measuring import BASELINE
from rich.console import Console
from shapes import IMAGE, SO400M, TEXT_TOKENS, build_model
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from transformers.cache_utils import Cache, DynamicCache

import plphp
from plphp.engines.hf.cache_argument import passed

SHARES = (0.5, 0.25)
TOKENS_OF_IMAGE = 729
READ_THE_TOWER = ("vtc_cls", "visionzip")


def lines(layers: int, with_tower: bool) -> dict[str, str]:
    """Settings by the names of the variants."""
    made: dict[str, str] = {}
    for share in SHARES:
        for method in ("encoder_random", "divprune", *(READ_THE_TOWER if with_tower else ())):
            made[f"{method} {share:.0%}"] = f"{method}:retention_rate={share}"
        mean = (2 + (layers - 2) * share) / layers
        made[f"fastv layer 2, {share:.0%} behind it"] = f"fastv:layer=2,retention_rate={mean}"
        # All layers compute all tokens, so that their count is that of stock; attention is among so many of them.
        made[f"zipvl {share:.0%}"] = f"zipvl:retention_rate={share}"
    made["vtw, half of the layers"] = "vtw:retention_rate=0.5"
    made["divprune 50% + uniform 50%"] = "divprune:retention_rate=0.5+uniform:retention_rate=0.5"
    return made


def image_inputs(model: LlavaForConditionalGeneration, vision: int) -> tuple[dict[str, Tensor], Tensor]:
    """A prompt with as many images as hold about so many tokens, and which of its tokens are theirs."""
    images = max(1, round(vision / TOKENS_OF_IMAGE))
    ids = torch.full((1, images * TOKENS_OF_IMAGE + TEXT_TOKENS), 11, device=model.device)
    ids[:, TEXT_TOKENS // 2 :][:, : images * TOKENS_OF_IMAGE] = IMAGE
    pixels = torch.randn(images, 3, 378, 378, device=model.device).to(model.dtype)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return inputs, (ids == IMAGE).cpu()


@torch.inference_mode()
def first_token(
    model: LlavaForConditionalGeneration, inputs: Mapping[str, Tensor], make_cache: Callable[[], Cache]
) -> Tensor:
    """Read the prompt into a new cache; the first token of the answer."""
    cache = make_cache()
    recorded = getattr(cache, "tower_recorded", None)
    with recorded() if recorded is not None else torch.inference_mode():
        logits: Tensor = model(**inputs, **passed(cache), use_cache=True, logits_to_keep=1).logits
    return logits.argmax(-1)


@contextmanager
def counted(model: LlavaForConditionalGeneration) -> Iterator[list[int]]:
    """The tokens that each decoder layer computes while the context is open."""
    tokens: list[int] = []

    def note(module: Any, given: tuple[Tensor, ...], output: Any) -> None:
        tokens.append(given[0].shape[0] * given[0].shape[1])

    handles = [layer.mlp.register_forward_hook(note) for layer in model.get_decoder().layers]
    try:
        yield tokens
    finally:
        for handle in handles:
            handle.remove()


def measure(
    model: LlavaForConditionalGeneration, vision: int, with_tower: bool, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Every variant at one length."""
    inputs, is_vision = image_inputs(model, vision) if with_tower else prefill.make_inputs(model, 1, vision)
    mask = None if with_tower else is_vision
    made: dict[str, Callable[[], Cache]] = {BASELINE: lambda: DynamicCache(config=model.config.get_text_config())}
    for name, line in lines(len(model.get_decoder().layers), with_tower).items():
        config = plphp.PLPHPConfig.parse(line)
        made[name] = partial(plphp.PrunedCache.for_inputs, model, inputs, config, vision_mask=mask)
    works = {name: partial(first_token, model, inputs, make_cache) for name, make_cache in made.items()}
    computed = {}
    for name, work in works.items():
        with counted(model) as tokens:
            work()
        computed[name] = sum(tokens)
    times = measuring.interleaved(works, model.device, args.rounds, warm_up=1)
    return [
        {
            "with_tower": with_tower,
            "vision_tokens": int(is_vision.sum()),
            "variant": name,
            "seconds": times[name],
            "of_dynamic_cache": times[name] / times[BASELINE],
            "tokens_x_layers": computed[name],
            "computed_share": computed[name] / computed[BASELINE],
        }
        for name in works
    ]


def show(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print the table."""
    title = f"Time to the first token, {args.shape} shape, {args.dtype}, {args.device}; median of {args.rounds}"
    table = measuring.table(title, ("tower", "vision", "variant", "s", "of stock", "tokens x layers", "of all"))
    for row in rows:
        table.add_row(
            "yes" if row["with_tower"] else "no",
            str(row["vision_tokens"]),
            row["variant"],
            f"{row['seconds']:.3f}",
            f"{row['of_dynamic_cache']:.2f}",
            str(row["tokens_x_layers"]),
            f"{row['computed_share']:.2f}",
        )
    Console(width=120).print(table)


def main() -> None:
    """Measure the grid, print one table."""
    parser = measuring.arguments(__doc__)
    parser.add_argument("--vision-tokens", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--tower", choices=("both", "yes", "no"), default="both", help="with the vision tower")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    model = build_model(args.shape, getattr(torch, args.dtype), torch.device(args.device), SO400M)
    towers = {"both": (False, True), "yes": (True,), "no": (False,)}[args.tower]
    rows = [
        row
        for with_tower, vision in itertools.product(towers, args.vision_tokens)
        for row in measure(model, vision, with_tower, args)
    ]
    show(rows, args)
    measuring.write(args.out, {**measuring.origin("first_token", args), "results": rows})


if __name__ == "__main__":
    main()
