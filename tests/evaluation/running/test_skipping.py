# SPDX-License-Identifier: Apache-2.0
"""A broken sample costs itself and no other; what is not about a sample ends the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from plphp import PruneReport
from plphp.errors import (
    BackendUnavailableError,
    CacheMemoryError,
    ConfigError,
    LoadError,
    NonFiniteAttentionError,
    SpanError,
    UnsupportedModelError,
)
from plphp.evaluation import EvalSettings, Outcome, Sample, Turn, evaluate, read_results, summarize, write_results
from plphp.evaluation.results.store import read_records, read_skipped
from plphp.evaluation.running.answering import _shares
from plphp.evaluation.running.conversation import batch_inputs, prompt_inputs
from plphp.evaluation.running.skipping import records_of
from plphp.pruning.prompt_report import LayerReport, PromptReport, RowReport


@pytest.fixture(autouse=True)
def loaded_once(bundled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plphp.evaluation.running.runner.load_model", lambda *_: bundled)


def write_data(folder: Path, broken: Sequence[int], rows: int = 4) -> Path:
    """A file of questions; the images of some rows are broken after they were checked to be there."""
    folder.mkdir(exist_ok=True)
    lines = []
    for number in range(rows):
        Image.new("RGB", (48, 40), (60 * number, 90, 200)).save(folder / f"{number}.png")
        if number in broken:
            (folder / f"{number}.png").write_bytes(b"no image")
        lines.append({"id": f"row-{number}", "image": f"{number}.png", "question": "What?", "answer": "A star."})
    (folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "mine.jsonl"


def settings(data: Path, **changes: Any) -> EvalSettings:
    values = {"methods": ("zero",), "retention": (), "data": (str(data),), "dtype": "float32", "max_new_tokens": 4}
    return EvalSettings(**{**values, **changes})


def skips(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged of skipped samples; a kernel that cannot be built is logged, too, once a process."""
    return [record.message for record in caplog.records if "is skipped" in record.message]


