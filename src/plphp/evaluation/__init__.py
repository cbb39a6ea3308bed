# SPDX-License-Identifier: Apache-2.0
"""Score pruning methods on tasks at equal measured KV, with intervals; ``plphp eval`` on the command line.

>>> from plphp.evaluation import EvalSettings, evaluate
>>> metrics = evaluate(EvalSettings(tasks=("one_image",), samples=50), "results")  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answering import decode_sample, generate_samples
    from .intervals import averaged, resample
    from .metrics import METRICS
    from .result_plots import plot_scores, save_score_plots
    from .result_tables import score_tables, task_table
    from .runner import evaluate
    from .scoring import Outcome, label_free, verify
    from .settings import EvalSettings
    from .summary import compact_results, read_results, summarize, unfinished, write_results
    from .tasks import GROUPS, Sample, Task, Turn, available_tasks
    from .variants import Variant, make_variants, split_methods

_MODULES = {
    "answering": ("decode_sample", "generate_samples"),
    "intervals": ("averaged", "resample"),
    "metrics": ("METRICS",),
    "runner": ("evaluate",),
    "result_plots": ("plot_scores", "save_score_plots"),
    "result_tables": ("score_tables", "task_table"),
    "scoring": ("Outcome", "label_free", "verify"),
    "settings": ("EvalSettings",),
    "summary": ("compact_results", "read_results", "summarize", "unfinished", "write_results"),
    "tasks": ("GROUPS", "Sample", "Task", "Turn", "available_tasks"),
    "variants": ("Variant", "make_variants", "split_methods"),
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
