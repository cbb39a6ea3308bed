# SPDX-License-Identifier: Apache-2.0
"""``plphp chat``: turns by one cache, commands, refusals and interrupts, with lines from a pipe."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from typer.testing import Result

import plphp
import tiny_hub
from plphp import PLPHPConfig, PrunedCache, PruneReport
from plphp.cli import _chat_lines as chat_lines
from plphp.engines.hf.cache_argument import cache_in, passed
from plphp.engines.hf.ongoing_chat import OngoingChat
from plphp.inputs.loading import load_model
from plphp.inputs.prompt import build_inputs
from plphp.pruning import image_report

TOKENS = 6


def talk(folder: Path, *lines: object, options: tuple[object, ...] = ()) -> Result:
    command = ["chat", "--model", folder, "--max-new-tokens", TOKENS, *options]
    return run(*command, lines="".join(f"{line}\n" for line in lines))


def values(done: Result) -> list[dict[str, Any]]:
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def by_hand(folder: Path, config: PLPHPConfig, turns: list[tuple[str, list[Path]]]) -> tuple[list[str], PruneReport]:
    """The answers of one cache, which is given the tokens that it has read with those of each question behind them."""
    model, processor = load_model(str(folder))
    read, cache, answers = torch.zeros(1, 0, dtype=torch.long), None, []
    with plphp.prune(model, config) as run, torch.no_grad():
        for question, images in turns:
            inputs = build_inputs(processor, question, images=[str(image) for image in images], text_alone=True)
            # The template writes nothing behind an answer; a prompt's first token is at the beginning alone.
            new = inputs["input_ids"] if cache is None else inputs["input_ids"][:, 1:]
            inputs["input_ids"] = read = torch.cat([read, new], 1)
            inputs["attention_mask"] = torch.ones_like(read)
            output: Any = model.generate(
                **inputs, **passed(cache), do_sample=False, max_new_tokens=TOKENS, return_dict_in_generate=True
            )
            cache = cache_in(output)
            answer = output.sequences[0, read.shape[1] :].tolist()
            answers.append(processor.decode(answer, skip_special_tokens=True).strip())
            ends = answer[-1] == model.generation_config.eos_token_id
            read = output.sequences[:, :-1] if ends else output.sequences
        return answers, run.report


SETTINGS = [
    *("none", "quantized:tiers=r4", "plphp:target_retention=0.4", "snapkv:retention_rate=0.4", "zipvl:tau=0.9"),
    *("divprune:keep=0.5", "fastv:retention_rate=0.7", "divprune:keep=0.5+plphp:target_retention=0.5"),
    "query_bank:retention_rate=0.4,collect=2",
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_chat_is_one_cache(settings: str, folder: Path, picture: Path) -> None:
    turns: list[tuple[str, list[Path]]] = [("What?", [picture]), ("And?", []), ("This?", [picture, picture])]
    lines = ["What?", "", "And?", f"/image {picture}", f"/image {picture}", "This?", "/images", "/quit", "never"]
    said = values(talk(folder, *lines, options=("--image", picture, "--config", settings, "--json")))
    answers, report = by_hand(folder, PLPHPConfig.parse(settings), turns)
    assert [line["answer"] for line in said[:-1]] == answers
    assert (said[-2]["kv_bytes"], said[-2]["kv_bytes_full"]) == (report.entry_bytes, report.kv_bytes_full)
    assert said[1]["read"] < said[0]["read"] < said[2]["read"]
    if not settings.startswith(("query_bank", "none")):  # these have no report of prompts
        assert [image["tokens"] for image in said[-1]["images"]] == [tiny_hub.IMAGE_TOKENS] * 3
        assert [image["number"] for image in said[-1]["images"]] == [0, 1, 2]


def test_text_is_streamed_and_the_rest_stands_beside_it(folder: Path, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    done = talk(folder, f"/image {picture}", "What?", "/images", "/help", options=("--report", out, "--system", "Hi."))
    quiet = values(talk(folder, f"/image {picture}", "What?", options=("--json", "--system", "Hi.")))
    assert done.exit_code == 0
    assert quiet[0]["answer"] in done.stdout
    assert "what is held of each image" in done.stdout
    assert "KV cache" in done.stderr
    assert PruneReport.from_json(out).entry_bytes == quiet[0]["kv_bytes"]


def test_without_a_question(folder: Path) -> None:
    done = talk(folder, "/images", "/quit")
    assert (done.exit_code, done.stdout) == (0, "No image was read so far.\n")


REFUSED = {
    "/image nope.png": "There is no image file nope.png",
    "/imges": "There is no command '/imges'. Did you mean '/images'?",
    "/forget 0": "vision_budget=1GB",
    "/restore 0": "vision_budget=1GB",
    "What? <image>": "1 image slot",
}


REFUSED_UNDER_A_BUDGET = {
    "/forget 1": "of 1 that were read, got '1'",
    "/forget all": "takes the number of an image",
    "/restore -1": "takes the number of an image",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_refused_changes_nothing(line: str, folder: Path, picture: Path) -> None:
    expected = values(talk(folder, "What?", "And?", options=("--image", picture, "--json")))
    done = talk(folder, "What?", line, "And?", options=("--image", picture, "--json"))
    said = [json.loads(text) for text in done.stdout.splitlines()]
    assert done.exit_code == 2  # of a pipe: a script is to notice
    assert [said[0], said[2]] == expected
    assert REFUSED[line] in said[1]["error"]
    assert REFUSED[line] in done.stderr


BUDGET = "quantized:vision_budget=20 tokens"


def test_images_are_those_of_the_cache(folder: Path, picture: Path) -> None:
    lines = ["What?", f"/image {picture}", "This?", "/images"]
    said = values(talk(folder, *lines, options=("--image", picture, "--config", BUDGET, "--json")))
    images = said[-1]["images"]
    assert [(image["number"], image["turn"], image["tokens"]) for image in images] == [(0, 1, 16), (1, 2, 16)]
    assert all(0 < image["held"] < 1 and image["entries"] for image in images)
    assert said[1]["wanted"] == [image["number"] for image in images if image["wanted"]]
    assert sum(image["nbytes"] for image in images) <= 20 * images[0]["whole_bytes"] / 16
    shown = talk(folder, *lines, options=("--image", picture, "--config", BUDGET)).stdout
    assert "2 images in" in shown
    assert "of a budget of" in shown


def test_an_image_that_is_wanted_back_is_named(folder: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_report, "FADED", 1.0)
    monkeypatch.setattr(image_report, "ASKED", 0.0)
    options = ("--image", picture, "--config", BUDGET)
    assert "The answer turns to image 0 (faded to" in talk(folder, "What?", options=options).stderr
    assert values(talk(folder, "What?", options=(*options, "--json")))[0]["wanted"] == [0]


def test_an_image_alone_is_not_offered_to_be_restored(
    folder: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes all of the budget already."""
    monkeypatch.setattr(image_report, "FADED", 1.0)
    monkeypatch.setattr(image_report, "ASKED", 0.0)
    said = talk(folder, "What?", options=("--image", picture, "--config", "none:vision_budget=8 tokens")).stderr
    assert "The answer turns to image 0 (faded to" in said
    assert "no other image is held: a larger vision_budget would hold more of it.\n" in said
    assert "restor" not in said


