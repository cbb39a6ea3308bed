# SPDX-License-Identifier: Apache-2.0
"""Draw the example images with their questions and true answers: ``python -m training.examples --out DIR``.

Each example names a task and takes the first scene and question of its seed that allow it: nothing is chosen
by what the model answers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

from plphp.evaluation.tasks.synthetic import questions, scenes
from plphp.evaluation.tasks.synthetic.scenes import Scene

SEED = 4243
PLAN: tuple[tuple[str, str, tuple[scenes.Kind, ...], str], ...] = (
    ("single", "grid-1", ("grid",), "cell"),
    ("single", "grid-2", ("grid",), "digit_of_colour"),
    ("single", "page-1", ("text",), "read_line"),
    ("single", "page-2", ("text",), "read_colour"),
    ("lines", "page-1", ("text",), "read_page"),
    ("lines", "grid-1", ("grid",), "list_grid"),
    ("single", "grid-1", ("grid",), "list_row"),
    ("several", "trio", ("grid", "text", "grid"), "cell"),
    ("several", "duo", ("text", "grid"), "read_line"),
    ("several", "trio", ("grid", "text", "grid"), "read_line"),
    ("single", "grid-2", ("grid",), "colour_of"),
    ("several", "pair", ("grid", "grid"), "which_image"),
)
"""(kind, name of the image set, kinds of scenes, task)."""


def _scenes(name: str, kinds: Sequence[scenes.Kind]) -> list[Scene]:
    """Return the scenes of one set: test digits, a seed that no training or evaluation stream uses."""
    rng = random.Random(f"{SEED}-{name}")
    several = len(kinds) > 1
    made = []
    for kind in kinds:
        while True:
            scene = scenes.make_scene(rng, "test", kind, 4 if several else 5)
            # A page of one line would make a poor multi-line example.
            if kind == "grid" or scene.rows > 1:
                break
        # Without pixel noise the files are a few kilobytes instead of a hundred.
        made.append(dataclasses.replace(scene, noise=0.0))
    return made


def write(folder: Path) -> list[dict]:
    """Write the PNG files (448 x 448) and ``questions.json``; return the questions."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for kind, name, kinds, task in PLAN:
        drawn = _scenes(name, kinds)
        files = [f"{name}.png"] if len(kinds) == 1 else [f"{name}-{i}.png" for i in range(1, len(kinds) + 1)]
        for file, scene in zip(files, drawn, strict=True):
            scene.draw(4).save(folder / file, optimize=True)
        rng = random.Random(f"{SEED}-{name}-{task}")
        asked = None
        for _ in range(100):
            asked = questions.ask(rng, drawn, task)
            # "Shows nothing" would be a poor example of reading a cell.
            if asked is not None and not (task == "cell" and "nothing" in asked.answer):
                break
        if asked is None:
            raise RuntimeError(f"the scenes of {name!r} do not allow the task {task!r}; change SEED")
        listed.append({"images": files, "question": asked.text, "answer": asked.answer, "kind": kind})
    (folder / "questions.json").write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
    return listed


def main() -> None:
    """Write the examples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
