# SPDX-License-Identifier: Apache-2.0
"""Tasks from the user's own data: a JSON Lines file, a folder with ``metadata.jsonl``, or what ``datasets`` loads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from plphp.errors import BackendUnavailableError, ConfigError, LoadError, PLPHPError, did_you_mean
from plphp.inputs.image_source import located_images
from plphp.inputs.media import load_image
from plphp.io.json_lines import read_entries
from plphp.io.quoting import one_line, quoted

from .metrics import get_metric
from .tasks import Sample, Turn

METADATA = "metadata.jsonl"
COLUMNS = {"image": "image", "question": "question", "answer": "answer", "split": "test", "name": "", "group": ""}
"""Options of a data set that the ``datasets`` library loads, with their defaults."""


@dataclass(frozen=True)
class DataSample(Sample):
    """A sample with several accepted answers to its last question.

    Parameters
    ----------
    accepted : tuple of str
        Any of them is right; the turn's own answer is the first.
    """

    accepted: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataTask:
    """Samples of a file or data set, with the attributes of a built-in task.

    Parameters
    ----------
    name, group, summary, metric : str
        As of a built-in `Task`.
    makers : tuple of callable
        Make one sample each, in order: images are read when they are needed.
    several : bool
        Whether a sample has more than one accepted answer, so that no single text can be verified.
    """

    name: str
    group: str
    summary: str
    metric: str
    makers: tuple[Callable[[], Sample], ...] = field(repr=False)
    several: bool = False
    chance: float = 0.0
    scored: bool = True

    def samples(self, split: str, count: int, seed: int = 0) -> Iterator[Sample]:
        """Yield the first ``count`` samples; the data has one split, and an order of its own."""
        return (make() for make in self.makers[:count])


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
        return _tasks(path.stem, metric, _refuse_if_none_is_there(list(_lines(file, allow_urls))), str(file))
    return _tasks(*_loaded(source, metric, allow_urls))


Entry = tuple[str, Callable[[], Sample], bool]
"""Group, maker, and whether there are several accepted answers."""


def _tasks(name: str, metric: str, entries: list[Entry], source: str) -> list[DataTask]:
    if not entries:
        raise LoadError(f"{source} holds no samples.")
    groups = list(dict.fromkeys(group for group, _, _ in entries))
    for group in groups:
        if set(group) & set(r"/\:"):
            raise LoadError(
                f"{source}: the group {group!r} names files of its own, which may hold no / or \\ or colon."
            )
    tasks = []
    for group in groups:
        mine = [(maker, several) for other, maker, several in entries if other == group]
        tasks.append(
            DataTask(
                name=name if len(groups) == 1 else f"{name}-{group}",
                group=group or "data",
                summary=f"{len(mine)} samples of {source}",
                metric=metric,
                makers=tuple(maker for maker, _ in mine),
                several=any(several for _, several in mine),
            )
        )
    return tasks


def _lines(file: Path, allow_urls: bool) -> Iterator[Entry]:
    for where, values in read_entries(file, "data"):
        if not isinstance(values, dict):
            raise LoadError(
                f'{where}: expected an object with "images", "question" and "answer", got {quoted(values)}.'
            )
        yield _entry(values, where, file, allow_urls)


def _entry(values: Mapping[str, Any], where: str, file: Path, allow_urls: bool) -> Entry:
    turns, accepted = _turns(values, where)
    group, several = str(values.get("group", "")), len(accepted) > 1
    try:
        images = located_images(values, folder=file.parent, allow_urls=allow_urls)
    except LoadError as error:  # one image that is not there costs one sample
        return group, partial(_fail, f"{where}: {error}"), several
    except PLPHPError as error:
        raise LoadError(f"{where}: {error}") from error
    if not images:
        raise LoadError(f'{where}: "images" is missing or empty: a list of image files, relative to the file.')
    default_id = f"{file.stem}-{where.rpartition(' ')[2]}"
    sample_id, system = str(values.get("id", default_id)), values.get("system")

    def make() -> Sample:
        return DataSample(sample_id, file.parent.name, _images(images, where), turns, system, accepted)

    return group, make, several


def _fail(message: str) -> Sample:
    """Stands in for the maker of a sample whose images are not there."""
    raise LoadError(message)


def _refuse_if_none_is_there(entries: list[Entry]) -> list[Entry]:
    """Raise before anything is run, as where the folder or a leave to fetch is wrong for all."""
    if entries and all(isinstance(maker, partial) and maker.func is _fail for _, maker, _ in entries):
        entries[0][1]()
    return entries


def _images(sources: Iterable[Any], where: str, **options: Any) -> tuple[Image.Image, ...]:
    try:
        return tuple(load_image(source, **options) for source in sources)
    except PLPHPError as error:
        raise LoadError(f"{where}: {error}") from error


def _turns(values: Mapping[str, Any], where: str) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """Turns of a line, and the accepted answers of its last one."""
    listed = values.get("turns")
    if listed is None:
        listed = [{key: values[key] for key in ("question", "answer", "answers") if key in values}]
    if not isinstance(listed, list) or not listed or not all(isinstance(turn, dict) for turn in listed):
        raise LoadError(
            f'{where}: "turns" must be a list of objects with "question" and "answer", got {quoted(listed)}.'
        )
    turns: list[Turn] = []
    accepted: tuple[str, ...] = ()
    for turn in listed:
        question = turn.get("question")
        if not isinstance(question, str) or not question.strip():
            raise LoadError(f'{where}: "question" must be text, got {quoted(question)}.')
        accepted = _accepted(turn.get("answers", turn.get("answer")), where)
        turns.append(Turn(question, accepted[0], bool(turn.get("scored", True))))
    return tuple(turns), accepted


def _accepted(given: Any, where: str) -> tuple[str, ...]:
    answers = [given] if isinstance(given, (str, int, float)) else list(given or [])
    texts = tuple(dict.fromkeys(str(answer).strip() for answer in answers))
    if not texts or not all(texts):
        raise LoadError(
            f'{where}: "answer" is missing or empty (got {quoted(given)}): a sample needs one to be scored.'
        )
    return texts


def _loaded(source: str, metric: str, allow_urls: bool) -> tuple[str, str, list[Entry], str]:
    """Entries of a data set that the ``datasets`` library loads."""
    name, options = _options(source)
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        if Path(name).suffix == ".jsonl" or name.startswith(("/", ".", "~")):
            raise LoadError(
                f"{source} is neither a .jsonl file nor a folder with {METADATA}; for anything else the `datasets` "
                "library is needed (pip install 'plphp[eval]')."
            ) from error
        raise BackendUnavailableError(
            f"Reading the data set {name!r} needs the `datasets` library: pip install 'plphp[eval]'. A .jsonl file or "
            f"a folder with {METADATA} needs nothing more."
        ) from error
    split = options["split"]
    try:
        if Path(name).is_file():
            # a file has no splits
            data = datasets.load_dataset(Path(name).suffix.lstrip("."), data_files=name, split="train")
        elif Path(name).is_dir():
            data = datasets.load_dataset("imagefolder", data_dir=name, split=split)
        else:
            data = datasets.load_dataset(name, options["name"] or None, split=split)
    except Exception as error:  # the library raises whatever its readers run into
        raise LoadError(f"Cannot load the data set {name!r}, split {split!r}: {one_line(error)}") from error
    known = data.column_names
    for column in (options["image"], options["question"], options["answer"], *filter(None, [options["group"]])):
        if column not in known:
            raise ConfigError(f"The data set {name!r} has no column {column!r}.{did_you_mean(column, known)}")
    wanted = [options[key] for key in ("question", "answer", "group") if options[key]]
    texts = data.select_columns(wanted)  # without reading the images
    stored = data.select_columns([options["image"]]).with_format("arrow")  # as in the file: plphp decodes the images
    reading = {"folder": _folder_of(name), "allow_urls": allow_urls}
    entries = [_row_entry(stored, row, texts[row], options, name, reading) for row in range(len(data))]
    return Path(name).stem, metric, entries, name


def _folder_of(name: str) -> Path | None:
    """Where the relative paths of a data set start; None for one of the hub."""
    path = Path(name)
    return path if path.is_dir() else path.parent if path.is_file() else None


def _options(source: str) -> tuple[str, dict[str, str]]:
    name, _, rest = source.partition(":")
    options = dict(COLUMNS)
    for part in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = part.partition("=")
        if not equals or key not in options:
            raise ConfigError(f"Unknown option {part!r} of the data set {name!r}.{did_you_mean(key, COLUMNS)}")
        options[key] = value
    return name, options


def _row_entry(
    stored: Any, row: int, texts: Mapping[str, Any], options: Mapping[str, str], name: str, reading: Mapping[str, Any]
) -> Entry:
    where = f"{name}, row {row}"
    turns, accepted = _turns({key: texts[options[key]] for key in ("question", "answer")}, where)
    group = str(texts[options["group"]]) if options["group"] else ""

    def make() -> Sample:
        try:
            cell = stored[row][options["image"]][0].as_py()
        except Exception as error:  # the library raises whatever its readers run into
            raise LoadError(f"{where}: cannot read the image: {one_line(error)}") from error
        images = _images(cell if isinstance(cell, (list, tuple)) else [cell], where, **reading)
        if not images:
            raise LoadError(f"{where}: no image in the column {options['image']!r}.")
        return DataSample(f"{row}", name, images, turns, None, accepted)

    return group, make, len(accepted) > 1
