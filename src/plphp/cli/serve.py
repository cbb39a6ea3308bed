# SPDX-License-Identifier: Apache-2.0
"""``plphp serve``: an OpenAI-compatible server that prunes."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from ._app import app
from ._options import (
    MODEL_HELP,
    ConfigFileOption,
    ConfigOption,
    MethodOption,
    RetentionRateOption,
    TargetRetentionOption,
    argument,
)
from ._settings import read_settings


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str | None, argument(MODEL_HELP)] = None,
    config: ConfigOption = None,
    config_file: ConfigFileOption = None,
    method: MethodOption = None,
    retention_rate: RetentionRateOption = None,
    target_retention: TargetRetentionOption = None,
) -> None:
    """Serve a model with vLLM, whose KV cache blocks go back to the pool as vision tokens are pruned.

    All other options are those of `vllm serve`, such as --port 8000.
    """
    values = (config, config_file, method, retention_rate, target_retention)
    settings, for_bundled = (read_settings(*values, bundled=bundled, evicts=True) for bundled in (False, True))
    if config is None and config_file is None and method is None:
        # Nobody has asked for ragged heads, which vLLM has no place for; whoever names the method is told so.
        for_bundled = replace(for_bundled, heads="equal")
    from plphp.engines.vllm.server import serve as run
    from plphp.engines.vllm.server import server_arguments

    # Where an option of vLLM comes first, typer has taken it for the model.
    options = [*([] if model is None else [model]), *context.args]
    run(server_arguments(settings, options, for_bundled=for_bundled))
