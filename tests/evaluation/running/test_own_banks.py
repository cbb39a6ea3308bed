# SPDX-License-Identifier: Apache-2.0
"""Evaluations of a method that has no query bank: it is collected once, from samples that are not scored, and kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import plphp
from plphp import ConfigError, LoadError, PLPHPConfig, QueryBank, UnsupportedModelError
from plphp.evaluation import EvalSettings, available_tasks, evaluate, read_results, write_results
from plphp.evaluation.results.store import read_config
from plphp.evaluation.running import own_banks
from plphp.evaluation.running.conversation import prompt_inputs
from plphp.evaluation.running.own_banks import unscored
from plphp.inputs.weights import weights_hash
from plphp.methods.registry import with_bank

TASKS = ("cell", "list_row", "second_grid")
SETTINGS = EvalSettings(
    methods=("own=query_bank:collect=4", "lower=query_bank:collect=4,value_norm=0", "plphp"),
    retention=(0.3, 0.1),
    tasks=TASKS,
    split="test",
    samples=2,
    max_new_tokens=6,
    dtype="float32",
)
NAME = "query_bank_4.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    evaluate(SETTINGS, folder)
    return folder


def test_the_bank_is_of_the_first_answers_to_samples_that_are_not_scored(finished: Path, bundled: Any) -> None:
    model, processor = bundled
    numbers = [("cell", 0), ("list_row", 0), ("second_grid", 0), ("cell", 1)]
    samples = [list(available_tasks()[task].samples("dev", number + 1, 0))[-1] for task, number in numbers]
    prompts = [prompt_inputs(processor, sample) for sample in samples]
    expected = plphp.collect_query_bank(model, prompts, max_new_tokens=6).rounded()
    bank = QueryBank.load(finished / NAME)
    assert bank.ahead.tolist() == expected.ahead.tolist()
    for number, layer in expected.layers.items():
        assert (bank.layers[number].queries.float() - layer.queries.float()).abs().max() < 0.05  # a step of bfloat16
    assert bank.books is not None
    assert bank.books.keys() == bank.layers.keys()
    assert bank.record["book_tokens"] == expected.record["book_tokens"] > 512
    assert bank.record["weights_sha256"] == weights_hash(model)
    assert (bank.record["prompts"], bank.record["samples"]) == (4, len(bank.ahead))
    assert bank.record["collected"] == {
        "prompts": 4, "split": "dev", "seed": 0, "max_new_tokens": 6, "tasks": list(TASKS),
        "samples": {"cell": [0, 1], "list_row": [0], "second_grid": [0]},
    }  # fmt: skip


@pytest.mark.parametrize("split", ["test", "dev"])
def test_no_sample_is_scored_that_the_bank_is_of(split: Any) -> None:
    """No picture of them is among the first samples of the run, under whatever name."""
    settings = EvalSettings(split=split, seed=3)
    of_split, seed = unscored(settings)
    for name in ("cell", "list_row"):
        task = available_tasks()[name]
        scored, of_bank = (
            {image.tobytes() for sample in samples for image in sample.images}
            for samples in (task.samples(split, 12, settings.seed), task.samples(of_split, 12, seed))
        )
        assert len(scored) == len(of_bank) == 12
        assert not scored & of_bank


def test_config_and_results_name_the_bank(finished: Path, tmp_path: Path) -> None:
    config = read_config(finished)
    assert list(config["collected_banks"]) == [NAME]
    assert config["collected_banks"][NAME] == dict(QueryBank.load(finished / NAME).record)
    assert len(config["query_banks"][NAME]) == 64
    own = [variant for variant in config["variants"] if variant["config"]["method"] == "query_bank"]
    assert [variant["name"] for variant in own] == ["own@0.3", "own@0.1", "lower@0.3", "lower@0.1"]
    assert all("bank" not in variant["config"]["options"] for variant in own), "the settings are not those of the user"
    write_results(finished, tmp_path / "results.json")
    results = read_results(tmp_path / "results.json")
    assert results["collected_banks"] == config["collected_banks"]
    assert results["refused"] == {}


def test_the_run_is_that_of_the_saved_bank(finished: Path, tmp_path: Path) -> None:
    methods = f"own=query_bank:bank={finished / NAME}", f"lower=query_bank:bank={finished / NAME},value_norm=0", "plphp"
    evaluate(dataclasses.replace(SETTINGS, methods=methods), tmp_path)
    for task in TASKS:
        name = f"predictions/{task}.jsonl"
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    kept = json.loads((tmp_path / "metrics.json").read_text())["overall"]["variants"]["own@0.1"]["kept"]
    assert 0.05 < kept < 0.15


def test_workers_and_later_runs_take_the_bank_of_the_folder(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moved elsewhere, and for more samples."""
    folder, whole = tmp_path / "moved", tmp_path / "whole"
    evaluate(dataclasses.replace(SETTINGS, samples=1), folder)
    content = (folder / NAME).read_bytes()
    moved = folder.rename(tmp_path / "elsewhere")
    with monkeypatch.context() as patch:
        patch.setattr(own_banks, "prune", lambda *_: pytest.fail("a bank is collected again"))
        evaluate(SETTINGS, moved, workers=2)
    assert (moved / NAME).read_bytes() == content
    assert (moved / "metrics.json").read_bytes() == (finished / "metrics.json").read_bytes()
    assert not whole.exists()


