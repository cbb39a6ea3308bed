# SPDX-License-Identifier: Apache-2.0
"""The same answers from transformers with a `PrunedCache` whose rates are rounded to whole blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

import plphp
from engine import Request
from pictures import picture
from plphp import PLPHPConfig
from plphp.allocation import kept_count
from plphp.registry import get_method, register_method
from tiny_checkpoint import IMAGE


def in_blocks(name: str, block_size: int) -> str:
    """Register a method that keeps so much more than another that what it evicts fills whole blocks."""
    method = get_method(name)

    def allocate(layers: Any, config: PLPHPConfig) -> Any:
        allocation = method.allocate(layers, config)
        for layer, rows in zip(layers, allocation, strict=True):
            for row, vision in enumerate(layer.scores.vision.sum(1).tolist()):
                evicted = vision - kept_count(rows[row].rate, vision, config.min_kept)
                kept = vision - evicted // block_size * block_size
                rows[row] = dataclasses.replace(rows[row], rate=kept / vision)
        return allocation

    made = dataclasses.replace(method, name=f"{name}_in_blocks_of_{block_size}", allocate=allocate)
    register_method(made, replace=True)
    return made.name


class Reference:
    """A model of transformers that answers one request after the other."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    def inputs(self, request: Request) -> Any:
        """What the processor makes of a request."""
        images = [picture(*one) for one in request["images"]]
        return self.processor(text=[request["text"]], images=images or None, return_tensors="pt")

    def answer(self, request: Request, config: PLPHPConfig | None = None) -> tuple[list[int], Any]:
        """The tokens of the answer, and the report of what was kept where there is a config."""
        inputs = self.inputs(request)
        length = {"max_new_tokens": request["max_tokens"], "min_new_tokens": request["max_tokens"]}
        if config is None:
            output, report = self.model.generate(**inputs, **length, do_sample=False), None
        else:
            with plphp.prune(self.model, config) as session:
                output = self.model.generate(**inputs, **length, do_sample=False)
            report = session.report
        return output[0, inputs["input_ids"].shape[1] :].tolist(), report


def text_with(images: int, question: str, before: str = "") -> str:
    """A prompt with images in front of a question."""
    return f"<|im_start|>user\n{before}{IMAGE * images}{question}<|im_end|>\n<|im_start|>assistant\n"


def requests(images: Sequence[Sequence[tuple[int, int, int]]], max_tokens: int = 24) -> list[Request]:
    """Requests with the given images, of different length and with different questions."""
    return [
        {
            "text": text_with(len(some), f"What is in row {number}? " * (1 + number % 3), "Look. " * (number % 4)),
            "images": [list(one) for one in some],
            "max_tokens": max_tokens,
        }
        for number, some in enumerate(images)
    ]
