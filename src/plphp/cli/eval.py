# SPDX-License-Identifier: Apache-2.0
"""``plphp eval``: score methods on tasks, at several retentions."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from plphp.errors import ConfigError
from plphp.evaluation.settings import MODES, EvalSettings
from plphp.evaluation.tasks.choices import SPLITS, check_choice
from plphp.evaluation.tasks.metrics import METRICS
from plphp.methods.registry import METHODS_BY_NAME

from ._app import app, console, note_on_bundled, print_json
from ._checks import check_model, check_out_file, check_out_folder
from ._eval_progress import shown_progress
from ._lists import names, retentions
from ._options import JsonOption, allow_urls_option, device_option, dtype_option, model_option, option

WHAT, DATA, HOW, OUTPUT = "What", "Data", "How", "Output"
WIDE = 1000
"""Columns where there is no terminal, which no table needs."""

ModelOption = Annotated[str | None, model_option(WHAT)]
MethodsOption = Annotated[
    list[str] | None,
    option(
        WHAT,
        "Methods by commas, with settings and labels: 'plphp,mine=random:seed=1'; may be repeated.",
        complete=METHODS_BY_NAME.names,
    ),
]
RetentionOption = Annotated[
    str | None, option(WHAT, "Mean fractions of the vision tokens to keep, by commas, such as 0.5,0.25.")
]
TasksOption = Annotated[str | None, option(WHAT, "Tasks or groups by commas; default: all that are scored.")]
SplitOption = Annotated[str, option(WHAT, "Split of the built-in tasks, default dev:", choices=SPLITS)]
SamplesOption = Annotated[int, option(WHAT, "Samples of each task; default 500.", min=1)]
SeedOption = Annotated[int, option(WHAT, "Seed of the samples; default 0.", min=0)]
DataOption = Annotated[
    list[str] | None,
    option(DATA, "A .jsonl file, a folder with metadata.jsonl, or a data set for the `datasets` library."),
]
MetricOption = Annotated[str, option(DATA, "Metric for --data, default exact_match:", choices=tuple(METRICS))]
PromptsOption = Annotated[str | None, option(DATA, "Prompts without answers, for --label-free.")]
UrlsOption = Annotated[bool, allow_urls_option(DATA)]
LabelFreeOption = Annotated[bool, option(HOW, "Compare with the full cache, without answers.", "--label-free")]
ModeOption = Annotated[str, option(HOW, "How samples are scored, default auto:", choices=MODES)]
DtypeOption = Annotated[str, dtype_option(HOW)]
DeviceOption = Annotated[str | None, device_option(HOW)]
WorkersOption = Annotated[int, option(HOW, "Processes of one thread each; default 1.", min=1)]
RowsOption = Annotated[int, option(HOW, "Variants whose caches are alive at a time; default 64.", min=1)]
BatchOption = Annotated[int, option(HOW, "Samples in a batch, for --mode generate; default 8.", min=1)]
LimitOption = Annotated[int | None, option(HOW, "Longest answer.", min=1)]
OutOption = Annotated[Path | None, option(OUTPUT, "Folder for the results; an unfinished run goes on.")]
ReportOption = Annotated[Path | None, option(OUTPUT, "Show the results in this folder again; nothing is run.")]
BaselineOption = Annotated[str | None, option(OUTPUT, "Method from which differences are given, too.")]
PerTaskOption = Annotated[bool, option(OUTPUT, "Show each task beside the groups.", "--per-task")]
PlotsOption = Annotated[bool, option(OUTPUT, "Draw score against KV into DIR/plots.", "--plots")]
ResultsOption = Annotated[Path | None, option(OUTPUT, "Write the figures, without samples, to this JSON file.")]
ListOption = Annotated[bool, option(OUTPUT, "List the built-in tasks.", "--list")]
QuietOption = Annotated[bool, option(OUTPUT, "Show no progress on standard error.", "--quiet")]


@app.command("eval")
def evaluate_command(
    model: ModelOption = None,
    methods: MethodsOption = None,
    target_retention: RetentionOption = None,
    tasks: TasksOption = None,
    split: SplitOption = "dev",
    samples: SamplesOption = 500,
    seed: SeedOption = 0,
    data: DataOption = None,
    metric: MetricOption = "exact_match",
    prompts: PromptsOption = None,
    allow_urls: UrlsOption = False,
    label_free: LabelFreeOption = False,
    mode: ModeOption = "auto",
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    workers: WorkersOption = 1,
    rows: RowsOption = 64,
    batch: BatchOption = 8,
    max_new_tokens: LimitOption = None,
    out: OutOption = None,
    report: ReportOption = None,
    baseline: BaselineOption = None,
    per_task: PerTaskOption = False,
    plots: PlotsOption = False,
    results: ResultsOption = None,
    list_tasks: ListOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score methods on tasks at equal measured KV, with intervals; samples that cannot be read are skipped."""
    folder = _folder(out, report, list_tasks)
    if folder is None:
        _list(as_json)
        return
    check_choice("mode", mode, MODES)
    settings = _settings(
        retention=retentions(target_retention), tasks=names(tasks, "--tasks"), data=tuple(data or ()), metric=metric,
        prompts=prompts, allow_urls=allow_urls, split=split, samples=samples, seed=seed, model=model,
        mode="label-free" if label_free else mode, dtype=dtype, device=device, rows=rows, batch=batch,
        max_new_tokens=max_new_tokens,
    )  # fmt: skip
    _check_files(settings, out, results, plots)
    if out is not None:
        metrics = _run(settings, methods, out, workers, baseline, quiet)
        note_on_bundled(model, quiet=quiet or as_json or not (data or prompts))
    else:
        metrics = _read(folder, baseline, quiet=as_json)
    _show(metrics, per_task, _write(metrics, folder, baseline, results, plots), as_json)


