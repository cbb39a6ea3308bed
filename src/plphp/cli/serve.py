# SPDX-License-Identifier: Apache-2.0
"""``plphp serve``: an OpenAI-compatible server that prunes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._app import app
from .generate import PRUNING, _option, read_settings


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Hub id or folder.")],
    config: Annotated[str | None, _option(PRUNING, "Settings such as 'plphp:retention_rate=0.5'.")] = None,
    config_file: Annotated[Path | None, _option(PRUNING, "Settings as a TOML file.")] = None,
    method: Annotated[str | None, _option(PRUNING, "Method, see `plphp methods`.")] = None,
    retention_rate: Annotated[
        float | None, _option(PRUNING, "Fraction of vision tokens that a balanced layer keeps.")
    ] = None,
    target_retention: Annotated[
        float | None, _option(PRUNING, "Mean fraction of vision tokens kept over all layers; default 0.4.")
    ] = None,
) -> None:
    """Serve a model with vLLM, whose KV cache blocks go back to the pool as vision tokens are pruned.

    All other options are those of `vllm serve`, such as --port 8000.
    """
    settings = read_settings(config, config_file, method, retention_rate, target_retention)
    from plphp.vllm.server import serve as run
    from plphp.vllm.server import server_arguments

    run(server_arguments(model, settings, context.args))
