# SPDX-License-Identifier: Apache-2.0
"""``plphp eval``: score methods on tasks, at several retentions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from plphp.errors import ConfigError
from plphp.evaluation.choices import MODES, SPLITS, check_choice
from plphp.evaluation.metrics import METRICS, get_metric
from plphp.methods.registry import METHODS_BY_NAME

from ._app import app, console, note_on_bundled, print_json
from ._checks import check_model, check_out_file, check_out_folder
from ._eval_progress import shown_progress
from ._options import JsonOption, allow_urls_option, device_option, dtype_option, model_option, option

WHAT, DATA, HOW, OUTPUT = "What", "Data", "How", "Output"
WIDE = 1000
"""Columns where there is no terminal, which no table needs."""


@app.command("eval")
def evaluate_command(
    model: Annotated[str | None, model_option(WHAT)] = None,
    methods: Annotated[
        list[str] | None,
        option(
            WHAT,
            "Methods by commas, with settings and labels: 'plphp,mine=random:seed=1'; may be repeated.",
            complete=METHODS_BY_NAME.names,
        ),
    ] = None,
    target_retention: Annotated[
        str | None, option(WHAT, "Mean fractions of the vision tokens to keep, by commas, such as 0.5,0.25.")
    ] = None,
    tasks: Annotated[str | None, option(WHAT, "Tasks or groups by commas; default: all that are scored.")] = None,
    split: Annotated[str, option(WHAT, "Split of the built-in tasks, default dev:", choices=SPLITS)] = "dev",
    samples: Annotated[int, option(WHAT, "Samples of each task; default 500.", min=1)] = 500,
    seed: Annotated[int, option(WHAT, "Seed of the samples; default 0.", min=0)] = 0,
    data: Annotated[
        list[str] | None,
        option(DATA, "A .jsonl file, a folder with metadata.jsonl, or a data set for the `datasets` library."),
    ] = None,
    metric: Annotated[
        str, option(DATA, "Metric for --data, default exact_match:", choices=tuple(METRICS))
    ] = "exact_match",
    prompts: Annotated[str | None, option(DATA, "Prompts without answers, for --label-free.")] = None,
    allow_urls: Annotated[bool, allow_urls_option(DATA)] = False,
    label_free: Annotated[bool, option(HOW, "Compare with the full cache, without answers.", "--label-free")] = False,
    mode: Annotated[str, option(HOW, "How samples are scored, default auto:", choices=MODES)] = "auto",
    dtype: Annotated[str, dtype_option(HOW)] = "auto",
    device: Annotated[str | None, device_option(HOW)] = None,
    workers: Annotated[int, option(HOW, "Processes of one thread each; default 1.", min=1)] = 1,
    rows: Annotated[int, option(HOW, "Variants whose caches are alive at a time; default 64.", min=1)] = 64,
    batch: Annotated[int, option(HOW, "Samples in a batch, for --mode generate; default 8.", min=1)] = 8,
    max_new_tokens: Annotated[int | None, option(HOW, "Longest answer.", min=1)] = None,
    out: Annotated[Path | None, option(OUTPUT, "Folder for the results; an unfinished run goes on.")] = None,
    report: Annotated[Path | None, option(OUTPUT, "Show the results in this folder again; nothing is run.")] = None,
    baseline: Annotated[str | None, option(OUTPUT, "Method from which differences are given, too.")] = None,
    per_task: Annotated[bool, option(OUTPUT, "Show each task beside the groups.", "--per-task")] = False,
    plots: Annotated[bool, option(OUTPUT, "Draw score against KV into DIR/plots.", "--plots")] = False,
    results: Annotated[Path | None, option(OUTPUT, "Write the figures, without samples, to this JSON file.")] = None,
    list_tasks: Annotated[bool, option(OUTPUT, "List the built-in tasks.", "--list")] = False,
    quiet: Annotated[bool, option(OUTPUT, "Show no progress on standard error.", "--quiet")] = False,
    as_json: JsonOption = False,
) -> None:
    """Score methods on tasks at equal measured KV, with intervals; samples that cannot be read are skipped."""
    if sum((list_tasks, out is not None, report is not None)) != 1:
        raise ConfigError("Give one of --out DIR (run), --report DIR (show again) and --list (the tasks).")
    if list_tasks:
        _list(as_json)
        return
    given: dict[str, Any] = {
        "retention": None if target_retention is None else _numbers(target_retention),
        "tasks": None if tasks is None else _names(tasks, "--tasks"),
    }
    check_choice("split", split, SPLITS)
    check_choice("mode", mode, MODES)
    get_metric(metric)
    check_model(model if report is None else None, dtype, device)
    check_out_file(results, "results")
    if out is not None:
        check_out_folder(out)
    from plphp.evaluation import EvalSettings, evaluate, save_score_plots, summarize, unfinished, write_results

    if plots:
        from plphp.show.plots import new_figure

        new_figure()  # says now, not after the run, that matplotlib is missing
    if report is not None:
        folder, metrics = report, summarize(report, baseline)
        missing = unfinished(report)
        if missing and not as_json:
            console().print(f"Not finished: {missing}.", highlight=False)
    else:
        assert out is not None
        given["methods"] = None if methods is None else _methods(methods)
        settings = EvalSettings(
            model=model,
            data=tuple(data or ()),
            metric=metric,
            prompts=prompts,
            allow_urls=allow_urls,
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
        with shown_progress(quiet) as tell:
            metrics = evaluate(settings, out, workers=workers, baseline=baseline, progress=tell)
        note_on_bundled(model, quiet=quiet or as_json or not (data or prompts))
        folder = out
    files = [str(path) for path in save_score_plots(metrics, folder / "plots")] if plots else []
    if results is not None:
        write_results(folder, results, baseline)
    _show(metrics, per_task, files, as_json)


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


def _names(text: str, option: str) -> tuple[str, ...]:
    names = tuple(filter(None, (part.strip() for part in text.split(","))))
    if not names:
        raise ConfigError(f"{option} takes one or several, separated by commas, got {text!r}: leave it out for all.")
    return names


def _methods(texts: list[str]) -> tuple[str, ...]:
    from plphp.evaluation import split_methods

    return tuple(split_methods(texts))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in _names(text, "--target-retention"))
    except ValueError:
        raise ConfigError(f"--target-retention must be numbers by commas, such as 0.5,0.25, got {text!r}.") from None
