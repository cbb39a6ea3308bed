# SPDX-License-Identifier: Apache-2.0
"""``plphp serve``: an OpenAI-compatible server that prunes."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from plphp.inputs.sources import BUNDLED_NAME, is_bundled
from plphp.serving.options import Limits, Listening, images_per_prompt
from plphp.settings.byte_counts import byte_count
from plphp.settings.config import PLPHPConfig, checked_mode

from . import _serving
from ._app import app
from ._engines import ENGINES, EngineCommand, check_all_read, check_engine, engine_for
from ._options import (
    MODEL_HELP,
    ConfigFileOption,
    ConfigOption,
    MethodOption,
    RetentionRateOption,
    TargetRetentionOption,
    argument,
    option,
)
from ._settings import read_settings

ENGINE_HELP = "What runs the model, default auto (vLLM where it is installed):"


@app.command(cls=EngineCommand, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str | None, argument(MODEL_HELP)] = None,
    engine: Annotated[str, option(None, ENGINE_HELP, choices=ENGINES)] = "auto",
    config: ConfigOption = None,
    config_file: ConfigFileOption = None,
    method: MethodOption = None,
    retention_rate: RetentionRateOption = None,
    target_retention: TargetRetentionOption = None,
    host: _serving.HostOption = Listening.host,
    port: _serving.PortOption = Listening.port,
    served_model_name: _serving.ServedModelNameOption = None,
    api_key: _serving.ApiKeyOption = None,
    decode: _serving.ServedDecodeOption = "eager",
    dtype: _serving.ServedDtypeOption = "auto",
    device: _serving.ServedDeviceOption = None,
    max_model_len: _serving.MaxModelLenOption = None,
    max_new_tokens: _serving.MaxNewTokensOption = Limits.max_new_tokens,
    limit_mm_per_prompt: _serving.ImagesOption = _serving.IMAGES,
    max_image_pixels: _serving.MaxImagePixelsOption = Limits.max_image_pixels,
    max_body_bytes: _serving.MaxBodyBytesOption = Limits.max_body_bytes,
    max_queue: _serving.MaxQueueOption = Limits.max_queue,
    conversations: _serving.ConversationsOption = Limits.conversations,
    conversation_bytes: _serving.ConversationBytesOption = _serving.CONVERSATION_BYTES,
    allow_urls: _serving.ServedUrlsOption = False,
) -> None:
    """Serve a model with an API like OpenAI's, its vision tokens pruned in every request.

    With vLLM the blocks of its KV cache go back to the pool, and all other options are those of `vllm serve`.
    The engine transformers answers one request at a time, with every model and method, on any device.
    """
    values = (config, config_file, method, retention_rate, target_retention)
    if engine_for(engine) == "vllm":
        settings, for_bundled = (read_settings(*values, bundled=bundled, evicts=True) for bundled in (False, True))
        if config is None and config_file is None and method is None:
            # Nobody has asked for ragged heads, which vLLM has no place for; whoever names the method is told so.
            for_bundled = replace(for_bundled, heads="equal")
        # Where an option of vLLM comes first, typer has taken it for the model.
        _serve_with_vllm(settings, for_bundled, [*([] if model is None else [model]), *context.args])
        return
    settings = read_settings(*values, bundled=is_bundled(model))
    check_engine(engine)
    check_all_read([*([model] if model is not None and model.startswith("-") else []), *context.args])
    images = images_per_prompt(limit_mm_per_prompt)
    numbers = (max_model_len, max_new_tokens, images, max_image_pixels, max_body_bytes, max_queue)
    name = served_model_name or (BUNDLED_NAME if is_bundled(model) else str(model))
    served = _serving.ModelToServe(model, name, dtype, device, checked_mode(decode), settings)
    held = {
        "conversations": conversations,
        "conversation_bytes": byte_count(conversation_bytes, "--conversation-bytes"),
    }
    limits = Limits(*numbers, allow_urls=allow_urls, **held)
    _serving.serve_with_transformers(served, limits, Listening(host, port, api_key))


def _serve_with_vllm(settings: PLPHPConfig, for_bundled: PLPHPConfig, options: list[str]) -> None:
    from plphp.engines.vllm.server import serve as run
    from plphp.engines.vllm.server import server_arguments

    run(server_arguments(settings, options, for_bundled=for_bundled))
