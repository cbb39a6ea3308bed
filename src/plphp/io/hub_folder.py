# SPDX-License-Identifier: Apache-2.0
"""What is kept as a folder in the hub's layout: written and read here, or on the Hugging Face hub.

The mixins of ``huggingface_hub`` set attributes on every object, which frozen dataclasses refuse.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

from plphp.errors import LoadError

from .card import MARK, Card, measured_rows
from .hub import file_of, hub_reason
from .quoting import one_line

Figures = Mapping[str, Any] | str | Path | None
"""What `plphp.io.card.measured_rows` takes."""


class HubFolder(ABC):
    """An object with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``."""

    HUB_FILE: ClassVar[str]
    """Name of the file that holds it."""
    HUB_CONTENT: ClassVar[str]
    """What the file holds, for messages."""

    @abstractmethod
    def _write_into(self, folder: Path) -> None:
        """Write the file, and those that it names, into a folder that is there."""

    @classmethod
    @abstractmethod
    def _read_from(cls, source: str | Path, file: Path, download: Mapping[str, Any]) -> Self:
        """Make the object of its file, which is of that folder or repository."""

    @abstractmethod
    def _card(self, model: str, data: str) -> Card:
        """The card without its figures."""

    def save_pretrained(self, folder: str | Path, *, model: str = "", data: str = "", figures: Figures = None) -> Path:
        """Write a folder in the hub's layout, with a card.

        Parameters
        ----------
        folder : str or Path
            It is made where it is missing. A README that plphp has not written is left as it is.
        model : str
            Hub id or name of the model that this is for; a query bank knows it.
        data : str
            Which kind of prompts it was made or measured with, in a few words for the card.
        figures : mapping, str or Path, optional
            What was measured with it, for the card: values by name, rows of values by name, a JSON file of either, or
            the folder of a run of ``plphp eval``. Without them the card says that there are none.

        Returns
        -------
        Path
            The folder.

        Raises
        ------
        ConfigError
            If it names something that is of use on this machine alone, or the figures are no table.
        LoadError
            If a file that it names, or that of the figures, cannot be read.
        """
        return self._saved(Path(folder), None, model, data, figures)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        model: str = "",
        data: str = "",
        figures: Figures = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
    ) -> str:
        """Write what `save_pretrained` writes to a repository of the hub, in a single commit.

        Parameters
        ----------
        repo_id : str
            The repository, ``owner/name``; it is made where it is missing. A card that plphp has not written, as in the
            repository of a model, is left as it is.
        model, data, figures
            See `save_pretrained`.
        private : bool, optional
            Whether a repository that is made is private; default: as the owner has set.
        token : str or bool, optional
            Access token; default: that of ``hf auth login``.
        revision : str, optional
            Branch; default: the main one.
        create_pr : bool
            Whether the commit becomes a pull request.
        commit_message : str, optional
            Default: what is uploaded, and by which version of plphp.

        Returns
        -------
        str
            Address of the commit, or of the pull request.

        Raises
        ------
        ConfigError
            See `save_pretrained`.
        LoadError
            See `save_pretrained`; or if the hub cannot be reached, or refuses the repository.
        """
        message = commit_message or f"Upload {self.HUB_CONTENT} of plphp"
        options = {"commit_message": message, "revision": revision, "create_pr": create_pr}
        with TemporaryDirectory() as made:
            folder = self._saved(Path(made), repo_id, model, data, figures)
            try:
                return _uploaded(folder, repo_id, private, token, options)
            except Exception as error:  # the hub and the way to it fail in many ways
                reason = hub_reason(error, "repository") or one_line(error)
                raise LoadError(f"Cannot upload {self.HUB_CONTENT} to {repo_id}: {reason}") from error

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Read what `save_pretrained` or `push_to_hub` has written.

        Parameters
        ----------
        name_or_folder : str or Path
            The folder, or the repository of the hub, ``owner/name``.
        revision : str, optional
            Branch, tag or commit of the repository; default: the main branch.
        token : str or bool, optional
            Access token; default: that of ``hf auth login``.
        cache_dir : str or Path, optional
            Where downloads are kept; default: the cache of the hub.
        local_files_only : bool
            Whether a repository is read from the cache alone.

        Raises
        ------
        LoadError
            If there is no such folder or repository, it lacks the file, or it cannot be reached.
        ConfigError
            If the file holds something else.
        """
        places = {"revision": revision, "token": token, "cache_dir": cache_dir}
        download = {**places, "local_files_only": local_files_only, "library_name": "plphp"}
        file = file_of(name_or_folder, cls.HUB_FILE, cls.HUB_CONTENT, **download)
        return cls._read_from(name_or_folder, file, download)

    def _saved(self, folder: Path, repository: str | None, model: str, data: str, figures: Figures) -> Path:
        rows = measured_rows(figures)
        card = self._card(model, data).measured(rows)
        folder.mkdir(parents=True, exist_ok=True)
        self._write_into(folder)
        card.write(folder, repository or folder.name)
        return folder


def _uploaded(
    folder: Path, repository: str, private: bool | None, token: str | bool | None, options: dict[str, Any]
) -> str:
    """Upload a folder to a repository, which is made where it is missing; the address of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="plphp")
    name = api.create_repo(repository, private=private, exist_ok=True).repo_id
    left = ["README.md"] if _has_own_card(api, name, options["revision"]) else None
    commit: Any = api.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=left, **options)
    return str(commit.pr_url if options["create_pr"] else commit.commit_url)


def _has_own_card(api: Any, repository: str, revision: str | None) -> bool:
    """Whether a repository has a card that plphp has not written."""
    if not api.file_exists(repository, "README.md", revision=revision):
        return False
    return MARK not in Path(api.hf_hub_download(repository, "README.md", revision=revision)).read_text(encoding="utf-8")
