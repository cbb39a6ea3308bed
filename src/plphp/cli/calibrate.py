# SPDX-License-Identifier: Apache-2.0
"""``plphp calibrate``: thresholds of the layer classes from a few prompts, as a preset."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plphp.errors import ConfigError

from ._app import JsonOption, app, console, loading_bars, print_json, progress
from ._prompts import check_out_file, fitting_processor
from .generate import read_settings

if TYPE_CHECKING:
    from plphp.prompts_file import Prompt


@app.command()
def calibrate(
    prompts: Annotated[Path, typer.Option(help='JSON Lines: {"images": [paths], "question": text}, or "turns".')],
    out: Annotated[Path, typer.Option(help="TOML file to write the preset to.")],
    model: Annotated[str | None, typer.Option(help="Hub id or folder; default: the bundled model.")] = None,
    target_retention: Annotated[
        float | None,
        typer.Option(help="Mean fraction of vision tokens to keep; default 0.4.", show_default=False),
    ] = None,
    method: Annotated[str | None, typer.Option(help="Method with layer classes; default plphp.")] = None,
    config: Annotated[
        str | None, typer.Option(help="More settings, such as 'plphp:target_retention=0.4,query_rows=text'.")
    ] = None,
    holdout: Annotated[
        float, typer.Option(help="Fraction of the prompts that are not calibrated on, but measured.", min=0, max=0.9)
    ] = 0.3,
    seed: Annotated[int, typer.Option(help="Of the choice of these prompts.", min=0)] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Find thresholds that reach a retention on prompts like yours, and measure it on others."""
    settings = read_settings(config, None, method, None, target_retention)
    check_out_file(out, "preset")
    with progress("loading plphp", quiet=as_json) as tell:
        from plphp.calibration import calibrate as find_thresholds
        from plphp.calibration import check_calibratable, measure_retention
        from plphp.loading import load_weights
        from plphp.measurement_tables import class_table, retention_line
        from plphp.presets import write_preset
        from plphp.prompts_file import prompt_inputs, read_prompts
        from plphp.provenance import provenance

        check_calibratable(settings)
        used, held = split(read_prompts(prompts), holdout, seed)
        processor = fitting_processor(model, used, tell)
    with loading_bars(quiet=as_json):
        weights = load_weights(model, dtype, device)
    with progress(f"calibrating on {len(used)} prompt(s)", quiet=as_json) as tell:
        found = find_thresholds(weights, prompt_inputs(processor, used, weights.device), settings)
        measured = {}
        for name, some in (("calibration_prompts", used), ("held_out_prompts", held)):
            if some:
                tell(f"measuring on {len(some)} prompt(s)")
                measured[name] = measure_retention(weights, prompt_inputs(processor, some, weights.device), found)
    record = {
        **provenance(weights),
        "target_retention": settings.target_retention,
        **{name: one.summary() for name, one in measured.items()},
    }
    write_preset(out, found, record)
    if as_json:
        details = {name: one.to_dict() for name, one in measured.items()}
        print_json({"file": str(out), "config": found.to_dict(), "calibration": record, "measured": details})
        return
    console().print(class_table(list(measured.values())[-1]))
    print(f"attentive from {found.attentive_threshold:.4f}, indifferent below {found.indifferent_threshold:.4f}")
    for name, one in measured.items():
        print(f"{name.replace('_', ' ')}: {retention_line(one)}")
    print(out)


def split(prompts: list[Prompt], holdout: float, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Divide prompts at random into those to calibrate on and those to measure on, each in their order.

    Raises
    ------
    ConfigError
        If there are too few to hold any out.
    """
    if holdout == 0:
        return prompts, []
    if len(prompts) < 2:
        raise ConfigError("One prompt cannot be divided: give more, or --holdout 0 to measure on it, too.")
    count = min(len(prompts) - 1, max(1, round(holdout * len(prompts))))
    held = set(random.Random(seed).sample(range(len(prompts)), count))
    return [p for i, p in enumerate(prompts) if i not in held], [prompts[i] for i in sorted(held)]
