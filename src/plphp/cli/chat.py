# SPDX-License-Identifier: Apache-2.0
"""``plphp chat``: a chat about images in the terminal, or from a file of questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from plphp.inputs.media import load_image
from plphp.inputs.sources import is_bundled
from plphp.settings.config import checked_mode

from ._app import app, progress
from ._chat_lines import ChatLines, Shown
from ._checks import check_model, check_out_file, check_text, sampling_options
from ._models import weights_of
from ._options import (
    AllowUrlsOption,
    ConfigFileOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    MethodOption,
    ModelOption,
    RetentionRateOption,
    TargetRetentionOption,
    decode_option,
    option,
)
from ._settings import read_settings

CHAT, GENERATION, OUTPUT = "Chat", "Generation", "Output"


@app.command()
def chat(
    model: ModelOption = None,
    image: Annotated[list[str] | None, option(CHAT, "Image of the first question; may be repeated.")] = None,
    system: Annotated[str | None, option(CHAT, "System message.")] = None,
    allow_urls: AllowUrlsOption = False,
    config: ConfigOption = None,
    config_file: ConfigFileOption = None,
    method: MethodOption = None,
    retention_rate: RetentionRateOption = None,
    target_retention: TargetRetentionOption = None,
    max_new_tokens: Annotated[int, option(GENERATION, "Length of the answers.", min=1, show_default=True)] = 128,
    temperature: Annotated[float | None, option(GENERATION, "Sample, with this temperature.")] = None,
    top_p: Annotated[float | None, option(GENERATION, "Sample from this share of the probability.")] = None,
    seed: Annotated[int | None, option(GENERATION, "Seed of the sampling.", min=0)] = None,
    decode: Annotated[str, decode_option(GENERATION)] = "eager",
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    report: Annotated[Path | None, option(OUTPUT, "Write what is held at the end to this JSON file.")] = None,
    as_json: Annotated[bool, option(OUTPUT, "Print a line of JSON for each answer.", "--json")] = False,
) -> None:
    """Chat about images with one pruned KV cache: every turn reads only what is new.

    A question a line, from the terminal or a pipe. /image PATH adds an image to the next question, /images shows what
    is held of each, /forget N and /restore N free an image and bring it back, /help names the commands, /quit ends.
    Ctrl-C ends an answer, which counts as far as it came.
    """
    settings = read_settings(config, config_file, method, retention_rate, target_retention, bundled=is_bundled(model))
    options = {"max_new_tokens": max_new_tokens, **sampling_options(temperature, top_p, seed)}
    checked_mode(decode)
    check_out_file(report, "report")
    check_text(system, "--system")
    images = [(source, load_image(source, allow_urls=allow_urls)) for source in image or ()]
    check_model(model, dtype, device)
    with progress("loading plphp", quiet=as_json) as show:
        from plphp.inputs.loading import decoder_layers, load_processor
        from plphp.methods.registry import chain_of

        show("loading the processor")
        processor = load_processor(model)
        chain = chain_of(settings, decoder_layers(model))  # refuses what does not fit the model, before its weights
    weights = weights_of(model, dtype, device, quiet=as_json)

    import torch

    from plphp.engines.hf.ongoing_chat import OngoingChat
    from plphp.engines.hf.session import prune

    torch.manual_seed(seed or 0)
    shown = Shown(as_json, "" if chain.own_bank is None else chain.own_bank.folder)
    with prune(weights, settings, decode=decode):
        lines = ChatLines(OngoingChat(weights, processor), processor, shown, options, allow_urls=allow_urls)
        lines.begin(system, images)
        lines.run()
        if report is not None and lines.answers:
            lines.chat.report().to_json(report)
