# SPDX-License-Identifier: Apache-2.0
"""Reports say what is held of each image: in a table, in a line, and in JSON."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from memory_chat import converse
from plphp.pruning import image_report
from plphp.show.memory_table import memory_line, memory_table, restoring_may_help, wanted_line
from plphp.show.tables import layer_tables, report_values, summary
from tiny_models import TIERS, tiers_model


def test_a_table_a_line_and_json() -> None:
    cache = converse(tiers_model("llava"), TIERS["llava"], "none:vision_budget=12kB", 3, rows=(1, 1)).cache
    cache.forget(2)
    report = cache.report()
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(*layer_tables(report, 1))
    text = console.export_text()
    assert "6 images in" in text
    assert "of a budget of 11.7 KiB" in text
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[:1] == "│"]
    rows = lines[-6:]
    assert [row[:4] for row in rows] == [[str(n), str(n % 2), str(1 + n // 2), "16"] for n in range(6)]
    assert rows[2][4] == "forgotten"
    assert rows[5][5].endswith("%")
    assert rows[5][6] == f"{report.images[5].attention:.2f}"
    assert memory_line(report) in summary(report)
    values = report_values(report)
    assert values["images"][5]["held"] == pytest.approx(report.images[5].nbytes / report.images[5].whole_bytes)
    assert values["vision_bytes"] == sum(image["nbytes"] for image in values["images"])


def test_images_that_an_answer_turns_to(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = converse(tiers_model("llava"), TIERS["llava"], "none:vision_budget=3kB", 2, min_new_tokens=3).cache
    assert wanted_line(cache.report()) == ""
    monkeypatch.setattr(image_report, "FADED", 1.0)
    monkeypatch.setattr(image_report, "ASKED", max(image.attention for image in cache.images))
    report = cache.report()
    [image] = report.wanted
    assert wanted_line(report) == (
        f"The answer turns to image {image.number} (faded to {image.held:.1%} of its bytes): restoring may help."
    )
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(memory_table(report))
    assert console.export_text().count(" wanted") == 1
    assert [own["wanted"] for own in report_values(report)["images"]] == [own is image for own in report.images]


def image(number: int, nbytes: int, *, attention: float = 0.0) -> image_report.ImageMemory:
    return image_report.ImageMemory(
        number, 0, 1, 1, 16, 16, None, forgotten=not nbytes, nbytes=nbytes, whole_bytes=1000, attention=attention
    )


@pytest.mark.parametrize(
    ("others", "budget", "helps"),
    [((30,), 80, True), ((), 51, False), ((0,), 51, False), ((0,), 80, True), ((), 100, True)],
    ids=["another makes room", "alone", "the other is gone", "a forgotten image left room", "few bits by its method"],
)
def test_restoring_is_named_where_it_can_help(others: tuple[int, ...], budget: int, helps: bool) -> None:
    report = converse(tiers_model("llava"), TIERS["llava"], "none:vision_budget=1GB", 1).cache.report()
    images = [image(0, 50, attention=1.0), *(image(number, held) for number, held in enumerate(others, 1))]
    report = dataclasses.replace(report, images=images, budget_bytes=budget)
    assert restoring_may_help(report) == helps
    line = wanted_line(report)
    assert line.startswith("The answer turns to image 0 (faded to 5.0% of its bytes)")
    assert ("restoring may help" in line) == helps
    assert ("a larger vision_budget would hold more of it" in line) != helps


def test_one_image_is_one_image() -> None:
    report = converse(tiers_model("llava"), TIERS["llava"], "none:vision_budget=1GB", 1).cache.report()
    assert memory_line(report).startswith("1 image in ")


def test_without_a_budget_there_is_none() -> None:
    report = converse(tiers_model("llava"), TIERS["llava"], "quantized", 1).cache.report()
    assert memory_table(report) is None
    assert memory_line(report) == ""
    assert report_values(report)["images"] == []