def _folder(out: Path | None, report: Path | None, list_tasks: bool) -> Path | None:
    """The folder to write or to show; None where the tasks are asked for."""
    if sum((list_tasks, out is not None, report is not None)) != 1:
        raise ConfigError("Give one of --out DIR (run), --report DIR (show again) and --list (the tasks).")
    return report if out is None else out


def _settings(**values: Any) -> EvalSettings:
    """Settings of the values that were given, without the methods, which need torch to be looked up."""
    return EvalSettings(**{name: value for name, value in values.items() if value is not None})


def _check_files(settings: EvalSettings, out: Path | None, results: Path | None, plots: bool) -> None:
    """Refuse before the run what would be in the way after it."""
    check_out_file(results, "results")
    if out is not None:
        check_model(settings.model, settings.dtype, settings.device)
        check_out_folder(out)
    if plots:
        from plphp.show.plots import new_figure

        new_figure()  # says that matplotlib is missing, if it is


def _run(
    settings: EvalSettings, methods: list[str] | None, out: Path, workers: int, baseline: str | None, quiet: bool
) -> dict[str, Any]:
    from plphp.evaluation import evaluate, split_methods

    if methods is not None:
        settings = dataclasses.replace(settings, methods=tuple(split_methods(methods)))
    with shown_progress(quiet) as progress:
        return evaluate(settings, out, workers=workers, baseline=baseline, progress=progress)


def _read(folder: Path, baseline: str | None, quiet: bool) -> dict[str, Any]:
    """The figures of a folder, with a line if the run in it is not finished."""
    from plphp.evaluation import summarize, unfinished

    metrics, missing = summarize(folder, baseline), unfinished(folder)
    if missing and not quiet:
        console().print(f"Not finished: {missing}.", highlight=False)
    return metrics


def _write(metrics: dict[str, Any], folder: Path, baseline: str | None, results: Path | None, plots: bool) -> list[str]:
    """Write plots and results where they are asked for; return the files of the plots."""
    from plphp.evaluation import save_score_plots, write_results

    files = [str(path) for path in save_score_plots(metrics, folder / "plots")] if plots else []
    if results is not None:
        write_results(folder, results, baseline)
    return files


def _list(as_json: bool) -> None:
    from plphp.evaluation import task_table
    from plphp.evaluation.tasks.built_in import all_tasks

    tasks = all_tasks().values()
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
    in_terminal = sys.stdout.isatty()
    out = Console(width=None if in_terminal else WIDE, highlight=False)
    for table in score_tables(metrics, per_task=per_task, width=out.width if in_terminal else None):
        out.print(table, "")
    for label, reason in metrics["refused"].items():
        out.print(f"{label} was left out: {reason}", markup=False)
    print("\n".join(files), end="\n" if files else "")
    if metrics["skipped"]:
        print(_skipped(metrics))


def _skipped(metrics: dict[str, Any]) -> str:
    """The last line: how many samples were skipped, and where the reasons are."""
    counts = {task: len(samples) for task, samples in metrics["skipped"].items()}
    skipped, scored = sum(counts.values()), sum(task["samples"] for task in metrics["tasks"].values())
    by_task = ", ".join(f"{task}: {count}" for task, count in counts.items())
    return (
        f"{skipped} of {skipped + scored} samples were skipped ({by_task}), and no method is judged on them: the "
        'reasons stand under "skipped" in metrics.json.'
    )
