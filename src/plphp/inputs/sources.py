# SPDX-License-Identifier: Apache-2.0
"""Where a model comes from, and what can be said against a name before torch is imported, which takes seconds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path

from plphp.errors import BackendUnavailableError, ConfigError, LoadError, PLPHPError, did_you_mean
from plphp.io.hub import hub_reason
from plphp.io.quoting import one_line

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "maia", "npu", "xla")
"""Kinds of devices that torch knows; installed packages may add more."""
BUNDLED = Path(__file__).parents[1] / "reference_model"
"""Folder of the small model that ships with plphp."""
BUNDLED_NAME = "bundled"
"""What clients of a server call it."""


def bundled_model_path() -> Path:
    """Return the folder of the small model that ships with plphp.

    Raises
    ------
    LoadError
        If this installation lacks the model.
    """
    if not (BUNDLED / "config.json").is_file():
        raise LoadError("This installation of plphp has no bundled model: name a model folder or a hub id.")
    return BUNDLED


def is_bundled(name_or_folder: str | Path | None) -> bool:
    """Return whether this names the bundled model, by default or by its folder."""
    return name_or_folder is None or Path(name_or_folder).expanduser().resolve() == BUNDLED.resolve()


def model_source(name_or_folder: str | Path | None) -> str:
    """Return the folder or hub id of a model as text, after a check of what looks like a folder.

    Raises
    ------
    LoadError
        If there is no such folder, or the folder holds no model.
    """
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
    if text.startswith(("/", ".", "~")) or text.count("/") > 1 or not text.strip():
        raise LoadError(f"There is no model folder {text!r}.")
    return text


def reachable_source(name_or_folder: str | Path | None) -> str:
    """Return the folder or hub id of a model as text, after a check that a hub id can be loaded.

    The hub is asked once for a model that is not in the local cache: transformers would ask again and again, for half
    a minute, before it says that the hub cannot be reached.

    Raises
    ------
    LoadError
        If there is no such model, access to it is restricted, or the hub cannot be reached.
    """
    source = model_source(name_or_folder)
    if Path(source).is_dir():
        return source
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(source, "config.json"), str):
            get_hf_file_metadata(hf_hub_url(source, "config.json"))
    except Exception as error:
        reason = hub_reason(error, "model")
        if reason is not None:  # transformers tries again on further errors, such as a busy hub, and may succeed
            raise LoadError(f"Cannot load the model {source}: {reason}") from error
    return source


def check_dtype(dtype: str) -> None:
    """Raise ConfigError for a dtype that models are not loaded in."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")


def check_device_name(device: str | None) -> None:
    """Raise BackendUnavailableError for a name that is no device on any machine; None is the default device."""
    if device is None:
        return
    kind, _, _ = device.partition(":")
    if not re.fullmatch(r"[a-z_0-9]+(:\d+)?", device) or (
        kind not in DEVICES and not entry_points(group="torch.backends")
    ):
        raise BackendUnavailableError(
            f"There is no device {device!r}: a device is named like cpu, cuda or cuda:1.{did_you_mean(kind, DEVICES)}"
        )


@contextmanager
def explained(source: str) -> Iterator[None]:
    """Turn what transformers and the hub raise for a model that cannot be loaded into an error of a line."""
    try:
        yield
    except PLPHPError:
        raise
    except ImportError as error:
        raise BackendUnavailableError(f"Loading {source} needs a package that is missing: {one_line(error)}") from error
    except Exception as error:  # broken files raise whatever their readers run into
        reason = hub_reason(error, "model") or one_line(error)
        raise LoadError(f"Cannot load the model {source}: {reason}") from error