def test_the_time_of_pruning_is_that_of_the_turn(folder: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restored image takes time between two turns, which is not in either."""
    spent, caches = iter((1.0, 0.25, 0.5)), list[Any]()
    generate, restore = OngoingChat.generate, OngoingChat.restore

    def timed(self: OngoingChat, turn: Any, **options: Any) -> Any:
        before = 0.0 if self.cache is None else self.cache.pruning_seconds
        tokens = generate(self, turn, **options)
        caches.append(self.cache)
        self.cache.pruning_seconds = before + next(spent)
        return tokens

    def slow(self: OngoingChat, *image: Any) -> None:
        restore(self, *image)
        self.cache.pruning_seconds += 7.0

    monkeypatch.setattr(OngoingChat, "generate", timed)
    monkeypatch.setattr(OngoingChat, "restore", slow)
    options = ("--image", picture, "--config", "none:vision_budget=1GB")
    said = talk(folder, "What?", "And?", "/restore 0", "More?", options=options).stderr
    assert re.findall(r"pruning took ([\d.]+) ms", said) == ["1000.0", "250.0", "500.0"]
    assert caches[0].report().pruning_seconds > 8.75


@pytest.mark.parametrize("host", ["", ",tier_device=cpu"], ids=["computed", "from host memory"])
def test_forget_and_restore(host: str, folder: Path, picture: Path) -> None:
    """The second image of a question, behind another question; a restored image is as if it had stayed."""
    other = tiny_hub.picture(picture.with_name("b.png"), seed=1)
    config = f"none:vision_budget=1GB{host}"
    before = ["What?", f"/image {picture}", f"/image {other}", "These?", "Then?"]
    changes = ["/forget 2", "/restore 2"]
    options = ("--image", picture, "--config", config, "--json")
    said = values(talk(folder, *before, *changes, "And?", options=options))
    forgotten, restored = (line["images"] for line in said[3:5])
    assert [(image["forgotten"], image["nbytes"] > 0) for image in forgotten] == [(False, True)] * 2 + [(True, False)]
    assert [(image["forgotten"], image["held"]) for image in restored] == [(False, 1.0)] * 3
    expected = values(talk(folder, *before, "And?", options=options))
    assert said[-1]["answer"] == expected[-1]["answer"]
    assert said[-1]["kv_bytes"] == expected[-1]["kv_bytes"]


def test_another_picture_is_not_restored(folder: Path, picture: Path, tmp_path: Path) -> None:
    """A file that has changed since; the chat goes on as before."""
    changing = tiny_hub.picture(tmp_path / "c.png")
    options = ("--image", changing, "--config", BUDGET, "--json")
    load, calls, first = chat_lines.load_image, [], changing.read_bytes()

    def changed(source: Any, **how: Any) -> Any:
        calls.append(source)
        return load(tiny_hub.picture(changing, seed=7) if len(calls) == 1 else source, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_lines, "load_image", changed)
        done = talk(folder, "What?", "/restore 0", "And?", options=options)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(calls) == 1
    assert "not among the 1 whose features" in said[1]["error"]
    changing.write_bytes(first)
    assert [said[0], said[2]] == values(talk(folder, "What?", "And?", options=options))


@pytest.mark.parametrize("line", REFUSED_UNDER_A_BUDGET)
def test_a_number_of_no_image(line: str, folder: Path, picture: Path) -> None:
    done = talk(folder, "What?", line, options=("--image", picture, "--config", BUDGET, "--json"))
    assert REFUSED_UNDER_A_BUDGET[line] in json.loads(done.stdout.splitlines()[1])["error"]


def interrupted(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Press Ctrl-C in the second answer."""
    generate, calls = OngoingChat.generate, []

    def press(self: OngoingChat, turn: Any, **options: Any) -> Any:
        calls.append(turn)
        for _ in range(times if len(calls) == 2 else 0):
            signal.raise_signal(signal.SIGINT)
        return generate(self, turn, **options)

    monkeypatch.setattr(OngoingChat, "generate", press)


def test_an_interrupt_ends_the_answer_and_not_the_chat(
    folder: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(monkeypatch, 1)
    before = signal.getsignal(signal.SIGINT)
    said = values(talk(folder, "What?", "And?", "More?", options=("--image", picture, "--json")))
    assert [line["interrupted"] for line in said] == [False, True, False]
    assert [line["tokens"] for line in said] == [TOKENS, 1, TOKENS]
    assert signal.getsignal(signal.SIGINT) == before


def test_a_second_interrupt_ends_the_chat(folder: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch, 2)
    done = talk(folder, "What?", "And?", "More?", options=("--image", picture, "--json"))
    assert (done.exit_code, len(done.stdout.splitlines())) == (130, 1)


def test_an_error_in_an_answer_is_taken_back_or_ends_the_chat(
    folder: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = values(talk(folder, "What?", "And?", options=("--image", picture, "--json")))
    note_answer, calls = PrunedCache.note_answer, []

    def fail(self: PrunedCache, output: Any) -> None:
        calls.append(output)
        if len(calls) in (2, 4):
            raise plphp.UnsupportedFeatureError("not this one")
        note_answer(self, output)

    monkeypatch.setattr(PrunedCache, "note_answer", fail)
    lines = ["What?", "Who?", "And?", f"/image {picture}", "This?", "never"]
    done = talk(folder, *lines, options=("--image", picture, "--json"))
    said = [json.loads(text) for text in done.stdout.splitlines()]
    assert done.exit_code == 2
    assert [said[0], said[2]] == expected
    assert ["error" in line for line in said] == [False, True, False, True]
