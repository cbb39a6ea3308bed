# SPDX-License-Identifier: Apache-2.0
"""The server with tiny models of other families than the bundled one's: answers are those of ``generate``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from chat_client import Client, serving, user
from PIL import Image

import plphp
import tiny_processors
from plphp import PLPHPConfig
from plphp.inputs.loading import load_model
from plphp.inputs.prompt import build_inputs
from tiny_models import IMAGE, NEWEST, TINY

CONFIG = PLPHPConfig(target_retention=0.5)
LENGTH = 6
FOLDERS = {"gemma3", "idefics3", "llava-next", "ovis2"} if NEWEST else {"gemma3", "llava-next"}
"""Families that are read from a folder here; all else needs torchvision for it, in 5.17 more do."""


def picture(size: tuple[int, int]) -> Image.Image:
    return Image.effect_noise(size, 90).convert("RGB")


WIDE, TALL = picture((90, 50)), picture((40, 70))
SAID = {"role": "assistant", "content": "Noise."}
CHATS = {
    "an image": [user("What?", [WIDE])],
    "two images": [user("Which?", [WIDE, TALL])],
    "a second turn": [user("What?", [WIDE]), SAID, user("And here?", [TALL])],
    "text": [user("Hello")],
}


@pytest.fixture(scope="module", params=sorted(tiny_processors.PROCESSORS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model and its processor, by way of a folder in the hub's format where the processor can be read from one."""
    name = request.param
    model, processor = TINY[name].build(), tiny_processors.processor(name)
    return through_folder(model, processor, tmp_path_factory.mktemp(name)) if name in FOLDERS else (model, processor)


def through_folder(model: Any, processor: Any, folder: Path) -> tuple[Any, Any]:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return load_model(folder)


@pytest.fixture(scope="module")
def client(family: tuple[Any, Any]) -> Iterator[Client]:
    with serving(*family, CONFIG) as (client, served):
        served.try_out()
        yield client


def by_hand(model: Any, processor: Any, messages: list[dict[str, Any]]) -> tuple[str, dict[str, int], int, float]:
    """The answer, its usage, the image tokens of the prompt, and the share of them that is kept."""
    inputs = build_inputs(processor, messages=messages, text_alone=True)
    length = inputs["input_ids"].shape[1]
    with plphp.prune(model, CONFIG) as run, torch.no_grad():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=LENGTH)
    usage = {"prompt_tokens": length, "completion_tokens": LENGTH, "total_tokens": length + LENGTH}
    vision = int((inputs["input_ids"] == IMAGE).sum())
    return processor.decode(output[0, length:], skip_special_tokens=True), usage, vision, run.report.retention


@pytest.mark.parametrize("name", CHATS)
def test_answers_are_those_of_generate(name: str, family: tuple[Any, Any], client: Client) -> None:
    text, usage, vision, retention = by_hand(*family, CHATS[name])
    reply = client.answer(CHATS[name], max_tokens=LENGTH)
    assert (reply["choices"][0]["message"]["content"], reply["usage"]) == (text, usage)
    assert len(text) == LENGTH
    assert reply["plphp"]["vision_tokens"] == vision
    assert reply["plphp"]["retention"] == pytest.approx(retention, abs=1e-3)
    chunks = client.events(CHATS[name], max_tokens=LENGTH, stream_options={"include_usage": True})
    deltas = [choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]]
    assert "".join(deltas) == text
    assert (chunks[-1]["usage"], chunks[-1]["plphp"]) == (usage, reply["plphp"])
