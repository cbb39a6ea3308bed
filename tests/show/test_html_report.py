# SPDX-License-Identifier: Apache-2.0
"""The page as text: one file that asks for nothing, texts that stay texts, and bits that are the tokens kept."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from page_samples import HOSTILE, NAMES, ORIGIN, SETTINGS, answered, images, picture, report
from PIL import Image

from plphp import ConfigError, PLPHPConfig
from plphp.evaluation import make_variants
from plphp.pruning.prompt_report import PromptReport
from plphp.pruning.stage_report import StageReport
from plphp.settings.presets import compared
from plphp.show.html_report import PAGE, SCRIPTS, html_report, report_data
from plphp.show.kept_bits import kept_values, packed
from plphp.studies.question_runs import FULL, Answer, AnsweredQuestion, Question, Setting

LARGEST = 1_000_000
"""Bytes of a page of three questions and ten runs."""


def unpacked(text: str, shape: tuple[int, ...]) -> Any:
    """The truth values that `packed` made a text of."""
    bits = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    return np.unpackbits(bits, count=int(np.prod(shape)), bitorder="little").astype(bool).reshape(shape)


class Parts(HTMLParser):
    """The elements of a page with their attributes and texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")
        self.inside = True

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def text(self, tag: str) -> list[str]:
        return [text for (name, _), text in zip(self.elements, self.texts, strict=True) if name == tag]


def page(*questions: AnsweredQuestion) -> str:
    return html_report(questions or [answered()], SETTINGS, ORIGIN)


def data_of(text: str) -> Any:
    return json.loads(Parts(text).text("script")[0])


class TestPage:
    def test_it_holds_the_data(self) -> None:
        questions = [answered(), answered("Where?", references=())]
        assert data_of(page(*questions)) == report_data(questions, SETTINGS, ORIGIN)

    def test_nothing_is_fetched(self) -> None:
        text = page()
        assert re.findall(r"https?:", text) == []
        assert not re.search(r"\bfetch\b|XMLHttpRequest|WebSocket|\bimport\b|@import|url\(|\beval\b|innerHTML", text)
        for tag, attributes in Parts(text).elements:
            assert "src" not in attributes, tag
            assert (attributes.get("href") or "data:").startswith("data:"), tag

    def test_the_policy_allows_its_own_script_and_style_alone(self) -> None:
        parts = Parts(page())
        (policy,) = (
            values["content"] for tag, values in parts.elements if values.get("http-equiv") == "Content-Security-Policy"
        )
        hashes = [
            base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            for text in (parts.text("style")[0], parts.text("script")[1])
        ]
        expected = f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'"
        assert policy == expected

    @pytest.mark.parametrize("where", ["question", "answer", "reference", "model", "label", "refusal"])
    def test_no_text_becomes_markup(self, where: str) -> None:
        question, settings, origin = answered(), list(SETTINGS), dict(ORIGIN)
        if where == "question":
            question = answered(HOSTILE)
        elif where == "answer":
            question = answered(answers=(HOSTILE,) * 4)
        elif where == "reference":
            question = answered(references=(HOSTILE,))
        elif where == "model":
            origin["model"] = HOSTILE
        elif where == "label":
            settings[1] = dataclasses.replace(settings[1], label=HOSTILE)
        else:
            question.answers[-1] = Answer("", None, HOSTILE)
        text = html_report([question], settings, origin)
        plain = [tag for tag, _ in Parts(page()).elements]
        assert [tag for tag, _ in Parts(text).elements] == plain
        assert HOSTILE in json.dumps(data_of(text), ensure_ascii=False).replace('\\"', '"')

    def test_a_name_of_a_part_in_a_text_is_not_filled_in(self) -> None:
        (question,) = data_of(page(answered("@SCRIPT@ @POLICY@ @NONE@")))["questions"]
        assert question["text"] == "@SCRIPT@ @POLICY@ @NONE@"

    def test_three_questions_and_ten_runs_are_small(self) -> None:
        """At the size of the bundled model with three images, of noise, and with rungs in every run."""
        shown = images([(1, 14, 14)] * 3)
        settings = [FULL, *(Setting(f"m{run}", None, PLPHPConfig()) for run in range(10))]
        size = {"layers": 8, "heads": 4, "rungs": ("pq", "rvq")}
        runs = [Answer("row " * 40, report(shown, 0.7, **size, seed=number)) for number in range(11)]
        questions = [
            AnsweredQuestion(Question("What?", [picture(3 * number + own, 224) for own in range(3)]), runs)
            for number in range(3)
        ]
        assert len(html_report(questions, settings, ORIGIN).encode()) < LARGEST

    def test_every_file_of_the_folder_is_part_of_it(self) -> None:
        assert {path.name for path in PAGE.iterdir()} == {"page.html", "style.css", *(f"{name}.js" for name in SCRIPTS)}

    def test_refusals(self) -> None:
        with pytest.raises(ConfigError, match="at least one question"):
            html_report([], SETTINGS, ORIGIN)
        with pytest.raises(ConfigError, match="for each of the 4 settings"):
            html_report([answered()], SETTINGS[:-1], ORIGIN)


