# SPDX-License-Identifier: Apache-2.0
"""``plphp serve``: an OpenAI-compatible server that prunes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Annotated

import typer

from plphp.inputs.sources import BUNDLED_NAME, is_bundled
from plphp.serving.options import Limits, Listening, images_per_prompt
from plphp.settings.config import PLPHPConfig, checked_mode

from ._app import app, progress
from ._checks import check_model
from ._engines import ENGINES, REQUESTS, SERVER, EngineCommand, check_all_read, check_engine, engine_for
from ._models import weights_of
from ._options import (
    MODEL_HELP,
    ConfigFileOption,
    ConfigOption,
    MethodOption,
    RetentionRateOption,
    TargetRetentionOption,
    allow_urls_option,
    argument,
    decode_option,
    device_option,
    dtype_option,
    option,
)
from ._settings import read_settings


@dataclass(frozen=True)
class _Model:
    """The model to serve, and how."""

    name: str | None
    served_name: str
    dtype: str
    device: str | None
    decode: str
    settings: PLPHPConfig


@app.command(cls=EngineCommand, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str | None, argument(MODEL_HELP)] = None,
    engine: Annotated[
        str, option(None, "What runs the model, default auto (vLLM where it is installed):", choices=ENGINES)
    ] = "auto",
    config: ConfigOption = None,
    config_file: ConfigFileOption = None,
    method: MethodOption = None,
    retention_rate: RetentionRateOption = None,
    target_retention: TargetRetentionOption = None,
    host: Annotated[str, option(SERVER, "Network interface; 0.0.0.0 for all.", show_default=True)] = "127.0.0.1",
    port: Annotated[int, option(SERVER, "TCP port.", min=0, max=65535, show_default=True)] = 8000,
    served_model_name: Annotated[
        str | None, option(SERVER, "What clients call the model; default: what it is called here.")
    ] = None,
    api_key: Annotated[str | None, option(SERVER, "Key that clients have to send.", envvar="PLPHP_API_KEY")] = None,
    decode: Annotated[str, decode_option(SERVER)] = "eager",
    dtype: Annotated[str, dtype_option(SERVER)] = "auto",
    device: Annotated[str | None, device_option(SERVER)] = None,
    max_model_len: Annotated[
        int | None, option(REQUESTS, "Tokens of a prompt and its answer; default: what the model knows.", min=1)
    ] = None,
    max_new_tokens: Annotated[
        int, option(REQUESTS, "Tokens of an answer.", min=1, show_default=True)
    ] = Limits.max_new_tokens,
    limit_mm_per_prompt: Annotated[
        str, option(REQUESTS, "Images of a request.", show_default=True)
    ] = f'{{"image": {Limits.max_images}}}',
    max_image_pixels: Annotated[
        int, option(REQUESTS, "Pixels of an image.", min=1, show_default=True)
    ] = Limits.max_image_pixels,
    max_body_bytes: Annotated[
        int, option(REQUESTS, "Bytes of a request, and of all that is fetched for it.", min=1, show_default=True)
    ] = Limits.max_body_bytes,
    max_queue: Annotated[
        int, option(REQUESTS, "Requests at once; further ones get a 503.", min=1, show_default=True)
    ] = Limits.max_queue,
    allow_urls: Annotated[bool, allow_urls_option(REQUESTS)] = False,
) -> None:
    """Serve a model with an API like OpenAI's, its vision tokens pruned in every request.

    With vLLM the blocks of its KV cache go back to the pool, and all other options are those of `vllm serve`.
    The engine transformers answers one request at a time, with every model and method, on any device.
    """
    values = (config, config_file, method, retention_rate, target_retention)
    if engine_for(engine) == "vllm":
        unnamed = config is None and config_file is None and method is None
        settings, for_bundled = (read_settings(*values, bundled=bundled, evicts=True) for bundled in (False, True))
        # Nobody has asked for ragged heads, which vLLM has no place for; whoever names the method is told so.
        _serve_with_vllm(
            settings,
            replace(for_bundled, heads="equal") if unnamed else for_bundled,
            # Where an option of vLLM comes first, typer has taken it for the model.
            [*([] if model is None else [model]), *context.args],
        )
        return
    settings = read_settings(*values, bundled=is_bundled(model))
    check_engine(engine)
    check_all_read([*([model] if model is not None and model.startswith("-") else []), *context.args])
    limits = Limits(
        max_model_len=max_model_len,
        max_new_tokens=max_new_tokens,
        max_images=images_per_prompt(limit_mm_per_prompt),
        max_image_pixels=max_image_pixels,
        max_body_bytes=max_body_bytes,
        max_queue=max_queue,
        allow_urls=allow_urls,
    )
    name = served_model_name or (BUNDLED_NAME if is_bundled(model) else str(model))
    served = _Model(model, name, dtype, device, checked_mode(decode), settings)
    _serve_with_transformers(served, limits, Listening(host, port, api_key))


def _serve_with_vllm(settings: PLPHPConfig, for_bundled: PLPHPConfig, options: list[str]) -> None:
    from plphp.engines.vllm.server import serve as run
    from plphp.engines.vllm.server import server_arguments

    run(server_arguments(settings, options, for_bundled=for_bundled))


def _serve_with_transformers(wanted: _Model, limits: Limits, listening: Listening) -> None:
    check_model(wanted.name, wanted.dtype, wanted.device)
    with progress("loading plphp") as show:
        from plphp.inputs.loading import decoder_layers, load_processor
        from plphp.methods.registry import chain_of
        from plphp.serving.served_model import ServedModel
        from plphp.serving.server import bound_socket
        from plphp.serving.server import serve as run

        socket = bound_socket(listening)
        show("loading the processor")
        processor = load_processor(wanted.name)
        chain_of(wanted.settings, decoder_layers(wanted.name))  # refuses what does not fit, before the weights
    weights = weights_of(wanted.name, wanted.dtype, wanted.device, quiet=False)
    served = ServedModel(weights, processor, wanted.settings, wanted.decode, limits)
    served.try_out()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s:     %(message)s")
    logging.getLogger("plphp").setLevel(logging.INFO)
    run(socket, served, wanted.served_name, listening.api_key)
