# SPDX-License-Identifier: Apache-2.0
"""Files of the Hugging Face hub, and of folders in its layout; why one is not to be had is said in a line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plphp.errors import LoadError

from .quoting import one_line

FILE_ENDINGS = (".safetensors", ".toml")
"""What a repository is not called: a name that ends so is a file's."""


def is_hub_id(name: str) -> bool:
    """Return whether a name is that of a repository, ``owner/name``, and of nothing that is here."""
    like_an_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, flags=re.ASCII) is not None
    return like_an_id and not name.endswith(FILE_ENDINGS) and not Path(name).exists()


def file_of(source: str | Path, name: str, what: str, **download: Any) -> Path:
    """Return the path of a file of a folder, or of a repository of the hub, which is downloaded into its cache.

    Parameters
    ----------
    source : str or Path
        The folder or the repository, ``owner/name``.
    name : str
        The file.
    what : str
        What it holds, for messages: ``"settings"``.
    **download
        For a repository, arguments of ``huggingface_hub.hf_hub_download``.

    Raises
    ------
    LoadError
        If there is no such folder or repository, or it lacks the file, or cannot be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / name).is_file():
            raise LoadError(f"The folder {source} holds no {name}, so there are no {what} in it.")
        return folder / name
    if folder.exists():
        raise LoadError(f"{source} is a file: name the folder or the repository of the hub that holds {name}.")
    if not is_hub_id(str(source)):
        raise LoadError(
            f"There is no folder {str(source)!r}, and a repository of the hub is named like owner/name: {what} are "
            f"read from the file {name} of either."
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(source), name, **download))
    except Exception as error:  # the hub and the way to it fail in many ways
        reason = hub_reason(error, "repository") or one_line(error)
        raise LoadError(f"Cannot read {what} from {name} of {source}: {reason}") from error


def hub_reason(error: Exception, what: str) -> str | None:
    """Return why the hub, or the way to it, does not hand over a model or another repository.

    Parameters
    ----------
    error : Exception
        What ``huggingface_hub`` or transformers raised.
    what : str
        What was asked for: ``"model"``.

    Returns
    -------
    str or None
        A sentence; None for an error of another kind.
    """
    # By name, as the classes stand in packages that take long to import.
    names = {kind.__name__ for cause in _causes(error) for kind in type(cause).__mro__}
    if "GatedRepoError" in names:
        return f"access to it is restricted: ask for it on the {what}'s page, then log in (hf auth login)."
    if names & {"RepositoryNotFoundError", "HFValidationError"}:
        return f"there is no such folder here and no such {what} on the hub."
    if "RevisionNotFoundError" in names:
        return f"the {what} has no such revision."
    if "RemoteEntryNotFoundError" in names:
        return f"the {what} has no such file."
    if names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "TransportError", "ConnectionError", "TimeoutError"}:
        return "it is neither a folder here nor in the local cache, and the hub cannot be reached."
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
