# SPDX-License-Identifier: Apache-2.0
"""``plphp estimate``: KV bytes, largest batch, least time of a step and of a first token, before and after pruning."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from plphp.errors import ConfigError
from plphp.settings.config import PLPHPConfig
from plphp.settings.ladder import LADDERS
from plphp.studies.accelerators import ACCELERATORS, Accelerator, accelerator
from plphp.studies.schedule import Schedule

from ._app import app, console, print_json, progress
from ._checks import check_model
from ._options import DtypeOption, JsonOption, model_option, option

if TYPE_CHECKING:
    from plphp.studies.estimate import Estimate, Workload
    from plphp.studies.model_cost import ModelCost


RETENTION = 0.4
"""Of the estimate, where nothing else is asked for."""


def _number(text: str, **limits: Any) -> Any:
    return option(None, text, show_default=True, **limits)


GpuOption = Annotated[
    str | None,
    option(
        None,
        "Name, such as H100, or memory, bandwidth and peak: '24GB,1008GB/s,165TFLOP/s'; the peak may be left out.",
        complete=lambda: sorted(ACCELERATORS),
    ),
]


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
        float | None,
        option(None, f"Mean fraction of the vision tokens to keep; default {RETENTION}, 1 if tokens leave earlier."),
    ] = None,
    encoder_retention: Annotated[float, _number("Share of the vision tokens that comes to the text model.")] = 1.0,
    prefill: Annotated[
        str | None,
        option(None, "Layers from which on a share of those is left, such as 2:0.5 or 2:0.5,16:0.25."),
    ] = None,
    attention_retention: Annotated[
        float, _number("Share of the vision tokens of a layer among which it attends, and which it keeps, as zipvl.")
    ] = 1.0,
    tiers: Annotated[
        str | None,
        option(None, "Ladder that holds the vision tokens instead, such as t10.", complete=lambda: list(LADDERS)),
    ] = None,
    read: Annotated[float, _number("Share of the entries of the ladder that a step reads.")] = 1.0,
    gpu: GpuOption = None,
    reserve: Annotated[float, _number("Part of the memory to leave free.", min=0, max=0.99)] = 0.1,
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Work out from a model's configuration what pruning saves: bytes, sequences and time. Nothing is measured."""
    size = read_size(image_size)
    device = None if gpu is None else accelerator(gpu)
    schedule = Schedule.parse(prefill, encoder_retention, images, attention_retention)
    rate = _rate(target_retention, tiers, read, schedule)
    check_model(model, dtype)
    about = _read_model(model, dtype, images, size, tokens_per_image, quiet=as_json)
    from plphp.show.estimate_table import estimate_table
    from plphp.studies.estimate import Workload
    from plphp.studies.estimate import estimate as work_out

    cost, tower = about.cost, about.tower_flops
    workload = Workload(about.vision_tokens, text_tokens, new_tokens, batch)
    unpruned = work_out(cost, workload, 1.0, device, reserve, tower_flops=tower)
    pruned = work_out(
        cost, workload, rate, device, reserve, tiers=tiers, read=read, schedule=schedule, tower_flops=tower
    )
    if as_json:
        values = {**_about(model, about.dtype, device), "reserve": reserve}
        print_json({**values, **_figures(cost, workload, unpruned, pruned)})
    else:
        title = f"{about.vision_tokens} vision, {text_tokens} text and {new_tokens} new tokens, batch {batch}"
        console().print(estimate_table(title, unpruned, pruned))
        print(*_left_out(about, device, without_images=tokens_per_image is not None), sep="", end="")


@dataclass(frozen=True)
class _Model:
    """What is read of a model and its processor."""

    dtype: str
    cost: ModelCost
    vision_tokens: int
    tower_flops: int | None


def _read_model(
    model: str | None, dtype: str, images: int, size: tuple[int, int], tokens_per_image: int | None, quiet: bool
) -> _Model:
    with progress("loading plphp", quiet=quiet) as show:
        from plphp.inputs.loading import empty_model
        from plphp.studies.flops import tower_flops
        from plphp.studies.model_cost import model_cost

        show("reading the configuration")
        empty = empty_model(model, dtype)
        if tokens_per_image is not None:
            return _Model(str(empty.dtype), model_cost(empty), images * tokens_per_image, None)
        show("loading the processor")
        vision_tokens, inputs = _processed(model, empty.config, images, size)
        return _Model(str(empty.dtype), model_cost(empty), vision_tokens, tower_flops(empty, inputs))


def _left_out(about: _Model, device: Accelerator | None, without_images: bool) -> Iterator[str]:
    """What the figures are without, in lines."""
    if about.cost.experts:
        yield "All experts are counted as read in every step; a small batch reads fewer.\n"
    if about.tower_flops is None:
        why = "--tokens-per-image says nothing of its patches" if without_images else "it needs more than sizes"
        yield f"The vision tower is not counted: {why}.\n"
    if device is not None and device.flops is None:
        yield (
            f"The peak of {device.name} in bf16 is not known, and so no least time of a first token: give it behind "
            "memory and bandwidth, such as --gpu '24GB,1008GB/s,165TFLOP/s'.\n"
        )


def _rate(target_retention: float | None, tiers: str | None, read: float, schedule: Schedule) -> float:
    """The retention to work out, 1 with a ladder; refuses what is no retention, no ladder, and both."""
    PLPHPConfig(target_retention=target_retention, tiers=tiers, read=read)
    if tiers is not None:
        return 1.0
    if schedule.attention < 1:
        if target_retention is not None:
            raise ConfigError(
                f"--attention-retention {schedule.attention:g} says how much is kept, as well as what attends, and so "
                f"does --target-retention {target_retention:g}: leave that out, or name a ladder that holds the others."
            )
        return schedule.attention
    if target_retention is not None:
        return target_retention
    return 1.0 if schedule != Schedule(images=schedule.images) else RETENTION


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


def _processed(model: str | None, config: Any, images: int, size: tuple[int, int]) -> tuple[int, dict[str, Any]]:
    """Vision tokens that the model's processor makes of blank images of a size, and all that it makes of them."""
    from PIL import Image

    from plphp.errors import LoadError
    from plphp.inputs.loading import load_processor
    from plphp.inputs.prompt import build_inputs, count_vision_tokens

    try:
        processor = load_processor(model)
    except LoadError as error:
        raise LoadError(f"{error} With --tokens-per-image no processor is needed.") from error
    inputs = build_inputs(processor, "What is this?", images=[Image.new("RGB", size)] * images)
    return count_vision_tokens(config, inputs), inputs
