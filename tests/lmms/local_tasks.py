# SPDX-License-Identifier: Apache-2.0
"""plphp's synthetic samples as files, and lmms-eval runs on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from plphp.evaluation import available_tasks

DRAWN = {"cell": 20, "cell_in": 15, "read_line": 15}
"""By task, how many of its samples: of one image, of two to four, and longer answers. They stand mixed, so that a batch
holds prompts and answers of several lengths."""
COUNT = sum(DRAWN.values())
DATA = "samples.jsonl"


def write(folder: Path) -> Path:
    """Write the samples, and the tasks of this folder beside them."""
    shutil.copytree(Path(__file__).parent / "task", folder, dirs_exist_ok=True)
    for task in folder.glob("*.yaml"):
        task.write_text(task.read_text(encoding="utf-8").replace("DATA", str(folder / DATA)), encoding="utf-8")
    drawn = [
        (name, sample) for name, count in DRAWN.items() for sample in available_tasks()[name].samples("dev", count)
    ]
    lines = []
    for number, (name, sample) in sorted(enumerate(drawn), key=lambda pair: pair[0] * 7 % COUNT):
        files = [f"{number}-{position}.png" for position in range(len(sample.images))]
        for file, image in zip(files, sample.images, strict=True):
            image.save(folder / file)
        [turn] = sample.turns
        lines.append(
            json.dumps({"id": f"{name}-{sample.id}", "images": files, "question": turn.question, "answer": turn.answer})
        )
    (folder / DATA).write_text("\n".join(lines), encoding="utf-8")
    return folder


def evaluate(folder: Path, arguments: str | Any, task: str = "plphp_local", **options: Any) -> dict[str, Any]:
    """Run lmms-eval's evaluator in this process and return its results.

    Parameters
    ----------
    folder : Path
        Of `write`.
    arguments : str
        What stands behind ``--model_args``.
    """
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    # The index of lmms-eval's own tasks, some thousand files, is not needed.
    manager = TaskManager(include_path=str(folder), include_defaults=False, model_name="plphp")
    return simple_evaluate(  # type: ignore[no-any-return]
        "plphp", arguments, tasks=[task], task_manager=manager, log_samples=True, **options
    )


def answers(results: dict[str, Any], task: str = "plphp_local") -> list[str]:
    """What was said, by the order of the documents."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"][0] for sample in samples]
