# SPDX-License-Identifier: Apache-2.0
"""``plphp estimate``: KV bytes, largest batch and least step time, before and after pruning."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

from plphp.errors import ConfigError
from plphp.settings.config import PLPHPConfig
from plphp.settings.ladder import LADDERS
from plphp.studies.accelerators import ACCELERATORS, Accelerator, accelerator

from ._app import app, console, print_json, progress
from ._checks import check_model
from ._options import DtypeOption, JsonOption, model_option, option

if TYPE_CHECKING:
    from plphp.studies.estimate import Estimate, Workload
    from plphp.studies.model_cost import ModelCost


RETENTION = 0.4
"""Of the estimate, where none is asked for."""


def _number(text: str, **limits: Any) -> Any:
    return option(None, text, show_default=True, **limits)


@app.command()
def estimate(
    model: Annotated[str | None, model_option(None, "--model", "--config")] = None,
    images: Annotated[int, _number("Images of each prompt.", min=1)] = 1,
    image_size: Annotated[str, _number("Width and height of an image in pixels.")] = "1024x1024",
    tokens_per_image: Annotated[
        int | None, option(None, "Vision tokens of an image; default: what the processor makes of it.", min=1)
    ] = None,
    text_tokens: Annotated[int, _number("Text tokens of each prompt.", min=0)] = 100,
    new_tokens: Annotated[int, _number("Tokens of each answer.", min=1)] = 256,
    batch: Annotated[int, _number("Sequences that are decoded together.", min=1)] = 1,
    target_retention: Annotated[
        float | None, option(None, f"Mean fraction of the vision tokens to keep; default {RETENTION}.")
    ] = None,
    tiers: Annotated[
        str | None,
        option(None, "Ladder that holds the vision tokens instead, such as t10.", complete=lambda: list(LADDERS)),
    ] = None,
    read: Annotated[float, _number("Share of the entries of the ladder that a step reads.")] = 1.0,
    gpu: Annotated[
        str | None,
        option(
            None, "Name, such as H100, or memory and bandwidth: '24GB,1008GB/s'.", complete=lambda: sorted(ACCELERATORS)
        ),
    ] = None,
    reserve: Annotated[float, _number("Part of the memory to leave free.", min=0, max=0.99)] = 0.1,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Work out from a model's configuration what pruning saves: bytes, sequences and time. Nothing is measured."""
    size = read_size(image_size)
    device = None if gpu is None else accelerator(gpu)
    rate = _rate(target_retention, tiers, read)
    check_model(model, dtype)
    with progress("loading plphp", quiet=as_json) as show:
        from plphp.inputs.loading import empty_model
        from plphp.show.tables import estimate_table
        from plphp.studies.estimate import Workload
        from plphp.studies.estimate import estimate as work_out
        from plphp.studies.model_cost import model_cost

        show("reading the configuration")
        empty = empty_model(model, dtype)
        if tokens_per_image is not None:
            vision_tokens = images * tokens_per_image
        else:
            show("loading the processor")
            vision_tokens = _count_vision_tokens(model, empty.config, images, size)
        cost = model_cost(empty)
    workload = Workload(vision_tokens, text_tokens, new_tokens, batch)
    unpruned = work_out(cost, workload, 1.0, device, reserve)
    pruned = work_out(cost, workload, rate, device, reserve, tiers=tiers, read=read)
    if as_json:
        about = _about(model, str(empty.dtype), device)
        print_json({**about, "reserve": reserve, **_figures(cost, workload, unpruned, pruned)})
        return
    title = f"{workload.vision_tokens} vision, {text_tokens} text and {new_tokens} new tokens, batch {batch}"
    console().print(estimate_table(title, unpruned, pruned))
    if cost.experts:
        print("All experts are counted as read in every step; a small batch reads fewer.")


def _rate(target_retention: float | None, tiers: str | None, read: float) -> float:
    """The retention to work out, 1 with a ladder; refuses what is no retention, no ladder, and both."""
    PLPHPConfig(target_retention=target_retention, tiers=tiers, read=read)
    if tiers is not None:
        return 1.0
    return RETENTION if target_retention is None else target_retention


def _about(model: str | None, dtype: str, device: Accelerator | None) -> dict[str, Any]:
    return {
        "model": model or "the bundled model",
        "dtype": dtype.removeprefix("torch."),
        "gpu": None if device is None else dataclasses.asdict(device),
    }


def _figures(cost: ModelCost, workload: Workload, unpruned: Estimate, pruned: Estimate) -> dict[str, Any]:
    return {
        "workload": dataclasses.asdict(workload),
        "weight_bytes": cost.weight_bytes,
        "step_weight_bytes": cost.step_weight_bytes,
        "mixture_of_experts": cost.experts,
        "unpruned": dataclasses.asdict(unpruned),
        "pruned": dataclasses.asdict(pruned),
    }


def read_size(text: str) -> tuple[int, int]:
    """Read width and height from a text such as "640x480".

    Raises
    ------
    ConfigError
        If the text is not of this form.
    """
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise ConfigError(f"An image size is WIDTHxHEIGHT in pixels, such as 1024x768, got {text!r}.")
    return int(width), int(height)


def _count_vision_tokens(model: str | None, config: Any, images: int, size: tuple[int, int]) -> int:
    """Vision tokens that the model's processor makes of blank images of a size."""
    from PIL import Image

    from plphp.errors import LoadError
    from plphp.inputs.loading import load_processor
    from plphp.inputs.prompt import build_inputs, count_vision_tokens

    try:
        processor = load_processor(model)
    except LoadError as error:
        raise LoadError(f"{error} With --tokens-per-image no processor is needed.") from error
    inputs = build_inputs(processor, "What is this?", images=[Image.new("RGB", size)] * images)
    return count_vision_tokens(config, inputs)
