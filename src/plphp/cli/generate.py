# SPDX-License-Identifier: Apache-2.0
"""``plphp generate``: answer a prompt about images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plphp.config import PLPHPConfig, checked_mode
from plphp.errors import ConfigError

from ._app import JsonOption, app, console, loading_bars, print_json, progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from plphp.report import PruneReport

DEFAULT_TARGET = 0.4
"""Target retention where no rate is given: thresholds that fit any model and prompt are not to be had."""

PROMPT, PRUNING, GENERATION, OUTPUT = "Prompt", "Pruning", "Generation", "Output"


def _option(panel: str, text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, **limits)


ConfigOption = Annotated[str | None, _option(PRUNING, "Settings such as 'plphp:retention_rate=0.5'.")]
ConfigFileOption = Annotated[Path | None, _option(PRUNING, "Settings as a TOML file.")]
MethodOption = Annotated[str | None, _option(PRUNING, "Method, see `plphp methods`.")]
RetentionRateOption = Annotated[
    float | None, _option(PRUNING, "Fraction of vision tokens that a balanced layer keeps.")
]
TargetRetentionOption = Annotated[
    float | None, _option(PRUNING, "Mean fraction of vision tokens kept over all layers; default 0.4.")
]


@app.command()
def generate(
    model: Annotated[str | None, _option(PROMPT, "Hub id or folder; default: the bundled model.")] = None,
    image: Annotated[list[str] | None, _option(PROMPT, "Image file; may be repeated.")] = None,
    video: Annotated[
        str | None, _option(PROMPT, "Folder of frames, animated GIF or WebP; a video file needs PyAV.")
    ] = None,
    frames: Annotated[int, _option(PROMPT, "Frames to take of a video; default 8.", min=1)] = 8,
    prompt: Annotated[str | None, _option(PROMPT, "The question.")] = None,
    chat: Annotated[Path | None, _option(PROMPT, "JSON file of messages, in the place of --prompt.")] = None,
    system: Annotated[str | None, _option(PROMPT, "System message.")] = None,
    config: ConfigOption = None,
    config_file: ConfigFileOption = None,
    method: MethodOption = None,
    retention_rate: RetentionRateOption = None,
    target_retention: TargetRetentionOption = None,
    max_new_tokens: Annotated[int, _option(GENERATION, "Length of the answer; default 128.", min=1)] = 128,
    temperature: Annotated[float | None, _option(GENERATION, "Sample, with this temperature.")] = None,
    top_p: Annotated[float | None, _option(GENERATION, "Sample from this share of the probability.")] = None,
    seed: Annotated[int | None, _option(GENERATION, "Seed of the sampling.", min=0)] = None,
    num_beams: Annotated[int, _option(GENERATION, "Beams; default 1.", min=1)] = 1,
    decode: Annotated[
        str, _option(GENERATION, "eager, auto or graph: replay decoding steps from a CUDA graph; default eager.")
    ] = "eager",
    dtype: Annotated[str, _option(GENERATION, "auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, _option(GENERATION, "Default: a GPU if there is one.")] = None,
    compare: Annotated[bool, _option(OUTPUT, "Show the unpruned answer beside.", "--compare")] = False,
    rounds: Annotated[int, _option(OUTPUT, "Runs of each for --compare; default 3.", min=1)] = 3,
    report: Annotated[Path | None, _option(OUTPUT, "Write what was kept to this JSON file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt about images, with a pruned KV cache."""
    settings = read_settings(config, config_file, method, retention_rate, target_retention)
    checked_mode(decode)
    sampling = sampling_options(temperature, top_p, seed)
    options = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, **sampling}
    if report is not None and not report.parent.is_dir():
        raise ConfigError(f"There is no folder {report.parent} to write the report to.")
    if report is not None and report.is_dir():
        raise ConfigError(f"{report} is a folder: name the file to write the report to.")
    if (prompt is None) == (chat is None):
        raise ConfigError("Give either --prompt or --chat.")
    with progress("loading plphp", quiet=as_json) as tell:
        from plphp.loading import load_processor, load_weights
        from plphp.media import load_image, load_video
        from plphp.prompt import build_inputs, read_chat
        from plphp.registry import get_method

        get_method(settings.method)
        # Everything that can be wrong with the prompt comes before the weights, which may take minutes.
        messages = None if chat is None else read_chat(chat)
        images = [load_image(path) for path in image or ()]
        videos = [load_video(video, frames=frames)] if video is not None else []
        tell("loading the processor")
        processor = load_processor(model)
        inputs = build_inputs(processor, prompt, messages=messages, images=images, videos=videos, system=system)
    with loading_bars(quiet=as_json):
        weights = load_weights(model, dtype, device)
    action = _compare if compare else _answer
    extra = {"rounds": rounds} if compare else {}
    found = action(weights, processor, inputs, settings, decode, options, seed or 0, as_json, **extra)
    if report is not None:
        found.to_json(report)


