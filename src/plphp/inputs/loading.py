# SPDX-License-Identifier: Apache-2.0
"""Load a model and its processor; every failure says in a line what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PretrainedConfig, PreTrainedModel

from plphp.errors import BackendUnavailableError, LoadError
from plphp.families.registry import family_of
from plphp.io.quoting import one_line

from .sources import check_device_name, check_dtype, explained, model_source, reachable_source


def read_model_config(name_or_folder: str | Path | None = None) -> dict[str, Any]:
    """Read a model's ``config.json`` and refuse what plphp cannot prune, before anything large is read.

    Parameters
    ----------
    name_or_folder : str or Path, optional
        A folder in the hub's format or a hub id; default: the bundled model.

    Raises
    ------
    LoadError
        If there is no such model, or it cannot be reached.
    UnsupportedModelError
        If plphp cannot prune the model.
    """
    source = reachable_source(name_or_folder)
    with explained(source):
        values: dict[str, Any] = PretrainedConfig.get_config_dict(source)[0]
    if not values.get("model_type"):
        raise LoadError(f"The config.json of {source} has no model_type: is it a transformers model?")
    family_of(PretrainedConfig.from_dict({"model_type": values["model_type"]}))
    return values


def load_processor(name_or_folder: str | Path | None = None) -> Any:
    """Load the processor of a model that plphp can prune, see `load_model`."""
    read_model_config(name_or_folder)
    source = model_source(name_or_folder)
    with explained(source):
        return AutoProcessor.from_pretrained(source)


def decoder_layers(name_or_folder: str | Path | None = None) -> int:
    """Return the number of decoder layers of a model, by its configuration."""
    source = model_source(name_or_folder)
    with explained(source):
        config = AutoConfig.from_pretrained(source)
    return int(config.get_text_config(decoder=True).num_hidden_layers)


def empty_model(name_or_folder: str | Path | None = None, dtype: str = "auto") -> PreTrainedModel:
    """Make a model that plphp can prune without its weights, on the ``meta`` device, where tensors have shapes alone.

    Parameters
    ----------
    name_or_folder : str or Path, optional
        The model, as for `load_model`; only its configuration is read.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        Dtype of the weights; "auto" is what the configuration names.

    Raises
    ------
    LoadError, UnsupportedModelError, BackendUnavailableError
        See `load_model`.
    """
    check_dtype(dtype)
    read_model_config(name_or_folder)
    source = model_source(name_or_folder)
    with explained(source):
        config = AutoConfig.from_pretrained(source)
        options = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, **options)
    return model.eval()


def load_weights(
    name_or_folder: str | Path | None = None, dtype: str = "auto", device: str | None = None
) -> PreTrainedModel:
    """Load a model that plphp can prune, without its processor, see `load_model`."""
    check_dtype(dtype)
    target = _device(device)
    read_model_config(name_or_folder)
    source = model_source(name_or_folder)
    with explained(source):
        pair: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, output_loading_info=True)
    model, info = pair
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would fill them with random numbers
        raise LoadError(f"The weights of {source} are incomplete: {len(missing)} missing, such as {missing[0]!r}.")
    placed: PreTrainedModel = model.to(target).eval()
    return placed


def load_model(
    name_or_folder: str | Path | None = None, dtype: str = "auto", device: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """Load a model and its processor through transformers' Auto classes.

    Parameters
    ----------
    name_or_folder : str or Path, optional
        A folder in the hub's format or a hub id; default: the bundled model.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        Dtype of the weights; "auto" is what the checkpoint was saved in.
    device : str, optional
        Device of the weights; default: the first CUDA device, or the CPU where there is none.

    Returns
    -------
    model : PreTrainedModel
        The model in evaluation mode.
    processor : ProcessorMixin
        Its processor.

    Raises
    ------
    LoadError
        If there is no such model, it cannot be reached, or its files are broken.
    UnsupportedModelError
        If plphp cannot prune the model, which is checked before any weights are read.
    BackendUnavailableError
        If the device or a package that the model needs is missing.
    """
    processor = load_processor(name_or_folder)
    return load_weights(name_or_folder, dtype, device), processor


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_device_name(name)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise BackendUnavailableError(f"The device {name!r} cannot be used here: {one_line(error)}") from error
    return device
