# SPDX-License-Identifier: Apache-2.0
"""``plphp generate``: answer a prompt about images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plphp.errors import ConfigError
from plphp.inputs.chat import read_chat
from plphp.inputs.media import load_image, load_video
from plphp.inputs.sources import is_bundled
from plphp.settings.config import PLPHPConfig, checked_mode

from ._app import app, console, print_json, progress
from ._checks import check_in_file, check_model, check_out_file, check_text, sampling_options
from ._models import weights_of
from ._options import (
    ConfigFileOption,
    ConfigOption,
    JsonOption,
    MethodOption,
    RetentionRateOption,
    TargetRetentionOption,
    allow_urls_option,
    decode_option,
    device_option,
    dtype_option,
    model_option,
    option,
)
from ._settings import read_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from plphp.pruning.report import PruneReport

PROMPT, GENERATION, OUTPUT = "Prompt", "Generation", "Output"


@dataclass(frozen=True)
class _Request:
    """A prompt that is ready for the model, and how the model is to answer it."""

    processor: Any
    inputs: dict[str, Any]
    settings: PLPHPConfig
    decode: str
    options: dict[str, Any]
    seed: int


@app.command()
def generate(
    model: Annotated[str | None, model_option(PROMPT)] = None,
    image: Annotated[list[str] | None, option(PROMPT, "Image file, data: URI or base64; may be repeated.")] = None,
    video: Annotated[
        str | None, option(PROMPT, "Folder of frames, animated GIF or WebP; a video file needs PyAV.")
    ] = None,
    frames: Annotated[int, option(PROMPT, "Frames to take of a video; default 8.", min=1)] = 8,
    prompt: Annotated[str | None, option(PROMPT, "The question.")] = None,
    chat: Annotated[Path | None, option(PROMPT, "JSON file of messages, in the place of --prompt.")] = None,
    system: Annotated[str | None, option(PROMPT, "System message.")] = None,
    allow_urls: Annotated[bool, allow_urls_option(PROMPT)] = False,
    config: ConfigOption = None,
    config_file: ConfigFileOption = None,
    method: MethodOption = None,
    retention_rate: RetentionRateOption = None,
    target_retention: TargetRetentionOption = None,
    max_new_tokens: Annotated[int, option(GENERATION, "Length of the answer; default 128.", min=1)] = 128,
    temperature: Annotated[float | None, option(GENERATION, "Sample, with this temperature.")] = None,
    top_p: Annotated[float | None, option(GENERATION, "Sample from this share of the probability.")] = None,
    seed: Annotated[int | None, option(GENERATION, "Seed of the sampling.", min=0)] = None,
    num_beams: Annotated[int, option(GENERATION, "Beams; default 1.", min=1)] = 1,
    decode: Annotated[str, decode_option(GENERATION)] = "eager",
    dtype: Annotated[str, dtype_option(GENERATION)] = "auto",
    device: Annotated[str | None, device_option(GENERATION)] = None,
    compare: Annotated[bool, option(OUTPUT, "Show the unpruned answer beside.", "--compare")] = False,
    rounds: Annotated[int, option(OUTPUT, "Runs of each for --compare; default 3.", min=1)] = 3,
    report: Annotated[Path | None, option(OUTPUT, "Write what was kept to this JSON file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt about images, with a pruned KV cache.

    Without settings vision entries are held in few bits (c3; t10 with the bundled model), and with --method,
    --retention-rate or --target-retention they are evicted instead (but by quantized and none).
    """
    settings = read_settings(config, config_file, method, retention_rate, target_retention, bundled=is_bundled(model))
    options = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, **sampling_options(temperature, top_p, seed)}
    _check(prompt, chat, decode, report)
    messages = None if chat is None else read_chat(chat, allow_urls=allow_urls)
    images = [load_image(source, allow_urls=allow_urls) for source in image or ()]
    videos = [load_video(video, frames=frames)] if video is not None else []
    check_model(model, dtype, device)
    with progress("loading plphp", quiet=as_json) as show:
        from plphp.inputs.loading import decoder_layers, load_processor
        from plphp.inputs.prompt import build_inputs
        from plphp.methods.registry import chain_of

        show("loading the processor")
        processor = load_processor(model)
        inputs = build_inputs(
            processor, prompt, messages=messages, images=images, videos=videos, system=system, frames=frames
        )
        chain = chain_of(settings, decoder_layers(model))  # refuses what does not fit the model, before its weights
        if compare:
            chain.refuse_uncollected("A comparison")
    request = _Request(processor, inputs, settings, decode, options, seed or 0)
    weights = weights_of(model, dtype, device, quiet=as_json)
    pruned = _compare(weights, request, rounds, as_json) if compare else _answer(weights, request, as_json)
    if report is not None:
        pruned.to_json(report)


def _check(prompt: str | None, chat: Path | None, decode: str, report: Path | None) -> None:
    checked_mode(decode)
    check_out_file(report, "report")
    if (prompt is None) == (chat is None):
        raise ConfigError("Give either --prompt or --chat.")
    check_text(prompt, "--prompt")
    check_in_file(chat, "chat")


def _answer(model: PreTrainedModel, request: _Request, as_json: bool) -> PruneReport:
    import torch
    from transformers import TextStreamer

    from plphp.engines.hf.session import prune
    from plphp.inputs.prompt import on_device
    from plphp.methods.registry import chain_of
    from plphp.show.tables import collecting_line, report_values, summary

    processor, options = request.processor, request.options
    streams = not as_json and options["num_beams"] == 1
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
    torch.manual_seed(request.seed)
    with prune(model, request.settings, decode=request.decode) as run, torch.no_grad():
        output: Any = model.generate(**on_device(model, request.inputs), **options, streamer=streamer)
    tokens = output[0, request.inputs["input_ids"].shape[1] :].tolist()
    answer = processor.decode(tokens, skip_special_tokens=True).strip()
    if as_json:
        print_json({"answer": answer, "tokens": len(tokens), "report": report_values(run.report)})
        return run.report
    if not streams:
        print(answer)
    typer.echo(summary(run.report), err=True)
    wanted = chain_of(request.settings).own_bank
    if run.report.collecting is not None and wanted is not None:
        typer.echo(collecting_line(run.report.collecting, wanted.folder), err=True)
    return run.report


def _compare(model: PreTrainedModel, request: _Request, rounds: int, as_json: bool) -> PruneReport:
    from plphp.show.tables import comparison_table, comparison_values, layer_tables
    from plphp.studies.compare import compare

    with progress("comparing", quiet=as_json) as show:
        comparison = compare(
            model,
            request.processor,
            request.inputs,
            request.settings,
            rounds=rounds,
            seed=request.seed,
            decode=request.decode,
            progress=show,
            **request.options,
        )
    if as_json:
        print_json(comparison_values(comparison))
    else:
        console().print(comparison_table(comparison), *layer_tables(comparison.report))
    return comparison.report
