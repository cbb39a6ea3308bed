# SPDX-License-Identifier: Apache-2.0
"""The page in headless Chromium: clicks, keys, what is shown, readable colours, a phone's width, no complaint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from page_samples import HOSTILE, ORIGIN, SETTINGS, answered, images, report
from PIL import Image

from plphp import PLPHPConfig
from plphp.pruning.prompt_report import LayerReport, PromptReport, RowReport
from plphp.pruning.stage_report import StageReport
from plphp.pruning.tier_report import TierReport
from plphp.show.html_report import html_report
from plphp.studies.question_runs import FULL, Answer, AnsweredQuestion, Question, Setting

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")

WHITE = Image.new("RGB", (80, 64), "white")
CONTRAST = 4.5
"""Of text, by WCAG 2 for AA."""
LEAST_CONTRAST = """(() => {
  const canvas = document.createElement("canvas"), context = canvas.getContext("2d", { willReadFrequently: true });
  const parse = (colour) => {
    context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].map((value) => value / 255);
  };
  const linear = (value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const light = (colour) => 0.2126 * linear(colour[0]) + 0.7152 * linear(colour[1]) + 0.0722 * linear(colour[2]);
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = parse(getComputedStyle(element).backgroundColor);
      if (colour[3] > 0.99) return colour;
    }
    return [1, 1, 1];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || ["SCRIPT", "STYLE"].includes(element.tagName) || !element.getClientRects().length) continue;
    const pair = [light(parse(getComputedStyle(element).color)), light(behind(element))].sort((a, b) => b - a);
    found.push([(pair[0] + 0.05) / (pair[1] + 0.05), element.tagName + " " + element.textContent.slice(0, 30)]);
  }
  return found.sort((a, b) => a[0] - b[0])[0];
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with a right answer, without, about two images of which one has no grid, and of a hostile text."""
    questions = [
        answered(),
        answered("Without a right answer?", references=()),
        answered("Two images?", grids=((1, 3, 3), None)),
        answered(HOSTILE, references=(HOSTILE,), answers=("a", "a b", HOSTILE, "")),
    ]
    made = tmp_path_factory.mktemp("page") / "page.html"
    made.write_text(html_report(questions, SETTINGS, ORIGIN), encoding="utf-8")
    return made


@pytest.fixture
def page(browser: Browser, path: Path) -> Iterator[Browser]:
    browser.open(path)
    yield browser
    assert browser.complaints() == []


def texts(page: Browser, selector: str) -> list[str]:
    return page.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((each) => each.textContent.trim())")


def chosen(page: Browser) -> dict[str, Any]:
    """What is marked as chosen: the question and, by their labels, the method and the layer and head."""
    label = "?.getAttribute('aria-label').split(':')[0]"
    return {
        "question": page.run(
            "[...document.querySelectorAll('#questions button')].findIndex((b) => b.ariaPressed === 'true')"
        ),
        "method": page.run(f"document.querySelector('#methods [aria-selected=true]'){label}"),
        "place": page.run(f"document.querySelector('#layers [aria-selected=true]'){label}"),
    }


class TestFirstScreen:
    def test_what_is_there(self, page: Browser) -> None:
        assert texts(page, "#questions button span") == [
            "What is there?",
            "Without a right answer?",
            "Two images?",
            HOSTILE,
        ]
        assert texts(page, "#methods [role=rowheader]") == ["full", "t10", "plphp", "random"]
        assert texts(page, "#methods [role=columnheader]") == ["50 %", "25 %"]
        assert texts(page, "#methods button") == ["✓ 100 %", "✓ 80 %", "✗ 50 %", "✓ 25 %", "\u2013"]
        assert texts(page, "#reference") == ["expected a red heart"]
        assert texts(page, "article p") == ["a red heart", "a red heart"]
        assert texts(page, ".bar b") == ["1000 B", "800 B", "800 B"]
        assert chosen(page) == {"question": 0, "method": "t10", "place": "all layers, all KV heads"}

    def test_bars_are_as_long_as_the_bytes(self, page: Browser) -> None:
        full, held, _ = page.run(
            "[...document.querySelectorAll('.bar i')].map((bar) => getComputedStyle(bar).backgroundSize)"
        )
        assert (full.split()[0], held.split()[0]) == ("100%", "80%")

    def test_shares_of_the_layers_are_those_of_the_report(self, page: Browser) -> None:
        assert texts(page, "#layers .cell") == ["80"] * 6
        page.click("[data-setting='3']")
        assert texts(page, "#layers .cell") == ["25"] * 6


class TestClicks:
    def test_a_method_shows_its_answer_with_the_differences_marked(self, page: Browser) -> None:
        page.click("[data-setting='2']")
        assert chosen(page)["method"] == "plphp@0.5"
        assert texts(page, "article h3") == ["✓ full cache", "✗ plphp@0.5"]
        assert (texts(page, "mark.lost"), texts(page, "mark.new")) == (["heart"], ["star"])

    def test_the_same_words_have_no_marks(self, page: Browser) -> None:
        page.click("[data-setting='3']")
        assert texts(page, "article h3")[1] == "✓ plphp@0.25"
        assert texts(page, "mark") == []

    def test_a_refusal_is_shown(self, page: Browser) -> None:
        page.click("[data-setting='4']")
        assert texts(page, "article p")[1] == "random cannot <b>do</b> it"
        assert texts(page, ".bar b") == ["1000 B"]
        assert page.run("document.getElementById('layers-card').hidden")

    def test_questions_without_a_right_answer_are_compared_with_the_full_cache(self, page: Browser) -> None:
        page.click("#questions button:nth-child(2)")
        assert texts(page, "#methods button") == ["= 100 %", "= 80 %", "≠ 50 %", "= 25 %", "\u2013"]
        assert page.run("document.getElementById('reference').hidden")

    def test_a_head_a_layer_and_a_head_of_all_layers(self, page: Browser) -> None:
        for layer, head, name in (
            (1, 0, "layer 1, KV head 0"),
            (2, -1, "layer 2, all KV heads"),
            (-1, 1, "all layers, KV head 1"),
        ):
            page.click(f"[data-layer='{layer}'][data-head='{head}']")
            assert chosen(page)["place"] == name
            assert texts(page, "#pictures-title span") == [name]

    def test_hostile_texts_stay_texts(self, page: Browser) -> None:
        page.click("#questions button:nth-child(4)")
        page.click("[data-setting='2']")
        assert texts(page, "article p")[1] == HOSTILE
        assert page.run("document.title") == "What tiny keeps of images"
        page.click("[data-setting='3']")
        assert texts(page, "article p")[1] == "no answer"


class TestKeys:
    def test_digits_choose_questions(self, page: Browser) -> None:
        page.press("3")
        assert chosen(page)["question"] == 2
        page.press("9")
        assert chosen(page)["question"] == 2

    def test_arrows_move_among_methods(self, page: Browser) -> None:
        page.press("m", "ArrowDown")
        assert chosen(page)["method"] == "plphp@0.5"
        page.press("ArrowRight")
        assert chosen(page)["method"] == "plphp@0.25"
        page.press("ArrowRight", "ArrowDown")
        assert chosen(page)["method"] == "random@0.5"
        page.press(*["ArrowUp"] * 9)
        assert chosen(page)["method"] == "full"
        assert page.run("document.activeElement.dataset.setting") == "0"

    def test_arrows_move_among_layers_and_heads(self, page: Browser) -> None:
        page.press("l", "ArrowDown", "ArrowDown", "ArrowRight")
        assert chosen(page)["place"] == "layer 1, KV head 0"
        page.press("2")
        assert chosen(page) == {"question": 1, "method": "t10", "place": "layer 1, KV head 0"}
        page.press("ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown")
        assert chosen(page)["place"] == "layer 2, KV head 1"
        page.press("Escape")
        assert chosen(page)["place"] == "all layers, all KV heads"

    def test_the_whole_picture(self, page: Browser) -> None:
        page.press("o")
        assert texts(page, "#pictures-title") == ["Whole picture"]
        page.press("o")
        assert texts(page, "#pictures-title")[0].startswith("Kept by t10")

    def test_tab_comes_to_each_table_once(self, page: Browser) -> None:
        reached = []
        for _ in range(8):
            page.press("Tab")
            reached.append(page.run("document.activeElement.closest('[role=grid]')?.id ?? null"))
        assert [name for name in reached if name] == ["methods", "layers"]


class TestPictures:
    """A white picture of 2 x 2 tokens: the colour of a patch says how its token is held."""

    @pytest.fixture
    def shown(self, browser: Browser, tmp_path: Path) -> Iterator[Browser]:
        shown = images([(1, 2, 2)])
        whole = report(shown, 1.0, layers=1, heads=1)
        row = RowReport(0.3, "balanced", 0.5, 4, [[5, 6]], entry_bytes=16, tiers=[TierReport("c3", [[6]], [2])])
        stage = StageReport("encoder", "a", 0, [4], [[5, 6, 7]])
        prompt = PromptReport(0, 9, [shown], [LayerReport(0, [row])], [stage])
        mixed = dataclasses.replace(whole, prompts=[prompt])
        question = AnsweredQuestion(Question("?", [WHITE]), [Answer("a", whole), Answer("a", mixed)])
        path = tmp_path / "page.html"
        settings = [FULL, Setting("mixed", None, PLPHPConfig())]
        path.write_text(html_report([question], settings, ORIGIN), encoding="utf-8")
        browser.open(path)
        yield browser
        assert browser.complaints() == []

    def colours(self, page: Browser) -> list[list[int]]:
        at = "[[20, 8], [60, 8], [20, 40], [60, 40]]"
        return page.run(
            "(() => { const copy = document.createElement('canvas'), "
            "context = copy.getContext('2d', { willReadFrequently: true }); copy.width = 80; copy.height = 64; "
            "context.drawImage(document.querySelector('#pictures canvas'), 0, 0); "
            f"return {at}.map(([x, y]) => [...context.getImageData(x, y, 1, 1).data].slice(0, 3)); }})()"
        )

    def test_dropped_is_dark_few_bits_are_dim_and_whole_is_as_it_was(self, shown: Browser) -> None:
        whole, few, dropped, left = self.colours(shown)
        assert whole == [255, 255, 255]
        assert sum(dropped) < 250 < sum(few) < 700
        assert left[0] > left[1] + 30  # tinted
        shown.press("o")
        assert self.colours(shown) == [[255, 255, 255]] * 4

    def test_what_the_colours_mean_is_said(self, shown: Browser) -> None:
        assert texts(shown, "#scale .key") == [
            "dropped",
            "c3, 13 % of the bytes",
            "whole",
            "left before the layer got it",
        ]


class TestReadable:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("question", ["1", "2", "4"])
    def test_contrast(self, browser: Browser, path: Path, scheme: str, question: str) -> None:
        browser.open(path, scheme=scheme)
        browser.press(question, "m", "ArrowDown")
        contrast, where = browser.run(LEAST_CONTRAST)
        assert contrast >= CONTRAST, where
        dark = browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(14, 17, 23)"
        assert dark == (scheme == "dark")

    @pytest.mark.parametrize("width", [360, 700, 1280])
    @pytest.mark.parametrize("question", ["1", "3", "4"])
    def test_no_width_scrolls_sideways(self, browser: Browser, path: Path, width: int, question: str) -> None:
        browser.open(path, width=width, height=740)
        browser.press(question)
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run(
            "[...document.querySelectorAll('.card')].every((card) => card.scrollWidth <= card.clientWidth)"
        )
        assert browser.complaints() == []

    def test_many_heads_fit_a_phone(self, browser: Browser, tmp_path: Path) -> None:
        shown = images([(1, 4, 4)])
        answers = [Answer("a", report(shown, share, layers=32, heads=32)) for share in (1.0, 0.5)]
        question = AnsweredQuestion(Question("?", [WHITE]), answers)
        path = tmp_path / "page.html"
        path.write_text(html_report([question], [FULL, SETTINGS[2]], ORIGIN), encoding="utf-8")
        browser.open(path, width=360, height=740)
        assert browser.run("document.documentElement.scrollWidth") <= 360
        browser.click("[data-layer='31'][data-head='31']")
        assert chosen(browser)["place"] == "layer 31, KV head 31"

    def test_every_button_and_picture_has_a_name(self, page: Browser) -> None:
        nameless = (
            "[...document.querySelectorAll('button, canvas[role=img], img, input, [role=grid]')].filter((each) => "
        )
        nameless += "!(each.textContent.trim() || each.ariaLabel || each.alt || each.labels?.length || "
        nameless += "each.getAttribute('aria-labelledby'))).length"
        assert page.run(nameless) == 0
