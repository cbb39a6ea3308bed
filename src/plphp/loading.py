# SPDX-License-Identifier: Apache-2.0
"""Load a model and its processor; every failure says in one line what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PretrainedConfig, PreTrainedModel

from .errors import BackendUnavailableError, ConfigError, LoadError, PLPHPError, one_line
from .registry import family_of

DTYPES = ("auto", "float32", "bfloat16", "float16")
BUNDLED = Path(str(resources.files("plphp"))) / "reference_model"


def bundled_model_path() -> Path:
    """Folder of the small model that ships with plphp.

    Raises
    ------
    LoadError
        If this installation lacks it.
    """
    if not (BUNDLED / "config.json").is_file():
        raise LoadError("This installation of plphp has no bundled model: name a model folder or a hub id.")
    return BUNDLED


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
        If it cannot be pruned.
    """
    source = _source(name_or_folder)
    with _explained(source):
        values: dict[str, Any] = PretrainedConfig.get_config_dict(source)[0]
    if not values.get("model_type"):
        raise LoadError(f"The config.json of {source} has no model_type: is it a transformers model?")
    family_of(PretrainedConfig.from_dict({"model_type": values["model_type"]}))
    return values


def load_processor(name_or_folder: str | Path | None = None) -> Any:
    """Load the processor of a model that plphp can prune, see `load_model`."""
    read_model_config(name_or_folder)
    source = _source(name_or_folder)
    with _explained(source):
        return AutoProcessor.from_pretrained(source)


def empty_model(name_or_folder: str | Path | None = None, dtype: str = "auto") -> PreTrainedModel:
    """Make a model that plphp can prune without its weights, on the ``meta`` device, where tensors have shapes alone.

    Parameters
    ----------
    name_or_folder : str or Path, optional
        As for `load_model`; only the configuration is read.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        Of the weights; "auto" is what the configuration names.

    Raises
    ------
    LoadError, UnsupportedModelError, BackendUnavailableError
        See `load_model`.
    """
    _check_dtype(dtype)
    read_model_config(name_or_folder)
    source = _source(name_or_folder)
    with _explained(source):
        config = AutoConfig.from_pretrained(source)
        options = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, **options)
    return model.eval()


def load_weights(
    name_or_folder: str | Path | None = None, dtype: str = "auto", device: str | None = None
) -> PreTrainedModel:
    """Load a model that plphp can prune, without its processor, see `load_model`."""
    _check_dtype(dtype)
    target = _device(device)
    read_model_config(name_or_folder)
    source = _source(name_or_folder)
    with _explained(source):
        pair: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, output_loading_info=True)
    model, loaded = pair
    missing = sorted(loaded["missing_keys"])
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
        Of the weights; "auto" is what the checkpoint was saved in.
    device : str, optional
        Default: the first CUDA device, or the CPU where there is none.

    Returns
    -------
    model : PreTrainedModel
        In evaluation mode.
    processor : ProcessorMixin

    Raises
    ------
    LoadError
        If there is no such model, it cannot be reached, or its files are broken.
    UnsupportedModelError
        If plphp cannot prune it; found out before any weights are read.
    BackendUnavailableError
        If the device or a package that the model needs is missing.
    """
    processor = load_processor(name_or_folder)
    return load_weights(name_or_folder, dtype, device), processor


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")


def _source(name_or_folder: str | Path | None) -> str:
    """The folder or hub id as text; what looks like a folder has to be one."""
    if name_or_folder is None:
        return str(bundled_model_path())
    text = str(name_or_folder)
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LoadError(f"The folder {text} holds no config.json: it is not a model in the hub's format.")
        return str(path)
    if path.exists():
        raise LoadError(f"{text} is a file: a model is a folder in the hub's format, or a hub id.")
    if text.startswith(("/", ".", "~")) or text.count("/") > 1 or not text:
        raise LoadError(f"There is no model folder {text!r}.")
    return text


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turn what transformers and the hub raise for a model that cannot be loaded into one line."""
    try:
        yield
    except PLPHPError:
        raise
    except ImportError as error:
        raise BackendUnavailableError(f"Loading {source} needs a package that is missing: {one_line(error)}") from error
    except Exception as error:  # broken files raise whatever their readers run into
        names = {type(cause).__name__ for cause in _causes(error)}
        if "GatedRepoError" in names:
            reason = "access to it is restricted: ask for it on the model's page, then log in (hf auth login)."
        elif "RepositoryNotFoundError" in names or "HFValidationError" in names:
            reason = "there is no such folder here and no such model on the hub."
        elif names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError"}:
            reason = "it is neither a folder here nor in the local cache, and the hub cannot be reached."
        else:
            reason = one_line(error)
        raise LoadError(f"Cannot load the model {source}: {reason}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise BackendUnavailableError(f"The device {name!r} cannot be used here: {one_line(error)}") from error
    return device
