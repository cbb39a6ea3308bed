# SPDX-License-Identifier: Apache-2.0
"""Stage 5: the measured figures as data, and the model card made from them."""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path

import torch

from plphp.evaluation.tasks import available_tasks


def record(
    run: Path,
    figures: dict[str, dict[str, float]],
    *,
    seed: int,
    samples: int,
    blank_samples: int,
    threads: int,
    train_seed: int = 0,
) -> dict:
    """Return everything that is said about a run: figures, versions, hardware, time.

    Parameters
    ----------
    run
        The run folder with its two checkpoints.
    figures
        From ``evaluate.evaluate``.
    seed, samples, blank_samples
        Of the evaluation; samples are per task.
    threads
        CPU threads used in training.
    train_seed
        Seed of the training run.
    """
    import sklearn
    import transformers

    vision = torch.load(run / "vision.pt", weights_only=True)
    text = torch.load(run / "text.pt", weights_only=True)
    return {
        "script": "python -m training.train_all",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{threads} CPU cores ({platform.machine()}), no GPU",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "scikit-learn": sklearn.__version__,
        },
        "seed": train_seed,
        "vision_stage": {
            "minutes": round(vision["seconds"] / 60, 1),
            "steps": vision["steps"],
            "held_out_patch_accuracy": {k: round(v, 4) for k, v in vision["held_out"].items()},
        },
        "text_stage": {
            "minutes": round(text["seconds"] / 60, 1),
            "steps": text["step"],
            "rows": text["rows"],
        },
        "evaluation": {
            "metric": "exact match of the whole greedy answer (fraction)",
            "seed": seed,
            "samples_per_task": samples,
            "blank_samples_per_task": blank_samples,
            "weights": "the exported bf16 weights, computed in float32",
            "tasks": figures,
        },
    }


def table(record: dict) -> str:
    """Return the figures of a record as a Markdown table."""
    lines = ["| task | group | what is asked | exact match | images blanked | chance |", "|---|---|---|---|---|---|"]
    tasks = available_tasks()
    for name, values in record["evaluation"]["tasks"].items():
        task = tasks[name]
        shown = f"{values['exact_match']:.3f} | {values['blank_images']:.3f} | {task.chance:.3f}"
        lines.append(f"| `{name}` | {task.group.replace('_', ' ')} | {task.summary} | {shown} |")
    scored = [values["exact_match"] for name, values in record["evaluation"]["tasks"].items() if tasks[name].scored]
    lines.append(f"| mean of {len(scored)} scored tasks | | | {sum(scored) / len(scored):.3f} | | |")
    return "\n".join(lines)


def model_card(record: dict) -> str:
    """Return the model card of a record, filled into ``model_card.md``."""
    template = (Path(__file__).parent / "model_card.md").read_text(encoding="utf-8")
    evaluation, vision, text = record["evaluation"], record["vision_stage"], record["text_stage"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    values = {
        "TABLE": table(record),
        "SAMPLES": evaluation["samples_per_task"],
        "BLANK_SAMPLES": evaluation["blank_samples_per_task"],
        "SEED": evaluation["seed"],
        "DATE": record["date"],
        "HARDWARE": record["hardware"],
        "VERSIONS": versions,
        "VISION_MINUTES": vision["minutes"],
        "VISION_STEPS": vision["steps"],
        "PATCHES": ", ".join(f"{value:.3f} on {kind}s" for kind, value in vision["held_out_patch_accuracy"].items()),
        "TRAIN_SEED": record["seed"],
        "TEXT_MINUTES": text["minutes"],
        "TEXT_STEPS": text["steps"],
        "TEXT_ROWS": f"{text['rows']:,}",
    }
    for name, value in values.items():
        template = template.replace("{{" + name + "}}", str(value))
    return template


def write(run: Path, folder: Path, result: dict) -> None:
    """Write ``results.json`` into the run folder and the model card into the exported folder."""
    (run / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(result), encoding="utf-8")
