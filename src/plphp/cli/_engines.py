# SPDX-License-Identifier: Apache-2.0
"""Which engine serves, and the options that ``plphp serve`` has with it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from typer.core import TyperCommand

from plphp.errors import BackendUnavailableError, ConfigError, did_you_mean

ENGINES = ("auto", "vllm", "transformers")
SERVER, REQUESTS = "Server (engine transformers)", "Limits of a request (engine transformers)"
PANELS = (SERVER, REQUESTS)
"""Parts of the help that are of the engine transformers alone: vLLM reads its own options by itself."""
PACKAGES = ("starlette", "uvicorn", "prometheus_client", "anyio")
"""What the extra ``serve`` brings."""


class EngineCommand(TyperCommand):
    """A command whose options are those of the engine that its command line names."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Find the engine first, as it says which options there are."""
        ctx.meta[__name__] = engine_for(_named(args))
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options of the engine."""
        params: list[Any] = super().get_params(ctx)
        if ctx.meta.get(__name__) != "vllm":
            return params
        return [param for param in params if getattr(param, "rich_help_panel", None) not in PANELS]


def engine_for(name: str) -> str:
    """Return ``name``, or for "auto" vLLM where it is installed, and transformers elsewhere."""
    if name != "auto":
        return name
    spec = find_spec("vllm")
    # Without an origin it is a mere folder of that name, on a path where Python looks for packages.
    return "transformers" if spec is None or spec.origin is None else "vllm"


def check_engine(name: str) -> None:
    """Refuse an engine that there is not, or for which packages are missing.

    Raises
    ------
    ConfigError
        If there is no such engine.
    BackendUnavailableError
        If the extra of the engine transformers is not installed. vLLM is asked for by its own module.
    """
    if name not in ENGINES:
        raise ConfigError(f"There is no engine {name!r}.{did_you_mean(name, ENGINES)}")
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if engine_for(name) == "transformers" and missing:
        vllm = "" if name == "transformers" else ", or with vLLM, which is not installed either: see docs/serving.md"
        raise BackendUnavailableError(
            f"plphp serve with the engine transformers needs {', '.join(missing)}: pip install 'plphp[serve]'{vllm}."
        )


def check_all_read(arguments: Sequence[str]) -> None:
    """Raise ConfigError for options that the engine transformers does not have."""
    if arguments:
        raise ConfigError(
            f"The engine transformers has no option {arguments[0]}: see plphp serve --engine transformers --help."
        )


def _named(args: Sequence[str]) -> str:
    """The engine that a command line names."""
    for index, argument in enumerate(args):
        if argument.startswith("--engine="):
            return argument.removeprefix("--engine=")
        if argument == "--engine" and index + 1 < len(args):
            return args[index + 1]
    return "auto"
