# SPDX-License-Identifier: Apache-2.0
"""Runs that go on, in any number of processes, with the same figures; and settings that are wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from PIL import Image

import plphp
import tiny_hub
from plphp.errors import ConfigError, LoadError
from plphp.evaluation import EvalSettings, available_tasks, evaluate, read_results, summarize, write_results
from plphp.evaluation.results.store import read_config, read_records
from plphp.evaluation.running.conversation import prompt_inputs
from plphp.evaluation.running.workers import run_workers

SETTINGS = EvalSettings(
    methods=("plphp", "random", "zero"), retention=(0.3, 0.1), tasks=("cell", "second_grid"), samples=3, dtype="float32"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    evaluate(SETTINGS, folder, baseline="random")
    return folder


def lines(folder: Path, task: str) -> list[str]:
    return (folder / "predictions" / f"{task}.jsonl").read_text().splitlines()


def test_what_is_written(finished: Path) -> None:
    config = read_config(finished)
    assert config["settings"] == SETTINGS.to_dict()
    assert len(config["model"]["sha256"]) == 64
    assert config["versions"].keys() >= {"plphp", "torch", "transformers", "python"}
    assert [variant["name"] for variant in config["variants"]][:2] == ["full", "plphp@0.3"]
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics == summarize(finished, "random")
    assert list(metrics["groups"]) == ["one_image", "dialogue"]
    task = metrics["tasks"]["cell"]
    assert task["samples"] == 3
    for name, figures in task["variants"].items():
        outcomes = [json.loads(line)["outcomes"][name] for line in lines(finished, "cell")]
        assert figures["score"]["mean"] == pytest.approx(sum(outcome["score"] for outcome in outcomes) / 3, abs=1e-5)
        assert figures["kept"] == pytest.approx(sum(outcome["kept"] for outcome in outcomes) / 3, abs=1e-5)
        assert ("vs_baseline" in figures) == name.endswith(("0.3", "0.1"))
    assert task["variants"]["random@0.3"]["vs_baseline"] == {"mean": 0, "low": 0, "high": 0}
    overall, groups = metrics["overall"], metrics["groups"].values()
    assert (overall["groups"], overall["samples"], overall["skipped"]) == (["one_image", "dialogue"], 6, 0)
    for name, figures in overall["variants"].items():
        means = [group["variants"][name]["score"]["mean"] for group in groups]
        assert figures["score"]["mean"] == pytest.approx(sum(means) / 2, abs=1e-5)
        assert figures["kept"] == pytest.approx(sum(group["variants"][name]["kept"] for group in groups) / 2, abs=1e-5)
    assert task["variants"]["full"]["kept"] == 1
    assert task["variants"]["zero"]["kept"] == 0


def test_a_cut_off_run_goes_on_to_the_same_figures(finished: Path, tmp_path: Path) -> None:
    def stop(task: str, done: int, total: int) -> None:
        assert total == 6
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(SETTINGS, tmp_path, progress=stop)
    assert not (tmp_path / "metrics.json").exists()
    assert summarize(tmp_path)["tasks"]["second_grid"]["samples"] == 1
    with pytest.raises(LoadError, match="not finished: second_grid: 1 of 3 samples"):
        write_results(tmp_path, tmp_path / "quality.json")
    path = tmp_path / "predictions" / "second_grid.jsonl"
    before = path.read_bytes()
    path.write_bytes(before + b'{"index": 1, "id": "cut o')
    done = []
    evaluate(SETTINGS, tmp_path, baseline="random", progress=lambda task, number, total: done.append((task, number)))
    assert done == [("second_grid", 5), ("second_grid", 6)]
    assert path.read_bytes().startswith(before)
    for name in ("metrics.json", "predictions/cell.jsonl", "predictions/second_grid.jsonl"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes(), name
    evaluate(SETTINGS, tmp_path, baseline="random", progress=lambda *_: pytest.fail("done already"))


@pytest.mark.parametrize("mode", ["auto", "generate"])
def test_more_samples_go_on_to_the_same_figures(tmp_path: Path, mode: Literal["auto", "generate"]) -> None:
    settings = dataclasses.replace(SETTINGS, methods=("zero",), tasks=("cell",), mode=mode, batch=2, samples=4)
    evaluate(settings, tmp_path / "all")
    evaluate(dataclasses.replace(settings, samples=1), tmp_path / "more")
    done = []
    evaluate(settings, tmp_path / "more", progress=lambda task, number, total: done.append(number))
    assert done == ([1, 2, 3, 4] if mode == "generate" else [2, 3, 4])
    assert (tmp_path / "more/metrics.json").read_bytes() == (tmp_path / "all/metrics.json").read_bytes()
    with pytest.raises(ConfigError, match=r"settings\.samples is 4 there and 2 now"):
        evaluate(dataclasses.replace(settings, samples=2), tmp_path / "more")


def test_two_processes_find_what_one_finds(finished: Path, tmp_path: Path) -> None:
    evaluate(SETTINGS, tmp_path, workers=2, baseline="random")
    assert (tmp_path / "metrics.json").read_bytes() == (finished / "metrics.json").read_bytes()
    assert sorted(lines(tmp_path, "cell")) == sorted(lines(finished, "cell"))


def test_a_broken_sample_in_a_process_costs_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tmp_path / "mine.jsonl"
    with data.open("w") as file:
        for name in ("a.png", "b.png", "c.png"):
            tiny_hub.picture(tmp_path / name)
            file.write(json.dumps({"image": name, "question": "What?", "answer": "A star."}) + "\n")
    (tmp_path / "b.png").write_bytes(b"no image")
    settings = EvalSettings(methods=("zero",), retention=(), data=(str(data),), dtype="float32")
    metrics = evaluate(settings, tmp_path / "out", workers=2)
    assert [record["index"] for record in read_records(tmp_path / "out", "mine")] == [0, 2]
    [skipped] = metrics["skipped"]["mine"]
    assert skipped["index"] == 1
    assert "b.png is not an image" in skipped["reason"]
    assert [record.message for record in caplog.records] == [f"mine: sample 1 is skipped: {skipped['reason']}"]


def fails(share: int) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "task", {"index": share}
    raise LoadError("the disk is gone")


def test_an_error_in_a_process_is_the_users_error() -> None:
    """It comes out as it is, and what was done before it stays done."""
    noted: list[Any] = []
    with pytest.raises(LoadError, match="the disk is gone"):
        run_workers(fails, (), [0], lambda *call: noted.append(call))
    assert noted == [("task", {"index": 0})]


def ends_the_process(share: int) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "task", {"index": share}
    time.sleep(0.5)  # until the record has left the process
    os._exit(7)


def test_a_killed_process_is_told() -> None:
    noted: list[Any] = []
    with pytest.raises(RuntimeError, match="ended with code 7"):
        run_workers(ends_the_process, (), [0], lambda *call: noted.append(call))
    assert noted == [("task", {"index": 0})]


def test_the_same_samples_again_after_every_mode(finished: Path, tmp_path: Path) -> None:
    """All ways to score a sample agree."""
    scores = {name: values["score"] for name, values in summarize(finished)["tasks"]["cell"]["variants"].items()}
    for mode in ("decode", "generate"):
        settings = dataclasses.replace(SETTINGS, tasks=("cell",), mode=mode, batch=2)
        metrics = evaluate(settings, tmp_path / mode)
        assert metrics["tasks"]["cell"]["mode"] == mode
        assert {name: values["score"] for name, values in metrics["tasks"]["cell"]["variants"].items()} == scores


def test_a_cut_off_batch_is_done_again(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, tasks=("cell",), methods=("zero",), mode="generate", batch=2)
    evaluate(settings, tmp_path)
    path = tmp_path / "predictions" / "cell.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text(whole[0])
    evaluate(settings, tmp_path)
    assert path.read_text().splitlines(keepends=True) == [whole[0], *whole]
    assert [record["index"] for record in read_records(tmp_path, "cell")] == [0, 1, 2]


def test_prompts_without_answers(tmp_path: Path) -> None:
    tiny_hub.picture(tmp_path / "a.png")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"images": ["a.png"], "question": "What is in row 1, column 1?"}\n')
    settings = EvalSettings(
        methods=("none", "zero"), retention=(0.5,), prompts=str(prompts), mode="label-free", dtype="float32"
    )
    metrics = evaluate(settings, tmp_path / "out")
    variants = metrics["groups"]["prompts"]["variants"]
    assert variants["none"] == {"kept": 1, "read": 1, "agreement": 1, "kl": 0}
    assert variants["zero"]["kl"] > 0
    assert "score" not in variants["zero"]


def test_what_a_method_cannot_do_is_left_out_with_the_reason(tmp_path: Path) -> None:
    settings = dataclasses.replace(
        SETTINGS, methods=("fastv", "oracle"), retention=(0.5, 0.05), samples=1, tasks=("cell",)
    )
    metrics = evaluate(settings, tmp_path / "a")
    assert list(metrics["refused"]) == ["fastv@0.05"]
    assert "least retention_rate" in metrics["refused"]["fastv@0.05"]
    assert [variant["name"] for variant in metrics["variants"]] == ["full", "fastv@0.5", "oracle@0.5", "oracle@0.05"]
    refused = evaluate(dataclasses.replace(settings, mode="generate"), tmp_path / "b")["refused"]
    assert list(refused) == ["fastv@0.05", "oracle@0.5", "oracle@0.05"]
    assert "answer" in refused["oracle@0.5"]


def test_results_hold_where_they_come_from(finished: Path, tmp_path: Path) -> None:
    write_results(finished, tmp_path / "quality.json", "random")
    written = read_results(tmp_path / "quality.json")
    figures = summarize(finished, "random")
    assert (written["groups"], written["overall"]) == (figures["groups"], figures["overall"])
    values = figures["tasks"]["cell"]["variants"]["plphp@0.1"]
    assert written["tasks"]["cell"]["variants"]["plphp@0.1"] == {
        name: values[name] for name in ("score", "kept", "read")
    }
    assert written["model"]["sha256"] == read_config(finished)["model"]["sha256"]
    assert written["command"] == (
        "plphp eval --methods plphp,random,zero --target-retention 0.3,0.1 --tasks cell,second_grid --samples 3 "
        "--dtype float32 --out DIR"
    )
    assert "outcomes" not in (tmp_path / "quality.json").read_text()
    with pytest.raises(ConfigError, match="no folder"):
        write_results(finished, tmp_path / "not" / "there.json")


@pytest.mark.parametrize("line", ["query_bank:bank={}", "quantized:tiers=pq,books={}"])
def test_a_bank_that_was_made_again_makes_another_evaluation(line: str, tmp_path: Path, bundled: Any) -> None:
    model, processor = bundled
    path = tmp_path / "bank.safetensors"
    sample = next(available_tasks()["cell"].samples("dev", 1, 0))
    bank = plphp.collect_query_bank(model, [prompt_inputs(processor, sample)], max_new_tokens=5)
    bank.save(path)
    settings = dataclasses.replace(SETTINGS, methods=(line.format(path),), tasks=("cell",), samples=1)
    evaluate(settings, tmp_path / "out")
    evaluate(settings, tmp_path / "out", progress=lambda *_: pytest.fail("done already"))
    dataclasses.replace(bank, ahead=bank.ahead + 1).save(path)
    with pytest.raises(ConfigError, match=r"another evaluation: query_banks\..*bank.safetensors is"):
        evaluate(settings, tmp_path / "out")


def test_data_that_changed_make_another_evaluation(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    data = tmp_path / "data.jsonl"
    settings = dataclasses.replace(SETTINGS, tasks=(), data=(str(data),), methods=("zero",))
    data.write_text('{"image": "a.png", "question": "A?", "answer": "x"}\n')
    evaluate(settings, tmp_path / "out")
    data.write_text('{"image": "a.png", "question": "A?", "answer": "y"}\n')
    with pytest.raises(ConfigError, match=r"another evaluation: contents\..*data.jsonl is"):
        evaluate(settings, tmp_path / "out")


class TestRefused:
    def run(self, folder: Path, **changes: Any) -> None:
        evaluate(dataclasses.replace(SETTINGS, **changes), folder)

    def test_a_folder_of_another_run(self, finished: Path) -> None:
        before = {path: path.read_bytes() for path in finished.rglob("*.json*")}
        with pytest.raises(ConfigError, match=r"settings\.samples is 3 there and 2 now"):
            self.run(finished, samples=2)
        with pytest.raises(ConfigError, match=r"another evaluation.*model\.dtype is \"float32\" there"):
            self.run(finished, dtype="bfloat16")
        assert {path: path.read_bytes() for path in finished.rglob("*.json*")} == before

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"tasks": ("cel",)}, "Unknown task or group 'cel'. Did you mean 'cell'"),
            ({"methods": ("plhp",)}, "Unknown method 'plhp'"),
            ({"mode": "verfy"}, "mode must be one of auto, verify"),
            ({"split": "train"}, "split must be one of dev, test"),
            ({"samples": 0}, "samples must be an integer of at least 1"),
            ({"metric": "exact"}, "Unknown metric 'exact'"),
            ({"prompts": "a.jsonl"}, "label-free"),
            ({"seed": -1}, "seed must be"),
        ],
    )
    def test_settings(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            self.run(tmp_path / "out", **changes)
        assert not (tmp_path / "out").exists()

    def test_a_baseline_that_is_no_method(self, finished: Path) -> None:
        with pytest.raises(ConfigError, match=r"baseline 'randm'.*Did you mean 'random'"):
            evaluate(SETTINGS, finished, baseline="randm")
        with pytest.raises(ConfigError, match="baseline 'randm'"):
            summarize(finished, "randm")

    def test_workers(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="workers must be"):
            evaluate(SETTINGS, tmp_path, workers=0)

    def test_a_folder_without_results(self, tmp_path: Path) -> None:
        with pytest.raises(LoadError, match=r"Cannot read .*config\.json"):
            summarize(tmp_path)
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(LoadError, match="format"):
            summarize(tmp_path)
        (tmp_path / "config.json").write_text('{"format": 1, "settings": {}}')
        with pytest.raises(LoadError, match="lacks refused, tasks, variants"):
            summarize(tmp_path)
        with pytest.raises(ConfigError, match="is a file"):
            evaluate(SETTINGS, tmp_path / "config.json")

    def test_a_broken_line_in_the_middle(self, finished: Path, tmp_path: Path) -> None:
        (tmp_path / "predictions").mkdir()
        (tmp_path / "config.json").write_text((finished / "config.json").read_text())
        for broken in ("{}", '{"index": 1}', "[]"):
            text = "\n".join([broken, *lines(finished, "cell")]) + "\n"
            (tmp_path / "predictions" / "cell.jsonl").write_text(text)
            with pytest.raises(LoadError, match=r"cell\.jsonl, line 1 is broken"):
                summarize(tmp_path)