def read_settings(
    config: str | None,
    config_file: Path | None,
    method: str | None,
    retention_rate: float | None,
    target_retention: float | None,
) -> PLPHPConfig:
    """Make the config of the options that set it, and refuse those that contradict each other."""
    single = {"method": method, "retention_rate": retention_rate, "target_retention": target_retention}
    given = {name: value for name, value in single.items() if value is not None}
    sources = [name for name, value in (("--config", config), ("--config-file", config_file)) if value is not None]
    sources += [f"--{name.replace('_', '-')}" for name in given]
    if (config is not None or config_file is not None) and len(sources) > 1:
        raise ConfigError(f"{' and '.join(sources)} contradict each other: give all settings in one of them.")
    if retention_rate is not None and target_retention is not None:
        raise ConfigError("--retention-rate and --target-retention contradict each other: give one of them.")
    if config is not None:
        return PLPHPConfig.parse(config)
    if config_file is not None:
        return PLPHPConfig.from_toml(config_file)
    if retention_rate is None:
        given.setdefault("target_retention", DEFAULT_TARGET)
    return PLPHPConfig.from_dict(given)


def sampling_options(temperature: float | None, top_p: float | None, seed: int | None) -> dict[str, Any]:
    """Arguments of ``generate`` for sampling; greedy search if nothing asks for it."""
    if temperature is None and top_p is None:
        if seed is not None:
            raise ConfigError("--seed is for sampling: give --temperature or --top-p with it.")
        return {"do_sample": False}
    if temperature is not None and not temperature > 0:
        raise ConfigError(f"--temperature must be above 0, got {temperature}: leave it out for greedy search.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"--top-p must be in (0, 1], got {top_p}.")
    return {"do_sample": True, "temperature": temperature or 1.0, "top_p": 1.0 if top_p is None else top_p}


def _answer(
    model: PreTrainedModel,
    processor: Any,
    inputs: dict[str, Any],
    settings: PLPHPConfig,
    decode: str,
    options: dict[str, Any],
    seed: int,
    as_json: bool,
) -> PruneReport:
    import torch
    from transformers import TextStreamer

    from plphp.session import prune
    from plphp.tables import report_values, summary

    streams = not as_json and options["num_beams"] == 1
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
    torch.manual_seed(seed)
    with prune(model, settings, decode=decode) as run, torch.no_grad():
        output: Any = model.generate(**_on_device(inputs, model), **options, streamer=streamer)
    tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
    answer = processor.decode(tokens, skip_special_tokens=True).strip()
    if as_json:
        print_json({"answer": answer, "tokens": len(tokens), "report": report_values(run.report)})
        return run.report
    if not streams:
        print(answer)
    typer.echo(summary(run.report), err=True)
    return run.report


def _compare(
    model: PreTrainedModel,
    processor: Any,
    inputs: dict[str, Any],
    settings: PLPHPConfig,
    decode: str,
    options: dict[str, Any],
    seed: int,
    as_json: bool,
    rounds: int,
) -> PruneReport:
    from plphp.compare import compare
    from plphp.tables import comparison_table, comparison_values, layer_tables

    with progress("comparing", quiet=as_json) as tell:
        found = compare(
            model, processor, inputs, settings, rounds=rounds, seed=seed, decode=decode, progress=tell, **options
        )
    if as_json:
        print_json(comparison_values(found))
    else:
        console().print(comparison_table(found), *layer_tables(found.report))
    return found.report


def _on_device(inputs: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    return {name: value.to(model.device) if hasattr(value, "to") else value for name, value in inputs.items()}
