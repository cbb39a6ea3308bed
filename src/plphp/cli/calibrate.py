# SPDX-License-Identifier: Apache-2.0
"""``plphp calibrate``: thresholds of the layer classes, or a schedule, from a few prompts, as a preset."""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from plphp.errors import ConfigError
from plphp.methods.registry import METHODS_BY_NAME

from ._app import app, console, print_json, progress
from ._checks import check_in_file, check_model, check_out_file
from ._models import processor_for_prompts, weights_of
from ._options import (
    AllowUrlsOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    PromptsOption,
    SeedOption,
    option,
)
from ._settings import read_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from plphp.inputs.prompts_file import Prompt
    from plphp.settings.config import PLPHPConfig
    from plphp.studies.calibration import RetentionMeasurement


@app.command()
def calibrate(
    prompts: PromptsOption,
    out: Annotated[Path, option(None, "TOML file to write the preset to.")],
    model: ModelOption = None,
    target_retention: Annotated[
        float | None, option(None, "Mean fraction of vision tokens to keep; default 0.4.")
    ] = None,
    method: Annotated[
        str | None,
        option(None, "Method with layer classes, default plphp, or g_search.", complete=METHODS_BY_NAME.names),
    ] = None,
    config: Annotated[
        str | None, option(None, "More settings, such as 'plphp:target_retention=0.4,query_rows=text'.")
    ] = None,
    holdout: Annotated[
        float, option(None, "Fraction of the prompts that are not calibrated on, but measured; default 0.3.")
    ] = 0.3,
    allow_urls: AllowUrlsOption = False,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find thresholds that reach a retention on prompts like yours, or a schedule, and measure it on others."""
    settings = read_settings(config, None, method, None, target_retention, evicts=True)
    check_holdout(holdout)
    check_in_file(prompts, "prompts")
    check_out_file(out, "preset")
    check_model(model, dtype, device)
    with progress("loading plphp", quiet=as_json) as show:
        from plphp.inputs.prompts_file import read_prompts
        from plphp.settings.presets import write_preset
        from plphp.studies.calibration import check_calibratable
        from plphp.studies.provenance import provenance

        check_calibratable(settings)
        used, held = split(read_prompts(prompts, allow_urls=allow_urls), holdout, seed)
        processor = processor_for_prompts(model, used, show)
    weights = weights_of(model, dtype, device, quiet=as_json)
    if not as_json:
        _note_on_search(settings, weights, len(used))
    calibrated, measured = _calibrated(weights, processor, used, held, settings, quiet=as_json)
    record = {
        **provenance(weights),
        "target_retention": settings.target_retention,
        **{name: measurement.summary() for name, measurement in measured.items()},
    }
    write_preset(out, calibrated, record)
    if as_json:
        details = {name: measurement.to_dict() for name, measurement in measured.items()}
        print_json({"file": str(out), "config": calibrated.to_dict(), "calibration": record, "measured": details})
    else:
        _show(calibrated, measured, out)


def _note_on_search(settings: PLPHPConfig, weights: PreTrainedModel, prompts: int) -> None:
    """Say on standard error what a search for a schedule takes, before it begins."""
    from plphp.methods.registry import resolve
    from plphp.studies.schedule_search import ANSWER, most_readings, searched_layers

    if resolve(settings).with_schedule is None:
        return
    layers = weights.config.get_text_config().num_hidden_layers
    print(
        f"searching at {len(searched_layers(settings, 1, layers))} of {layers} layers: each of {prompts} prompt(s) is "
        f"answered once and read at most {most_readings(settings, layers)} times, with {ANSWER} tokens of its answer",
        file=sys.stderr,
    )


def _calibrated(
    weights: PreTrainedModel,
    processor: Any,
    used: list[Prompt],
    held: list[Prompt],
    settings: PLPHPConfig,
    *,
    quiet: bool,
) -> tuple[PLPHPConfig, dict[str, RetentionMeasurement]]:
    """Calibrate on some prompts, and measure the retention on them and on those held out, if there are any."""
    from plphp.inputs.prompts_file import prompt_inputs
    from plphp.studies.calibration import calibrate as find_thresholds
    from plphp.studies.calibration import measure_retention

    with progress(f"calibrating on {len(used)} prompt(s)", quiet=quiet) as show:
        calibrated = find_thresholds(weights, prompt_inputs(processor, used, weights.device), settings)
        measured = {}
        for name, questions in (("calibration_prompts", used), ("held_out_prompts", held)):
            if questions:
                show(f"measuring on {len(questions)} prompt(s)")
                inputs = prompt_inputs(processor, questions, weights.device)
                measured[name] = measure_retention(weights, inputs, calibrated)
    return calibrated, measured


def _show(calibrated: PLPHPConfig, measured: dict[str, RetentionMeasurement], out: Path) -> None:
    from plphp.show.measurement_tables import class_table, retention_line

    console().print(class_table(list(measured.values())[-1]))
    schedule = calibrated.options.get("schedule")
    if schedule:
        print(f"schedule {schedule}")
    else:
        attentive, indifferent = calibrated.attentive_threshold, calibrated.indifferent_threshold
        print(f"attentive from {attentive:.4f}, indifferent below {indifferent:.4f}")
    for name, measurement in measured.items():
        print(f"{name.replace('_', ' ')}: {retention_line(measurement)}")
    print(out)


def check_holdout(holdout: float) -> None:
    """Raise ConfigError unless it is a fraction that leaves prompts to calibrate on."""
    if not (math.isfinite(holdout) and 0 <= holdout <= 0.9):
        raise ConfigError(f"--holdout must be between 0 and 0.9, got {holdout}.")


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
        raise ConfigError("A single prompt cannot be divided: give more, or --holdout 0 to measure on it, too.")
    count = min(len(prompts) - 1, max(1, round(holdout * len(prompts))))
    held = set(random.Random(seed).sample(range(len(prompts)), count))
    return [p for i, p in enumerate(prompts) if i not in held], [prompts[i] for i in sorted(held)]
