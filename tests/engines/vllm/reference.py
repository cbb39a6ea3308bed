# SPDX-License-Identifier: Apache-2.0
"""The same answers from transformers with a `PrunedCache` whose rates are rounded to whole blocks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import plphp
from engine import Request, video_metadata
from pictures import frames, load
from plphp import PLPHPConfig
from plphp.methods.registry import get_method, register_method
from plphp.policy.allocation import kept_count
from tiny_checkpoint import IMAGE, VIDEO


def in_blocks(name: str, block_size: int) -> str:
    """Register a method that keeps so much more than another that what it evicts fills whole blocks."""
    method = get_method(name)
    assert method.kv is not None

    def allocate(layers: Any, config: PLPHPConfig) -> Any:
        allocation = method.kv.allocate(layers, config)
        for layer, rows in zip(layers, allocation, strict=True):
            for row, vision in enumerate(layer.scores.vision.sum(1).tolist()):
                evicted = vision - kept_count(rows[row].rate, vision, config.min_kept)
                kept = vision - evicted // block_size * block_size
                rows[row] = dataclasses.replace(rows[row], rate=kept / vision)
        return allocation

    stage = dataclasses.replace(method.kv, allocate=allocate, at_most=None)  # whole blocks are more than its bound
    made = dataclasses.replace(method, name=f"{name}_in_blocks_of_{block_size}", kv=stage)
    register_method(made, replace=True)
    return made.name


class Reference:
    """A model of transformers that answers one request after the other."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    def inputs(self, request: Request) -> Any:
        """What the processor makes of a request."""
        images = [load(one) for one in request["images"]]
        videos = [torch.from_numpy(frames(*one)).permute(0, 3, 1, 2) for one in request.get("videos", ())]
        told = [video_metadata(len(one)) for one in videos]
        given = {"images": images, "videos": videos, "video_metadata": told}
        given = {name: some for name, some in given.items() if some}
        return self.processor(text=[request["text"]], **given, return_tensors="pt")

    def answer(self, request: Request, config: PLPHPConfig | None = None) -> tuple[list[int], Any]:
        """The tokens of the answer, and the report of what was kept where there is a config."""
        tokens, _, report = self._generate(request, config)
        return tokens, report

    def gap(self, request: Request, config: PLPHPConfig, tokens: list[int]) -> float:
        """Where an answer parts from that of transformers, how much higher the logit of the latter's token is."""
        own, logits, _ = self._generate(request, config)
        for row, mine, other in zip(logits, own, tokens, strict=True):
            if mine != other:
                return (row[0, mine] - row[0, other]).item()
        return 0.0

    def _generate(self, request: Request, config: PLPHPConfig | None) -> tuple[list[int], Any, Any]:
        """Tokens, logits and report."""
        inputs = self.inputs(request)
        length = {"max_new_tokens": request["max_tokens"]}
        if not request.get("stops", False):
            length["min_new_tokens"] = request["max_tokens"]
        options = {**length, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        with nullcontext() if config is None else plphp.prune(self.model, config) as session:
            output = self.model.generate(**inputs, **options)
        report = None if session is None else session.report
        return output.sequences[0, inputs["input_ids"].shape[1] :].tolist(), output.logits, report


def text_with(marks: str, question: str, before: str = "") -> str:
    """A prompt with images or videos in front of a question."""
    return f"<|im_start|>user\n{before}{marks}{question}<|im_end|>\n<|im_start|>assistant\n"


def requests(images: Sequence[Sequence[tuple[int, int, int]]], max_tokens: int = 24) -> list[Request]:
    """Requests with the given images, of different length and with different questions."""
    return [
        {
            "text": text_with(IMAGE * len(some), f"What is in row {n}? " * (1 + n % 3), "Look. " * (n % 4)),
            "images": [list(one) for one in some],
            "max_tokens": max_tokens,
        }
        for n, some in enumerate(images)
    ]


def video_request(videos: Sequence[tuple[int, int, int, int]], images: Sequence[tuple[int, int, int]] = ()) -> Request:
    """A request with videos, given as for `pictures.frames`, and then images."""
    text = text_with(VIDEO * len(videos) + IMAGE * len(images), "What happens?")
    return {"text": text, "images": list(images), "videos": list(videos), "max_tokens": 24}


EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "images"


def example_requests(processor: Any) -> list[Request]:
    """The questions of ``examples/images``, for the bundled model; each with its right ``answer``."""
    made = []
    for one in json.loads((EXAMPLES / "questions.json").read_text(encoding="utf-8")):
        content = [*({"type": "image"} for _ in one["images"]), {"type": "text", "text": one["question"]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        images = [str(EXAMPLES / name) for name in one["images"]]
        made.append({"text": text, "images": images, "max_tokens": 128, "stops": True, "answer": one["answer"]})
    return made