def test_another_bank_makes_another_evaluation(finished: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, methods=("own=query_bank:collect=2",), tasks=("cell",), samples=1)
    evaluate(settings, tmp_path)
    file = tmp_path / "query_bank_2.safetensors"
    good = QueryBank.load(file)
    dataclasses.replace(good, ahead=good.ahead + 1).save(file)
    with pytest.raises(ConfigError, match=r"another evaluation: query_banks\.query_bank_2.safetensors is"):
        evaluate(settings, tmp_path)
    dataclasses.replace(good, record={**good.record, "weights_sha256": "0" * 64}).save(file)
    with pytest.raises(LoadError, match=r"query_bank_2.safetensors is a query bank of another evaluation"):
        evaluate(settings, tmp_path)
    good.save(file)
    with pytest.raises(LoadError, match="is a query bank of another evaluation"):
        evaluate(dataclasses.replace(settings, seed=1), tmp_path)
    file.unlink()
    with pytest.raises(LoadError, match="holds an evaluation without the query bank query_bank_2"):
        evaluate(settings, tmp_path)
    assert not file.exists()


def test_a_line_whose_bank_cannot_be_collected_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is scored; and it is not tried again for each retention."""
    asked = []

    def unknown(model: Any) -> Any:
        asked.append(model)
        raise UnsupportedModelError("its queries cannot be foretold")

    monkeypatch.setattr("plphp.engines.hf.rotation_probe.find_rotations", unknown)
    settings = dataclasses.replace(SETTINGS, methods=("own=query_bank:collect=2", "plphp"), tasks=("cell",), samples=1)
    for _ in range(2):  # the second time the evaluation is gone on with
        metrics = evaluate(settings, tmp_path)
        assert list(metrics["refused"]) == ["own@0.3", "own@0.1"]
        assert "cannot be foretold" in metrics["refused"]["own@0.1"]
        assert [variant["name"] for variant in metrics["variants"]] == ["full", "plphp@0.3", "plphp@0.1"]
        assert len(asked) == 1
        assert read_config(tmp_path)["collected_banks"] == {}
        assert not list(tmp_path.glob("*.safetensors"))


def test_own_data_gives_its_first_samples_as_far_as_it_goes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    lines = [{"image": "red.png", "question": f"List row {number}.", "answer": "A red square."} for number in (1, 2, 3)]
    lines.insert(1, {"image": "gone.png", "question": "What?", "answer": "Nothing."})
    data = tmp_path / "mine.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    settings = EvalSettings(
        methods=("own=query_bank:collect=2",), retention=(0.3,), data=(str(data),), samples=1, dtype="float32"
    )
    evaluate(settings, tmp_path / "run")
    record = read_config(tmp_path / "run")["collected_banks"]["query_bank_2.safetensors"]["collected"]
    assert record["tasks"] == ["mine"]
    assert record["samples"] == {"mine": [0, 2]}
    assert "mine, sample 1 gives nothing to the query bank: " in caplog.text
    more = dataclasses.replace(settings, methods=("own=query_bank:collect=9",))
    metrics = evaluate(more, tmp_path / "more")
    assert "too few prompts to collect a query bank of 9 from: 3 were answered" in metrics["refused"]["own@0.3"]


def test_a_folder_of_the_user_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    """A complete bank in it would be of unknown samples, and answers to tasks have no place in another."""
    line = f"own=query_bank:collect=2,folder={tmp_path / 'banks'}"
    settings = dataclasses.replace(SETTINGS, methods=(line,), tasks=("cell",), samples=1)
    with pytest.raises(ConfigError, match=r"own@0\.3 names the folder '.*banks' .*leave out folder="):
        evaluate(settings, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_an_answer_of_one_token_is_none_that_the_bank_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, answered = own_banks.generate_greedily, []

    def first_of_one_token(model: Any, inputs: Any, limit: int) -> Any:
        answered.append(limit)
        return whole(model, inputs, 1 if len(answered) == 1 else limit)

    monkeypatch.setattr(own_banks, "generate_greedily", first_of_one_token)
    settings = dataclasses.replace(SETTINGS, methods=("own=query_bank:collect=2",), tasks=("cell",), samples=1)
    evaluate(settings, tmp_path)
    record = read_config(tmp_path)["collected_banks"]["query_bank_2.safetensors"]["collected"]
    assert len(answered) == 3
    assert record["samples"] == {"cell": [1, 2]}


def test_settings_by_the_bank_of_a_file() -> None:
    config = PLPHPConfig.parse("fastv:retention_rate=0.5+query_bank:retention_rate=0.3,collect=2,value_norm=0,folder=a")
    named = with_bank(config, "file")
    assert named.earlier == config.earlier
    assert dict(named.options) == {"bank": "file", "value_norm": 0}
    assert named.retention_rate == 0.3
    assert with_bank(named, "other") == named
    assert with_bank(PLPHPConfig(), "file") == PLPHPConfig()
