# SPDX-License-Identifier: Apache-2.0
"""Tasks from the user's own data: a JSON Lines file, a folder with ``metadata.jsonl``, or what ``datasets`` loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from plphp.errors import LoadError

from .choices import Split
from .data_entry import Entry
from .data_lines import METADATA, read_lines
from .data_rows import read_rows
from .metrics import get_metric
from .task import Maker


@dataclass(frozen=True)
class DataTask:
    """Samples of a file or data set, with the attributes of a built-in task.

    Parameters
    ----------
    name, group, summary, metric, chance, scored
        See `plphp.evaluation.tasks.task.AnyTask`.
    makers : tuple of callable
        Make one sample each, in order: images are read when they are needed.
    several : bool
        Whether a sample has more than one accepted answer, so that no single text can be verified.
    """

    name: str
    group: str
    summary: str
    metric: str
    makers: tuple[Maker, ...] = field(repr=False)
    several: bool = False
    chance: float = 0.0
    scored: bool = True

    @property
    def verifiable(self) -> bool:
        """Whether one pass over a reference answer can say if greedy decoding would give it."""
        return get_metric(self.metric).verifiable and not self.several

    def sample_makers(self, split: Split, count: int, seed: int = 0) -> Sequence[Maker]:
        """Makers of the first ``count`` samples; the data has one split, and an order of its own."""
        return self.makers[:count]


def read_data(source: str, metric: str = "exact_match", *, allow_urls: bool = False) -> list[DataTask]:
    """Read tasks from a file, a folder or a data set.

    Parameters
    ----------
    source : str
        A ``.jsonl`` file, a folder with ``metadata.jsonl``, or what ``datasets.load_dataset`` takes (a hub name, a
        ``.parquet`` file, a folder of images) with options, as in
        ``"lmms-lab/ChartQA:split=test,question=question,answer=answer,image=image"``.

        A line of a file is an object with ``"images"`` (a list of what `plphp.inputs.media.load_image` takes, paths
        beside the file; ``"image"`` or ``"file_name"`` for one), ``"question"``, and ``"answer"`` (text) or
        ``"answers"`` (a list of accepted ones); or ``"turns"``, a list of ``{"question", "answer", "scored"}``, in the
        place of both. ``"id"``, ``"group"`` and ``"system"`` may be added. Each group is a task of its own.
    metric : str
        Name of the metric.
    allow_urls : bool
        Whether http and https addresses of images may be fetched, when a sample is made.

    Raises
    ------
    ConfigError
        If the metric, an option or a column is unknown.
    LoadError
        If it cannot be read, holds nothing, or a line is not as it has to be. An image that cannot be read raises it
        when its sample is made; the message names the line or row.
    BackendUnavailableError
        If the ``datasets`` library is needed and not installed.
    """
    get_metric(metric)
    path = Path(source)
    file = path / METADATA if path.is_dir() else path
    if file.is_file() and file.suffix == ".jsonl":
        return _tasks(path.stem, metric, read_lines(file, allow_urls), str(file))
    name, entries = read_rows(source, allow_urls)
    return _tasks(Path(name).stem, metric, entries, name)


def _tasks(name: str, metric: str, entries: Sequence[Entry], source: str) -> list[DataTask]:
    """Make a task of each group of entries."""
    if not entries:
        raise LoadError(f"{source} holds no samples.")
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.group, []).append(entry)
    _check_groups(groups, source)
    return [
        DataTask(
            name=name if len(groups) == 1 else f"{name}-{group}",
            group=group or "data",
            summary=f"{len(members)} samples of {source}",
            metric=metric,
            makers=tuple(entry.maker for entry in members),
            several=any(entry.several for entry in members),
        )
        for group, members in groups.items()
    ]


def _check_groups(groups: Mapping[str, object], source: str) -> None:
    for group in groups:
        if set(group) & set(r"/\:"):
            raise LoadError(
                f"{source}: the group {group!r} names files of its own, which may hold no / or \\ or colon."
            )
