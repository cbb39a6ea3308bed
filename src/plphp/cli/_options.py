# SPDX-License-Identifier: Apache-2.0
"""Options of the commands: help that is shown as it is written, choices that it names and the shell completes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from plphp.inputs.sources import DEVICES, DTYPES
from plphp.methods.registry import METHODS_BY_NAME
from plphp.settings.config import DECODE_MODES

PRUNING = "Pruning"
MODEL_HELP = "Hub id or folder; default: the bundled model, which knows drawn shapes, digits and printed codes alone."


def option(
    panel: str | None,
    text: str,
    *names: str,
    choices: Sequence[str] = (),
    complete: Callable[[], Sequence[str]] | None = None,
    show_default: bool = False,
    **limits: Any,
) -> Any:
    """Declare an option.

    Parameters
    ----------
    panel : str, optional
        Part of the help in which the option stands.
    text : str
        Help of the option, shown as it is: rich would take what stands in brackets for markup.
    *names : str
        Names of the option on the command line; default: the name of the parameter.
    choices : sequence of str
        Values, which the help names and the shell completes. Further values are for plphp to refuse, which says what
        was meant.
    complete : callable, optional
        Makes the values to complete when the shell asks; default: the choices.
    show_default : bool
        Whether the help names the default.
    **limits
        Further arguments of ``typer.Option``.
    """
    values = complete or (lambda: choices)
    if choices or complete is not None:
        limits["autocompletion"] = lambda incomplete: _completed(values(), incomplete)
    shown = f"{text} {_listed(choices)}." if choices else text
    return typer.Option(*names, help=escape(shown), rich_help_panel=panel, show_default=show_default, **limits)


def argument(text: str, **limits: Any) -> Any:
    """Declare an argument, whose help is shown as it is written."""
    return typer.Argument(help=escape(text), **limits)


def model_option(panel: str | None = None, *names: str) -> Any:
    """Declare the option that names the model."""
    return option(panel, MODEL_HELP, *names)


def dtype_option(panel: str | None = None) -> Any:
    """Declare the option that names the dtype of the weights."""
    return option(panel, "Dtype of the weights, default auto:", choices=DTYPES)


def device_option(panel: str | None = None) -> Any:
    """Declare the option that names the device."""
    return option(panel, "Device, such as cpu or cuda:1; default: a GPU, else the CPU.", complete=lambda: DEVICES)


def allow_urls_option(panel: str | None = None) -> Any:
    """Declare the option that lets images be fetched."""
    return option(panel, "Fetch images that are named by an http or https address.", "--allow-urls")


def decode_option(panel: str | None = None) -> Any:
    """Declare the option that says how decoding steps run."""
    text = "How decoding steps run, default eager (auto and graph replay a CUDA graph):"
    return option(panel, text, choices=DECODE_MODES)


def _completed(values: Sequence[str], incomplete: str) -> list[str]:
    """What an incomplete text may become; in a list by commas, its last item is completed."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{value}" for value in values if value.startswith(last)]


def _listed(choices: Sequence[str]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}"


ModelOption = Annotated[str | None, model_option()]
DtypeOption = Annotated[str, dtype_option()]
AllowUrlsOption = Annotated[bool, allow_urls_option()]
DeviceOption = Annotated[str | None, device_option()]
JsonOption = Annotated[bool, option(None, "Print a JSON document on standard output.", "--json")]
SeedOption = Annotated[int, option(None, "Seed of the random draw.", min=0, show_default=True)]
PromptsOption = Annotated[
    Path, option(None, 'JSON Lines: {"images": [paths], "question": text}, or "turns".', show_default=False)
]

ConfigOption = Annotated[str | None, option(PRUNING, "Settings such as 'plphp:retention_rate=0.5'.")]
ConfigFileOption = Annotated[Path | None, option(PRUNING, "Settings as a TOML file, or a folder or hub id.")]
MethodOption = Annotated[
    str | None,
    option(
        PRUNING,
        "Default of eviction: plphp, and query_bank with the bundled model. See `plphp methods`:",
        choices=METHODS_BY_NAME.file_names(),
        complete=METHODS_BY_NAME.names,
    ),
]
RetentionRateOption = Annotated[float | None, option(PRUNING, "Fraction of vision tokens that a balanced layer keeps.")]
TargetRetentionOption = Annotated[
    float | None, option(PRUNING, "Mean fraction of vision tokens kept over all layers; default of eviction: 0.4.")
]
