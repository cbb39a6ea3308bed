# SPDX-License-Identifier: Apache-2.0
"""Stage 4: figures of the exported model, as data and as its card: ``python -m training.results --run DIR``.

A finished run is scored and described again without training; samples that are scored already are not scored again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from plphp.evaluation import EvalSettings, available_tasks, compact_results, evaluate
from plphp.evaluation.results.compact import command_of
from training import checkpoints

logger = logging.getLogger("training.results")

SAMPLES = 200
FACTS, RESULTS, MODEL, EVALUATION = "training.json", "results.json", "model", "evaluation"
"""Names in the run folder."""
VARIANTS = ("full", "zero", "blank")
"""Columns of figures: the full cache, no vision KV after the prompt was read, grey images."""
COLUMNS = (
    "task",
    "group",
    "what is asked",
    "exact match",
    "all vision KV evicted",
    "images blanked",
    "chance",
)


def write_facts(run: Path, *, seed: int, threads: int, device: str = "cpu") -> None:
    """Write what is to be said about a finished training, ``training.json``, where and when it was trained.

    Where a run was not made by the recipe as it stands, say so there by hand, under ``deviations``: the card prints it.

    Parameters
    ----------
    run
        The run folder with its two checkpoints.
    seed, threads, device
        Of the training.
    """
    import sklearn
    import transformers

    vision, text = (checkpoints.load(run / name, seed) for name in ("vision.pt", "text.pt"))
    on_gpu = torch.device(device).type == "cuda"
    facts = {
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name(device) if on_gpu else f"{threads} CPU cores ({platform.machine()})",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "scikit-learn": sklearn.__version__,
        },
        "seed": seed,
        "vision_stage": {
            "seconds": round(vision["seconds"]),
            "steps": vision["steps"],
            "held_out_patch_accuracy": {kind: round(share, 4) for kind, share in vision["held_out"].items()},
        },
        "text_stage": {"seconds": round(text["seconds"]), "steps": text["step"], "rows": text["rows"]},
    }
    (run / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def record(run: Path, folder: Path) -> dict[str, Any]:
    """Return everything that is said about an evaluated run: the facts of its training and the harness's figures.

    Parameters
    ----------
    run
        The run folder, with ``training.json`` and the evaluation.
    folder
        The exported model.

    Returns
    -------
    dict
        JSON-ready; ``evaluation`` is from `plphp.evaluation.compact_results`.
    """
    evaluation = compact_results(run / EVALUATION)
    # Where the folder lay is no part of the results.
    evaluation["settings"]["model"] = "MODEL"
    evaluation["command"] = command_of(evaluation["settings"])
    return {
        "script": "python -m training.train_all",
        "training": json.loads((run / FACTS).read_text(encoding="utf-8")),
        "weights_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "evaluation": evaluation,
    }


def table(evaluation: Mapping[str, Any]) -> str:
    """Return the figures of an evaluation in per cent as a Markdown table: tasks, means of groups, mean of all."""
    tasks, about = evaluation["tasks"], available_tasks()
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for name, task in tasks.items():
        chance = f"{100 * task['chance']:.1f}"
        lines.append((f"`{name}`", _words(task["group"]), about[name].summary, *_scores(task["variants"]), chance))
    for name, group in evaluation["groups"].items():
        lines.append((f"mean of {len(group['tasks'])}", _words(name), "", *_scores(group["variants"]), ""))
    scored = [task["variants"] for task in tasks.values() if task["scored"]]
    means = (fmean(one[name]["score"]["mean"] for one in scored) for name in VARIANTS)
    lines.append((f"mean of {len(scored)} scored tasks", "", "", *(f"{100 * mean:.1f}" for mean in means), ""))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def model_card(record: Mapping[str, Any]) -> str:
    """Return the model card of a record, filled into ``model_card.md``."""
    template = (Path(__file__).parent / "model_card.md").read_text(encoding="utf-8")
    training, evaluation = record["training"], record["evaluation"]
    vision, text, model = training["vision_stage"], training["text_stage"], evaluation["model"]
    values = {
        "PARAMETERS": f"{model['parameters'] / 1e6:.1f}",
        "MEGABYTES": f"{record['weights_bytes'] / 1e6:.1f}",
        "DTYPE": model["dtype"],
        "SHA256": model["sha256"],
        "TABLE": table(evaluation),
        "SAMPLES": evaluation["settings"]["samples"],
        "SEED": evaluation["settings"]["seed"],
        "DATE": evaluation["date"],
        "COMMAND": evaluation["command"],
        "VERSIONS": _versions(evaluation),
        "HARDWARE": training["hardware"],
        "TRAIN_SEED": training["seed"],
        "TRAIN_DATE": training["date"],
        "TRAIN_VERSIONS": _versions(training),
        "VISION_MINUTES": f"{vision['seconds'] / 60:.1f}",
        "VISION_STEPS": vision["steps"],
        "PATCHES": ", ".join(f"{value:.3f} on {kind}s" for kind, value in vision["held_out_patch_accuracy"].items()),
        "TEXT_MINUTES": f"{text['seconds'] / 60:.1f}",
        "TEXT_STEPS": text["steps"],
        "TEXT_ROWS": f"{text['rows']:,}",
        "DEVIATIONS": f"\n\n{training['deviations']}" if "deviations" in training else "",
    }
    for name, value in values.items():
        template = template.replace("{{" + name + "}}", str(value))
    return template


def write(
    run: Path, folder: Path, *, samples: int = SAMPLES, workers: int = 1, tasks: Sequence[str] = ("all",)
) -> None:
    """Score an exported model; write ``results.json`` into the run folder and the card into the model's.

    Parameters
    ----------
    run
        The run folder, with ``training.json``.
    folder
        The exported model.
    samples
        Held-out samples of each task.
    workers
        Processes of one thread each.
    tasks
        Tasks or groups of tasks.

    Raises
    ------
    ConfigError
        If the run folder holds the evaluation of other weights or settings.
    """
    # Resolved, so that another spelling of the same folder goes on with the same evaluation.
    model = str(folder.resolve())
    settings = EvalSettings(model=model, methods=VARIANTS[1:], tasks=tuple(tasks), split="test", samples=samples)
    evaluate(settings, run / EVALUATION, workers=workers, progress=_tell)
    found = record(run, folder)
    (run / RESULTS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(found), encoding="utf-8")


def main() -> None:
    """Score and describe a finished run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder of training.train_all")
    parser.add_argument("--model", type=Path, help=f"exported model; default: {MODEL} in the run folder")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="held-out samples per task")
    parser.add_argument("--tasks", nargs="+", default=["all"], help="tasks or groups of tasks")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    folder = args.model or args.run / MODEL
    write(args.run, folder, samples=args.samples, workers=args.workers, tasks=args.tasks)


def _tell(task: str, done: int, total: int) -> None:
    if done % 50 == 0 or done == total:
        logger.info("%s: %d of %d samples", task, done, total)


def _words(group: str) -> str:
    return group.replace("_", " ")


def _scores(variants: Mapping[str, Any]) -> list[str]:
    """Cells of all variants in per cent, the full cache's with its 95 % interval."""
    full, *others = (variants[name]["score"] for name in VARIANTS)
    interval = f"{100 * full['mean']:.1f} ({100 * full['low']:.1f}, {100 * full['high']:.1f})"
    return [interval, *(f"{100 * one['mean']:.1f}" for one in others)]


def _versions(about: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in about["versions"].items())


if __name__ == "__main__":
    main()