@pytest.mark.parametrize(
    "changes", [{}, {"mode": "generate", "batch": 4}, {"mode": "generate", "batch": 2}, {"mode": "label-free"}], ids=str
)
def test_the_others_are_scored_without_it(
    changes: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the first one, with which the methods are tried out, is broken."""
    whole = evaluate(settings(write_data(tmp_path / "a", []), **changes), tmp_path / "whole")
    assert (whole["skipped"], whole["tasks"]["mine"]["skipped"]) == ({}, 0)
    assert skips(caplog) == []
    progress = []
    out = tmp_path / "out"
    run_settings = settings(write_data(tmp_path / "b", [0, 2]), **changes)
    metrics = evaluate(run_settings, out, progress=lambda *now: progress.append(now))
    assert progress[-1] == ("mine", 4, 4)
    task = metrics["tasks"]["mine"]
    assert (task["samples"], task["skipped"], metrics["overall"]["skipped"]) == (2, 2, 2)
    assert [skipped["index"] for skipped in metrics["skipped"]["mine"]] == [0, 2]
    assert "0.png is not an image" in metrics["skipped"]["mine"][0]["reason"]
    assert [message.split(": ")[:2] for message in skips(caplog)] == [
        ["mine", f"sample {number} is skipped"] for number in (0, 2)
    ]
    expected = [record for record in read_records(tmp_path / "whole", "mine") if record["index"] in (1, 3)]
    records = read_records(out, "mine")
    assert [record["id"] for record in records] == ["row-1", "row-3"]
    for record, alone in zip(records, expected, strict=True):
        assert record.keys() == alone.keys()
        assert {name: outcome["kept"] for name, outcome in record["outcomes"].items()} == {"full": 1, "zero": 0}
        assert record["outcomes"]["zero"].get("text") == alone["outcomes"]["zero"].get("text")
    assert json.loads((out / "metrics.json").read_text()) == metrics == summarize(out)
    caplog.clear()
    assert evaluate(run_settings, out, progress=lambda *_: pytest.fail("done already")) == metrics
    write_results(out, tmp_path / "results.json")
    assert read_results(tmp_path / "results.json")["skipped"] == metrics["skipped"]


class Poisoned:
    """A processor whose pixels are NaN for red images."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def __call__(self, images: Any = None, **options: Any) -> Any:
        made = self.processor(images=images, **options)
        flat = [image for row in images for image in (row if isinstance(row, list) else [row])]
        for number, image in enumerate(flat):
            if image.getpixel((0, 0)) == (255, 0, 0):
                made["pixel_values"][number] = torch.nan
        return made


@pytest.mark.parametrize("changes", [{}, {"mode": "generate", "batch": 3}, {"mode": "label-free"}], ids=str)
def test_a_sample_whose_attention_is_nan(
    changes: dict[str, Any], tmp_path: Path, bundled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_data(tmp_path / "a", [], rows=3)
    Image.new("RGB", (48, 40), (255, 0, 0)).save(tmp_path / "a" / "1.png")
    monkeypatch.setattr("plphp.evaluation.running.runner.load_model", lambda *_: (bundled[0], Poisoned(bundled[1])))
    metrics = evaluate(settings(data, **changes), tmp_path / "out")
    [skipped] = metrics["skipped"]["mine"]
    assert (skipped["index"], skipped["id"]) == (1, "row-1")
    assert "attention" in skipped["reason"]
    assert metrics["tasks"]["mine"]["samples"] == 2


def test_a_row_of_a_report_without_finite_attention_is_not_judged() -> None:
    rows = [RowReport(0.5, name, 1.0, 4, [[1, 2]]) for name in ("balanced", "non-finite")]
    prompt = PromptReport(0, 9, [[], []], [LayerReport(0, rows)])
    report = PruneReport("llava", "Llava", {}, 2, 9, 8, 8, 0, 0.0, [prompt])
    with pytest.raises(NonFiniteAttentionError, match="row 1 of the batch"):
        _shares(report)


def test_a_removed_line_is_tried_again(tmp_path: Path) -> None:
    data = write_data(tmp_path / "a", [1], rows=2)
    evaluate(settings(data), tmp_path / "out")
    path = tmp_path / "out" / "predictions" / "mine.jsonl"
    scored, skipped = path.read_text().splitlines(keepends=True)
    assert json.loads(skipped).keys() == {"index", "id", "skipped"}
    Image.new("RGB", (48, 40)).save(tmp_path / "a" / "1.png")
    path.write_text(scored)
    assert evaluate(settings(data), tmp_path / "out")["tasks"]["mine"]["samples"] == 2
    assert read_skipped(tmp_path / "out", "mine") == []


def test_a_task_without_any_scored_sample_is_an_error(tmp_path: Path) -> None:
    good, bad = write_data(tmp_path / "b", [], rows=1), write_data(tmp_path / "a", [0, 1], rows=2)
    bad = bad.rename(bad.with_name("bad.jsonl"))
    with pytest.raises(LoadError, match=r"No sample can be read and prepared; the first: bad, sample 0: .*0\.png"):
        evaluate(settings(bad), tmp_path / "none")
    both = EvalSettings(**{**settings(bad).to_dict(), "data": (str(bad), str(good))})
    with pytest.raises(LoadError, match=r"No sample of the task 'bad' could be scored, 2 had to be skipped; the first"):
        evaluate(both, tmp_path / "out")
    metrics = summarize(tmp_path / "out")
    assert list(metrics["tasks"]) == ["mine"]
    assert len(metrics["skipped"]["bad"]) == 2
    (tmp_path / "out" / "predictions" / "mine.jsonl").unlink()
    with pytest.raises(LoadError, match="No sample of the task 'bad'"):
        summarize(tmp_path / "out")


def test_what_a_processor_refuses_is_about_the_sample(bundled: Any) -> None:
    class Strict:
        """Refuses an image by its size, as those of Qwen2-VL do."""

        chat_template = ""
        tokenizer = bundled[1].tokenizer
        image_token = bundled[1].image_token

        def apply_chat_template(self, *args: Any, **options: Any) -> str:
            return bundled[1].apply_chat_template(*args, **options)

        def __call__(self, **_: Any) -> Any:
            raise ValueError("absolute aspect ratio must be smaller than 200")

    sample = Sample("a", "mine", (Image.new("RGB", (1, 999)),), (Turn("What?", "x"),))
    for prepare in (lambda: prompt_inputs(Strict(), sample), lambda: batch_inputs(Strict(), [sample, sample])):
        with pytest.raises(ConfigError, match="Strict refuses this sample: absolute aspect ratio"):
            prepare()


class TestRecords:
    """One block, with stand-ins for what scores it."""

    SAMPLES = tuple(Sample(name, "mine", (), (Turn("What?", "x"),)) for name in "abc")

    def records(self, error: Exception, bad: str = "b") -> tuple[list[dict[str, Any]], list[list[str]]]:
        calls = []

        def score(samples: Sequence[Sample]) -> list[dict[str, Outcome]]:
            calls.append([sample.id for sample in samples])
            if bad in calls[-1]:
                raise error
            return [{"full": Outcome(1.0, 1.0, 1.0)} for _ in samples]

        block = [(7 + place, lambda sample=sample: sample) for place, sample in enumerate(self.SAMPLES)]
        return records_of("mine", block, score), calls

    @pytest.mark.parametrize(
        "error", [NonFiniteAttentionError("row is NaN"), SpanError("row too long"), ConfigError("row without answer")]
    )
    def test_one_of_a_batch(self, error: Exception) -> None:
        records, calls = self.records(error)
        assert [(record["index"], record["id"], record.get("skipped")) for record in records] == [
            (7, "a", None),
            (8, "b", str(error)),
            (9, "c", None),
        ]
        assert calls == [["a", "b", "c"], ["a"], ["b"], ["c"]]
        assert records[0]["outcomes"] == {"full": {"score": 1.0, "kept": 1.0, "vision_kept": 1.0}}

    @pytest.mark.parametrize(
        "error",
        [
            CacheMemoryError("no memory"),
            BackendUnavailableError("no library"),
            UnsupportedModelError("this model"),
            torch.OutOfMemoryError("CUDA out of memory"),
            MemoryError("none left"),
            TypeError("a bug"),
            RuntimeError("another bug"),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_what_is_not_about_a_sample(self, error: Exception) -> None:
        with pytest.raises(type(error), match=str(error)):
            self.records(error)