class TestData:
    def test_answers(self) -> None:
        (question,) = report_data([answered()], SETTINGS, ORIGIN)["questions"]
        answers = dict(zip(NAMES, question["answers"], strict=True))
        assert [answers[name]["right"] for name in NAMES] == [True, True, False, True, False]
        assert [answers[name]["same"] for name in NAMES] == [True, True, False, True, False]
        assert (answers["plphp@0.5"]["held"], answers["plphp@0.5"]["full"]) == (500, 1000)
        assert answers["random@0.5"]["refusal"] == "random cannot <b>do</b> it"

    def test_without_a_right_answer_nothing_is_right_or_wrong(self) -> None:
        (question,) = report_data([answered(references=())], SETTINGS, ORIGIN)["questions"]
        assert {answer["right"] for answer in question["answers"]} == {None}

    def test_an_image_stands_there_once(self) -> None:
        questions = [answered(), answered("Where?", grids=((1, 4, 5), None))]
        data = report_data(questions, SETTINGS, ORIGIN)
        assert [question["pictures"] for question in data["questions"]] == [[0], [0, 1]]
        assert len(data["pictures"]) == 2

    def test_images_are_made_smaller_and_keep_their_colours(self) -> None:
        question = answered()
        large = dataclasses.replace(question.question, images=[Image.new("RGB", (2000, 1000), (200, 30, 90))])
        data = report_data([dataclasses.replace(question, question=large)], SETTINGS, ORIGIN)
        head, _, content = data["pictures"][0].partition(",")
        drawn = Image.open(BytesIO(base64.b64decode(content)))
        assert (head, drawn.size) == ("data:image/png;base64", (448, 224))
        assert drawn.getpixel((5, 5)) == (200, 30, 90)

    def test_a_photograph_is_a_jpeg(self) -> None:
        assert report_data([answered()], SETTINGS, ORIGIN)["pictures"][0].startswith("data:image/jpeg;base64,")


class TestBits:
    @pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 8), (7, 11)])
    def test_what_is_packed_is_unpacked(self, shape: tuple[int, int]) -> None:
        marks = np.random.default_rng(0).random(shape) < 0.5
        assert np.array_equal(unpacked(packed(marks), shape), marks)

    def test_they_are_the_tokens_of_the_report(self) -> None:
        shown = images([(1, 3, 4), None])
        kept = report(shown, 0.6, rungs=("pq", "c3"), seed=3).prompts[0]
        values, tokens = kept_values(kept), [position for image in shown for position in image.positions]
        assert [way["name"] for way in values["ways"]] == ["pq", "c3", "whole"]
        planes = {way["name"]: unpacked(way["bits"], (3, 2, len(tokens))) for way in values["ways"]}
        for number, layer in enumerate(kept.layers):
            row = layer.rows[0]
            for head in range(2):
                held = {name: set(np.array(tokens)[plane[number, head]]) for name, plane in planes.items()}
                assert set.union(*held.values()) == set(row.kept_positions[head])
                assert {tier.rung: set(tier.positions[head]) for tier in row.tiers} == {
                    name: held[name] for name in ("pq", "c3")
                }
        assert [way["share"] for way in values["ways"]] == [2 / 16, 3 / 16, 1.0]

    def test_layers_with_other_numbers_of_heads(self) -> None:
        shown = images([(1, 2, 2)])
        first, second = (report(shown, 0.5, layers=1, heads=heads).prompts[0].layers[0] for heads in (1, 3))
        values = kept_values(PromptReport(0, 9, [shown], [first, second]))
        assert [layer["heads"] for layer in values["layers"]] == [1, 3]
        assert unpacked(values["ways"][0]["bits"], (4, 4)).sum(axis=1).tolist() == [2] * 4

    def test_what_left_before_layers_got_it(self) -> None:
        stages = [StageReport("encoder", "a", 0, [4], [[5, 7, 8]]), StageReport("prefill", "b", 1, [3], [[7]])]
        values = kept_values(report(images([(1, 2, 2)]), 0.25, stages=stages).prompts[0])
        left = [(one["stage"], one["layer"], unpacked(one["bits"], (4,)).tolist()) for one in values["left"]]
        assert left == [
            ("encoder", 0, [False, True, False, False]),
            ("prefill", 1, [True, False, False, True]),
        ]


@pytest.mark.parametrize("bundled", [True, False])
def test_what_is_compared_by_default_makes_ten_runs(bundled: bool) -> None:
    variants = make_variants(*compared(bundled))
    assert variants[0].name == "full"
    assert len(variants[1:]) == 10
