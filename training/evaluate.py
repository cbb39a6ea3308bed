# SPDX-License-Identifier: Apache-2.0
"""Stage 4: exact match of greedy ``generate`` on the held-out tasks, through the real processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from plphp.evaluation.tasks import Sample, Split, Task, available_tasks


def messages(sample: Sample, *, blank: bool = False) -> list[dict]:
    """Return the conversation up to the last question, with the true earlier answers, for the chat template."""
    images = [Image.new("RGB", image.size, (20, 20, 20)) if blank else image for image in sample.images]
    content: list[dict] = [{"type": "image", "image": image} for image in images]
    listed: list[dict] = []
    for turn in sample.turns:
        listed.append({"role": "user", "content": [*content, {"type": "text", "text": turn.question}]})
        listed.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        content = []
    return listed[:-1]


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
    inputs = processor.apply_chat_template(
        [messages(sample, blank=blank) for sample in batch],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    out = model.generate(**inputs, max_new_tokens=128)
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def exact_match(
    model, processor, task: Task, n: int, *, split: Split = "test", blank: bool = False, batch: int = 20
) -> float:
    """Return the share of ``n`` samples whose whole last answer is right to the character (fraction)."""
    made = list(task.samples(split, n))
    right = 0
    for at in range(0, n, batch):
        chunk = made[at : at + batch]
        given = answer(model, processor, chunk, blank=blank)
        right += sum(text == sample.turns[-1].answer for text, sample in zip(given, chunk, strict=True))
    return right / n


def evaluate(folder: Path, n: int, n_blank: int, *, split: Split = "test") -> dict[str, dict[str, float]]:
    """Return exact match by task, with the images and with blank images."""
    model, processor = load(folder)
    result = {}
    for name, task in available_tasks().items():
        result[name] = {"exact_match": exact_match(model, processor, task, n, split=split)}
        if n_blank:
            result[name]["blank_images"] = exact_match(model, processor, task, n_blank, split=split, blank=True)
        print(name, result[name], flush=True)
    return result
