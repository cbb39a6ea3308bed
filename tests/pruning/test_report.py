# SPDX-License-Identifier: Apache-2.0
"""Reports: to JSON and back, and files that are no report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from invariants import generate, pruned
from plphp import AttentionProfile, ConfigError, PLPHPConfig, PrunedCache, PruneReport
from plphp.engines.hf.cache_argument import passed
from plphp.engines.hf.layer import PrunedLayer, layer_nbytes
from plphp.pruning.prompt_report import ImageReport, LayerReport, PromptReport, RowReport
from plphp.show.tables import layer_tables, report_values, summary
from tiny_models import TINY, tiny_model

numbers = st.integers(0, 100)
rows = st.builds(
    RowReport,
    vision_score=st.floats(0, 1),
    layer_class=st.sampled_from(["attentive", "balanced", "no-vision"]),
    rate=st.floats(0, 1),
    vision_tokens=numbers,
    kept_positions=st.lists(st.lists(numbers, max_size=3), min_size=1, max_size=3),
)
images = st.builds(
    ImageReport, positions=st.lists(numbers, max_size=3), grid=st.none() | st.tuples(numbers, numbers, numbers)
)
prompts = st.builds(
    PromptReport,
    start=numbers,
    end=numbers,
    images=st.lists(st.lists(images, max_size=2), max_size=2),
    layers=st.lists(st.builds(LayerReport, layer=numbers, rows=st.lists(rows, max_size=2)), max_size=2),
)
reports = st.builds(
    PruneReport,
    model_type=st.text(max_size=5),
    model_class=st.text(max_size=5),
    config=st.just(PLPHPConfig(exempt_layers=(0,)).to_dict()),
    batch=numbers,
    tokens=numbers,
    kv_bytes_full=numbers,
    kv_bytes=numbers,
    reserved_bytes=numbers,
    pruning_seconds=st.floats(0, 100),
    prompts=st.lists(prompts, max_size=2),
)


@given(reports, st.none() | st.integers(0, 4))
def test_json_reads_back_the_same(report: PruneReport, indent: int | None) -> None:
    assert PruneReport.from_json(report.to_json(indent=indent)) == report


@given(reports)
def test_fractions_are_those_of_the_counts(report: PruneReport) -> None:
    kept = total = 0
    for prompt in report.prompts:
        for layer in prompt.layers:
            for row in layer.rows:
                kept += sum(len(positions) for positions in row.kept_positions)
                total += row.vision_tokens * len(row.kept_positions)
    assert report.retention == (kept / total if total else 1.0)
    full = report.kv_bytes_full
    held = report.kv_bytes - report.reserved_bytes
    assert report.entry_bytes == held
    assert report.kv_reduction == ((1 - held / full) if full else 0.0)


def test_report_of_a_run_reads_back_from_a_file(tmp_path: Path) -> None:
    model = tiny_model("qwen2-vl")
    _, report = pruned(model, TINY["qwen2-vl"].inputs(model, [2, 0]), PLPHPConfig())
    path = tmp_path / "report.json"
    assert report.to_json(path) == path.read_text(encoding="utf-8")
    again = PruneReport.from_json(path)
    assert again == report
    assert again.config == PLPHPConfig().to_dict()
    (prompt,) = again.prompts
    assert [len(row) for row in prompt.images] == [2, 0]
    assert all(isinstance(image.grid, tuple) for image in prompt.images[0])
    assert again.model_class == type(model).__name__


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Not a JSON report"),
        ("{", "Not a JSON report"),
        ("[]", "not a plphp report, which is an object with"),
        ("3", "not a plphp report"),
        ("null", "not a plphp report"),
        ("{}", "This is not a plphp report.*expected what `plphp generate --report` writes"),
        ('{"format": 99}', "a report of format 99, expected 1"),
        ('{"format": 1}', "Not a plphp report: KeyError 'prompts'"),
        ('{"format": 1, "prompts": []}', "Not a plphp report: TypeError .*model_type"),
        ('{"format": 1, "prompts": [{}]}', "Not a plphp report: KeyError 'start'"),
        ('{"format": 1, "prompts": 7}', "Not a plphp report: TypeError"),
    ],
)
def test_text_that_is_no_report(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruneReport.from_json(text)


def test_unknown_field_of_a_report() -> None:
    text = PruneReport("a", "b", {}, 1, 1, 1, 1, 0, 0.0, []).to_json()
    values = {**json.loads(text), "colour": "red"}
    with pytest.raises(ConfigError, match=r"Not a plphp report: TypeError .*colour"):
        PruneReport.from_json(json.dumps(values))


def test_file_that_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Cannot read the report .*gone\.json: No such file"):
        PruneReport.from_json(tmp_path / "gone.json")
    with pytest.raises(ConfigError, match="Cannot read the report"):
        PruneReport.from_json(tmp_path)
    path = tmp_path / "binary.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a JSON report"):
        PruneReport.from_json(path)


class TestWithoutVisionTokens:
    """Text alone: nothing is evicted, and the room that is reserved for the answer is no loss."""

    @pytest.fixture
    def report(self) -> PruneReport:
        model = tiny_model("llava")
        _, report = pruned(model, TINY["llava"].inputs(model, [0]), PLPHPConfig(retention_rate=0.1))
        return report

    def test_nothing_is_reduced(self, report: PruneReport) -> None:
        assert report.reserved_bytes > 0
        assert report.kv_bytes == report.kv_bytes_full + report.reserved_bytes
        assert (report.kv_reduction, report.retention) == (0, 1)

    def test_what_is_shown(self, report: PruneReport) -> None:
        assert "(0%)" in summary(report)
        assert "no vision tokens" in summary(report)
        assert layer_tables(report) == []
        values = report_values(report)
        assert (values["kv_reduction"], values["entry_bytes"]) == (0, report.kv_bytes_full)


@pytest.mark.parametrize("rows", [[2, 0], [1, 3, 0]], ids=str)
@pytest.mark.parametrize("family", ["qwen2-vl", "gemma3"])
def test_reserved_room_is_what_holds_no_entry(family: str, rows: list[int]) -> None:
    model = tiny_model(family)
    inputs = TINY[family].inputs(model, rows)
    cache = PrunedCache.for_inputs(model, inputs, PLPHPConfig(retention_rate=0.3))
    generate(model, inputs, **passed(cache))
    entries = 0
    for layer in cache.layers:
        if isinstance(layer, PrunedLayer):
            held = [layer.prefix.keys, layer.prefix.values, *layer.tail()]
            entries += sum(tensor.numel() * tensor.element_size() for tensor in held)
        else:
            entries += layer_nbytes(layer)
    report = cache.report()
    assert report.entry_bytes == entries < report.kv_bytes
    assert report.kv_reduction == 1 - entries / report.kv_bytes_full


OUTPUTS = {
    "`plphp generate --json`, which leaves out the positions": {"answer": "a", "tokens": 1, "report": {}},
    "`plphp generate --compare --json`, which": {"unpruned": {}, "pruned": {}, "same_tokens": True, "report": {}},
    "`plphp inspect --json`, which leaves": {"kv_bytes_full": 1, "kv_reduction": 0.0, "prompts": []},
    "`plphp estimate --json`": {"unpruned": {}, "pruned": {}, "workload": {}},
    "a profile of `plphp profile`": {"format": 1, "query_rows": [], "layers": [], "prompts": [], "provenance": {}},
    "`plphp calibrate --json`": {"file": "a", "config": {}, "calibration": {}, "measured": {}},
    "figures of `plphp eval`": {"format": 1, "tasks": {}, "groups": {}, "variants": []},
    "the configuration of a run of `plphp eval`": {"format": 1, "settings": {}, "variants": [], "tasks": []},
}


@pytest.mark.parametrize("what", OUTPUTS)
def test_other_files_of_plphp_are_named(what: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(OUTPUTS[what]))
    with pytest.raises(ConfigError) as error:
        PruneReport.from_json(path)
    assert f"{path} is" in str(error.value)
    assert what in str(error.value)
    assert "not a report: expected what `plphp generate --report` writes" in str(error.value)


def test_a_report_is_no_profile() -> None:
    text = PruneReport("a", "b", {}, 1, 1, 1, 1, 0, 0.0, []).to_json()
    with pytest.raises(ConfigError, match=r"a report of `plphp generate --report`, and not a profile: expected what"):
        AttentionProfile.from_json(text)
