# SPDX-License-Identifier: Apache-2.0
"""The model that ships inside the package: it loads without custom code and answers the example questions."""

from __future__ import annotations

import json
import string
import warnings
from pathlib import Path
from threading import Thread

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer

import plphp
from plphp.policy.bank import bank_at

FOLDER = Path(plphp.__file__).parent / "reference_model"
EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "images"
QUESTIONS = json.loads((EXAMPLES / "questions.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def processor():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return AutoProcessor.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return AutoModelForImageTextToText.from_pretrained(FOLDER, local_files_only=True, dtype=torch.float32).eval()


def _user(question: str, images=()) -> dict:
    content = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": question}]}


def _example(entry: dict) -> list[dict]:
    return [_user(entry["question"], [str(EXAMPLES / name) for name in entry["images"]])]


def _generate(model, processor, conversations: list[list[dict]]) -> list[str]:
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    with torch.inference_mode():
        out = model.generate(**inputs)
    return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_folder_is_complete_and_small() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "processor_config.json",
        "chat_template.jinja",
        "README.md",
    } <= names
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 40_000_000


@pytest.mark.parametrize("index", range(len(QUESTIONS)))
def test_it_answers_the_example_questions(model, processor, index: int) -> None:
    entry = QUESTIONS[index]
    assert _generate(model, processor, [_example(entry)]) == [entry["answer"]]


def test_a_left_padded_batch_answers_as_its_rows_do(model, processor) -> None:
    entries = QUESTIONS[-4:]
    answers = _generate(model, processor, [_example(entry) for entry in entries])
    assert answers == [entry["answer"] for entry in entries]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1"])
def test_any_image_mode_and_size_gives_196_vision_tokens(processor, mode: str) -> None:
    image = Image.new("RGB", (333, 41), (200, 30, 30)).convert(mode)
    inputs = processor.apply_chat_template(
        [_user("List row 1.", [image])],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert inputs["pixel_values"].shape == (1, 3, 112, 112)
    vision = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert vision == 196
    assert 0.6 <= vision / inputs["input_ids"].shape[1] <= 0.85


def test_the_tokenizer_gives_every_printable_text_back(processor) -> None:
    for text in (string.printable, "Row 1: red star, nothing.\nRow 2: K7QX", "naïve  日本\t"):
        ids = processor.tokenizer.encode(text)
        assert processor.tokenizer.unk_token_id not in ids or processor.tokenizer.unk_token_id is None
        assert processor.tokenizer.decode(ids) == text


def test_the_chat_template_takes_system_text_and_several_turns(processor) -> None:
    image = Image.new("RGB", (112, 112))
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        _user("List row 1.", [image, image]),
        {"role": "assistant", "content": [{"type": "text", "text": "Row 1 shows: red star."}]},
        _user("And this one?", [image]),
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == (
        "<|system|>Be brief.<|end|>\n"
        "<|user|>Image 1: <image>\nImage 2: <image>\nList row 1.<|end|>\n"
        "<|assistant|>Row 1 shows: red star.<|end|>\n"
        "<|user|>Image 3: <image>\nAnd this one?<|end|>\n"
        "<|assistant|>"
    )
    assert processor.apply_chat_template([_user("Hi")]).startswith("<|system|>You are a careful assistant.")
    empty = [{"role": "system", "content": ""}, _user("Hi")]
    assert processor.apply_chat_template(empty) == "<|user|>Hi<|end|>\n"


def test_a_streamed_answer_is_the_same_text(model, processor) -> None:
    entry = next(entry for entry in QUESTIONS if entry["kind"] == "lines")
    inputs = processor.apply_chat_template(
        _example(entry), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    thread = Thread(target=model.generate, kwargs={**inputs, "streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == _generate(model, processor, [_example(entry)])[0]


def test_the_bundled_bank_has_codebooks_that_fit(model) -> None:
    """Learned from so many vision tokens that every centroid is the mean of some."""
    bank = bank_at("bundled")
    text = model.config.text_config
    assert bank.books is not None
    assert list(bank.books) == list(range(text.num_hidden_layers))
    assert bank.record["book_tokens"] > 40_000
    for books in bank.books.values():
        books.check(text.num_key_value_heads, text.head_dim, text.head_dim)
        for side in (books.keys, books.values):
            assert side.residual.float().square().mean() < side.fine.float().square().mean() / 2
            assert all(len(part.unique(dim=0)) == 256 for part in side.fine.flatten(0, 1))
