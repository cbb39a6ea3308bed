# SPDX-License-Identifier: Apache-2.0
"""``plphp eval``: score methods on tasks, at several retentions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from plphp.errors import ConfigError

from ._app import app, console, print_json
from ._app import quiet_libraries as _quiet_libraries
from ._options import JsonOption
from ._options import option as _option

if TYPE_CHECKING:
    from plphp.evaluation.runner import Progress

WHAT, DATA, HOW, OUTPUT = "What", "Data", "How", "Output"


@app.command("eval")
def evaluate_command(
    model: Annotated[str | None, _option(WHAT, "Hub id or folder; default: the bundled model.")] = None,
    methods: Annotated[
        list[str] | None,
        _option(WHAT, "Methods by commas, such as 'plphp,mine=plphp:query_rows=text,random,zero'; may be repeated."),
    ] = None,
    retention: Annotated[str | None, _option(WHAT, "Fractions of the vision tokens to keep, by commas.")] = None,
    tasks: Annotated[str | None, _option(WHAT, "Tasks or groups by commas; default: all that are scored.")] = None,
    split: Annotated[str, _option(WHAT, "dev (default) or test.")] = "dev",
    samples: Annotated[int, _option(WHAT, "Samples of each task; default 500.", min=1)] = 500,
    seed: Annotated[int, _option(WHAT, "Seed of the samples.", min=0)] = 0,
    data: Annotated[
        list[str] | None,
        _option(DATA, "A .jsonl file, a folder with metadata.jsonl, or a data set for the `datasets` library."),
    ] = None,
    metric: Annotated[str, _option(DATA, "Metric for --data; default exact_match.")] = "exact_match",
    prompts: Annotated[str | None, _option(DATA, "Prompts without answers, for --label-free.")] = None,
    label_free: Annotated[bool, _option(HOW, "Compare with the full cache, without answers.", "--label-free")] = False,
    mode: Annotated[str, _option(HOW, "auto (default), verify, decode or generate.")] = "auto",
    dtype: Annotated[str, _option(HOW, "auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, _option(HOW, "Default: a GPU if there is one.")] = None,
    workers: Annotated[int, _option(HOW, "Processes of one thread each; default 1.", min=1)] = 1,
    rows: Annotated[int, _option(HOW, "Variants whose caches are alive at a time; default 64.", min=1)] = 64,
    batch: Annotated[int, _option(HOW, "Samples in a batch, for --mode generate; default 8.", min=1)] = 8,
    max_new_tokens: Annotated[int | None, _option(HOW, "Longest answer.", min=1)] = None,
    out: Annotated[Path | None, _option(OUTPUT, "Folder for the results; an unfinished run goes on.")] = None,
    report: Annotated[Path | None, _option(OUTPUT, "Show the results in this folder again; nothing is run.")] = None,
    baseline: Annotated[str | None, _option(OUTPUT, "Method from which differences are given, too.")] = None,
    per_task: Annotated[bool, _option(OUTPUT, "Show each task beside the groups.", "--per-task")] = False,
    plots: Annotated[bool, _option(OUTPUT, "Draw score against KV into DIR/plots.", "--plots")] = False,
    results: Annotated[Path | None, _option(OUTPUT, "Write the figures, without samples, to this JSON file.")] = None,
    list_tasks: Annotated[bool, _option(OUTPUT, "List the built-in tasks.", "--list")] = False,
    as_json: JsonOption = False,
) -> None:
    """Score methods on tasks at equal measured KV, with intervals."""
    if sum((list_tasks, out is not None, report is not None)) != 1:
        raise ConfigError("Give one of --out DIR (run), --report DIR (show again) and --list (the tasks).")
    if list_tasks:
        _list(as_json)
        return
    from plphp.evaluation import EvalSettings, evaluate, save_score_plots, summarize, unfinished, write_results

    if plots:
        from plphp.plots import new_figure

        new_figure()  # says now, not after the run, that matplotlib is missing
    if report is not None:
        folder, metrics = report, summarize(report, baseline)
        missing = unfinished(report)
        if missing and not as_json:
            console().print(f"Not finished: {missing}.", highlight=False)
    else:
        assert out is not None
        given: dict[str, Any] = {
            "methods": None if methods is None else _methods(methods),
            "retention": None if retention is None else _numbers(retention),
            "tasks": None if tasks is None else _names(tasks),
        }
        settings = EvalSettings(
            model=model,
            data=tuple(data or ()),
            metric=metric,
            prompts=prompts,
            split=split,  # type: ignore[arg-type]
            samples=samples,
            seed=seed,
            mode="label-free" if label_free else mode,  # type: ignore[arg-type]
            dtype=dtype,
            device=device,
            rows=rows,
            batch=batch,
            max_new_tokens=max_new_tokens,
            **{name: value for name, value in given.items() if value is not None},
        )
        with _bar(quiet=as_json) as tell:
            metrics = evaluate(settings, out, workers=workers, baseline=baseline, progress=tell)
        folder = out
    files = [str(path) for path in save_score_plots(metrics, folder / "plots")] if plots else []
    if results is not None:
        write_results(folder, results, baseline)
    _show(metrics, per_task, files, as_json)


@contextmanager
def _bar(quiet: bool) -> Iterator[Progress]:
    """A progress bar over all samples on standard error, where it is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    _quiet_libraries()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True, quiet=quiet or not sys.stderr.isatty())) as bar:
        line = bar.add_task("loading the model", total=None)
        yield lambda task, done, total: bar.update(line, description=task, completed=done, total=total)


def _list(as_json: bool) -> None:
    from plphp.evaluation import available_tasks, task_table

    tasks = available_tasks().values()
    if as_json:
        names = ("name", "group", "metric", "chance", "scored", "summary")
        print_json([{name: getattr(task, name) for name in names} for task in tasks])
    else:
        console().print(task_table(tasks))


def _show(metrics: dict[str, Any], per_task: bool, files: list[str], as_json: bool) -> None:
    from plphp.evaluation import score_tables

    if as_json:
        print_json({**metrics, "plots": files})
        return
    out = console()
    for table in score_tables(metrics, per_task=per_task):
        out.print(table, "")
    for label, reason in metrics["refused"].items():
        out.print(f"{label} was left out: {reason}", markup=False)
    print("\n".join(files), end="\n" if files else "")


def _names(text: str) -> tuple[str, ...]:
    names = tuple(filter(None, (part.strip() for part in text.split(","))))
    if not names:
        raise ConfigError(f"Expected one or several, separated by commas, got {text!r}; leave the option out for all.")
    return names


def _methods(texts: list[str]) -> tuple[str, ...]:
    from plphp.evaluation import split_methods

    return tuple(split_methods(texts))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in _names(text))
    except ValueError:
        raise ConfigError(f"--retention must be numbers by commas, such as 0.5,0.25, got {text!r}.") from None
