# SPDX-License-Identifier: Apache-2.0
"""Stage 4: exact match of greedy ``generate`` on unseen scenes, through PNG files and the real processor."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from training import questions, scenes

SEED = 777
TASKS: dict[str, tuple[tuple[str, ...], tuple[int, ...], int]] = {
    "cell": (("cell",), (1,), 1),
    "digit_of_colour": (("digit_of_colour",), (1,), 1),
    "colour_of": (("colour_of",), (1,), 1),
    "list_row": (("list_row",), (1,), 1),
    "list_grid": (("list_grid",), (1,), 1),
    "read_line": (("read_line",), (1,), 1),
    "read_colour": (("read_colour",), (1,), 1),
    "read_page": (("read_page",), (1,), 1),
    "dialogue": (("cell", "digit_of_colour", "colour_of", "list_row", "read_line", "read_colour"), (1,), 2),
    "which_image": (("which_image",), (2, 3, 4), 1),
    "several_cell": (("cell", "digit_of_colour", "colour_of"), (2, 3, 4), 1),
    "several_row": (("list_row",), (2, 3, 4), 1),
    "several_text": (("read_line", "read_colour"), (2, 3, 4), 1),
    "several_page": (("read_page",), (2, 3, 4), 1),
    "six_images": (("which_image", "cell", "colour_of", "read_line"), (5, 6), 1),
}
"""Name -> (question kinds, numbers of images, turns). The last is beyond the 1 to 4 images of training."""


@dataclass(frozen=True)
class Sample:
    """Images and the turns of one conversation; the last turn is the one to answer."""

    images: tuple[Image.Image, ...]
    turns: tuple[questions.Question, ...]

    def messages(self) -> list[dict]:
        """Return the conversation up to the last question, in the chat template's form."""
        content: list[dict] = [{"type": "image", "image": image} for image in self.images]
        messages: list[dict] = []
        for turn in self.turns:
            messages.append({"role": "user", "content": [*content, {"type": "text", "text": turn.text}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
            content = []
        return messages[:-1]


def _through_png(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Image.open(io.BytesIO(buffer.getvalue()))


def samples(task: str, n: int, seed: int = SEED, *, scale: int = 4) -> Iterator[Sample]:
    """Yield ``n`` samples of a task from the test split, drawn at ``80 * scale`` pixels a side."""
    kinds, numbers, turn_count = TASKS[task]
    rng = random.Random(f"{seed}-{task}")
    made = 0
    while made < n:
        drawn = scenes.make_scenes(rng, "test", rng.choice(numbers))
        asked = [questions.ask(rng, drawn, rng.choice(kinds)) for _ in range(turn_count)]
        if None in asked or len({turn.text for turn in asked if turn}) < turn_count:
            continue
        made += 1
        yield Sample(tuple(_through_png(scene.draw(scale)) for scene in drawn), tuple(t for t in asked if t))


def load(folder: Path):
    """Return (model, processor) from an exported folder, in float32 on the CPU."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


@torch.inference_mode()
def answer(model, processor, batch: Sequence[Sample], *, blank: bool = False) -> list[str]:
    """Answer a (left-padded) batch greedily with the model class's ``generate``.

    Parameters
    ----------
    model, processor
        From ``load``.
    batch
        Conversations; images may differ in number.
    blank
        Replace every image by a uniform dark one: what can be answered without seeing.
    """
    if blank:
        batch = [Sample(tuple(Image.new("RGB", i.size, (20, 20, 20)) for i in s.images), s.turns) for s in batch]
    inputs = processor.apply_chat_template(
        [sample.messages() for sample in batch],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    out = model.generate(**inputs, max_new_tokens=128)
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def exact_match(model, processor, task: str, n: int, *, blank: bool = False, batch: int = 20) -> float:
    """Return the share of ``n`` samples whose whole answer is right to the character (fraction)."""
    made = list(samples(task, n))
    right = 0
    for at in range(0, n, batch):
        chunk = made[at : at + batch]
        given = answer(model, processor, chunk, blank=blank)
        right += sum(text == sample.turns[-1].answer for text, sample in zip(given, chunk, strict=True))
    return right / n


def evaluate(folder: Path, n: int, n_blank: int) -> dict[str, dict[str, float]]:
    """Return exact match by task, with the images and with blank images."""
    model, processor = load(folder)
    result = {}
    for task in TASKS:
        result[task] = {"exact_match": exact_match(model, processor, task, n)}
        if n_blank:
            result[task]["blank_images"] = exact_match(model, processor, task, n_blank, blank=True)
        print(task, result[task], flush=True)
    return result
