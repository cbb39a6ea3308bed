# SPDX-License-Identifier: Apache-2.0
"""Stage 5: the measured figures as data, and the model card made from them."""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path

import torch

LABELS = {
    "cell": "what is in a cell (grid of 2 to 4 rows and columns)",
    "digit_of_colour": "which digit has a colour",
    "colour_of": "the colour of a shape or digit",
    "list_row": "list a row",
    "list_grid": "list the whole grid, one line per row",
    "read_line": "read one line of printed code",
    "read_colour": "read the code of a colour",
    "read_page": "read all lines (1 to 3)",
    "dialogue": "second question, after a first one and its answer",
    "which_image": "which of 2 to 4 images shows a thing",
    "several_cell": "cell, digit or colour in one of 2 to 4 images",
    "several_row": "list a row of one of 2 to 4 images",
    "several_text": "one line of text in one of 2 to 4 images",
    "several_page": "all lines of text in one of 2 to 4 images",
    "six_images": "mixed questions, 5 or 6 images (trained on at most 4)",
}


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
        "hardware": f"{threads} CPU cores ({platform.machine()}), no GPU, shared with other work",
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
    lines = ["| task | what is asked | exact match | images blanked |", "|---|---|---|---|"]
    for task, values in record["evaluation"]["tasks"].items():
        blank = values.get("blank_images")
        blanked = "" if blank is None else f"{blank:.3f}"
        lines.append(f"| `{task}` | {LABELS[task]} | {values['exact_match']:.3f} | {blanked} |")
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
        "PATCH_GRID": f"{vision['held_out_patch_accuracy']['grid']:.3f}",
        "PATCH_TEXT": f"{vision['held_out_patch_accuracy']['text']:.3f}",
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
