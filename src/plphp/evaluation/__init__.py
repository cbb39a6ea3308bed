# SPDX-License-Identifier: Apache-2.0
"""Score pruning methods on tasks at equal measured KV, with intervals; ``plphp eval`` on the command line.

Examples
--------
>>> from plphp.evaluation import EvalSettings, evaluate
>>> metrics = evaluate(EvalSettings(tasks=("one_image",), samples=50), "results")  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plphp.evaluation.results.compact import compact_results, read_results, unfinished, write_results
    from plphp.evaluation.results.intervals import averaged, resample
    from plphp.evaluation.results.plots import plot_scores, save_score_plots
    from plphp.evaluation.results.summary import summarize
    from plphp.evaluation.results.tables import score_tables, task_table
    from plphp.evaluation.running.answering import decode_sample, generate_samples
    from plphp.evaluation.running.runner import evaluate
    from plphp.evaluation.running.scoring import Outcome, label_free, verify
    from plphp.evaluation.running.variants import Variant, make_variants, split_methods
    from plphp.evaluation.tasks.built_in import GROUPS, Task, available_tasks
    from plphp.evaluation.tasks.metrics import METRICS
    from plphp.evaluation.tasks.task import Sample, Turn

    from .settings import EvalSettings

_MODULES = {
    "results.compact": ("compact_results", "read_results", "unfinished", "write_results"),
    "results.intervals": ("averaged", "resample"),
    "results.plots": ("plot_scores", "save_score_plots"),
    "results.summary": ("summarize",),
    "results.tables": ("score_tables", "task_table"),
    "running.answering": ("decode_sample", "generate_samples"),
    "running.runner": ("evaluate",),
    "running.scoring": ("Outcome", "label_free", "verify"),
    "running.variants": ("Variant", "make_variants", "split_methods"),
    "settings": ("EvalSettings",),
    "tasks.built_in": ("GROUPS", "Task", "available_tasks"),
    "tasks.metrics": ("METRICS",),
    "tasks.task": ("Sample", "Turn"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "GROUPS",
    "METRICS",
    "EvalSettings",
    "Outcome",
    "Sample",
    "Task",
    "Turn",
    "Variant",
    "available_tasks",
    "averaged",
    "compact_results",
    "decode_sample",
    "evaluate",
    "generate_samples",
    "label_free",
    "make_variants",
    "plot_scores",
    "read_results",
    "resample",
    "save_score_plots",
    "score_tables",
    "split_methods",
    "summarize",
    "task_table",
    "unfinished",
    "verify",
    "write_results",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: the drawing of scenes needs no model, and the tables no torch.
    if name in _MODULE_OF:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
