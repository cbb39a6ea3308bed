# SPDX-License-Identifier: Apache-2.0
"""``plphp inspect`` and ``plphp plot``: the figures of the run, and files that are no report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import ok, run

import tiny_hub
from plphp import PLPHPConfig, PruneReport
from plphp.show.tables import human_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a picture, a comparison with its report, and what commands print as JSON."""
    made = tmp_path_factory.mktemp("reports")
    tiny_hub.save(made / "model")
    picture = tiny_hub.picture(made / "a.png")
    ask = ("generate", "--model", made / "model", "--device", "cpu", "--image", picture, "--prompt", "What?")
    length = ("--max-new-tokens", 30)
    compared = ok(*ask, *length, "--compare", "--rounds", 1, "--report", made / "compared.json")
    (made / "compared.txt").write_text(compared)
    for name, arguments in {
        "generate": (*ask, "--max-new-tokens", 2, "--json"),
        "compare": (*ask, "--max-new-tokens", 2, "--compare", "--rounds", 1, "--json"),
        "inspect": ("inspect", made / "compared.json", "--json"),
        "estimate": ("estimate", "--model", made / "model", "--tokens-per-image", 9, "--json"),
    }.items():
        (made / f"{name}.json").write_text(ok(*arguments))
    return made


def test_a_comparison_and_its_report_show_the_same_figures(folder: Path) -> None:
    report = PruneReport.from_json(folder / "compared.json")
    values = json.loads((folder / "inspect.json").read_text())
    reduction = f"{-report.kv_reduction:+.0%}"
    assert values["kv_reduction"] == report.kv_reduction > 0
    for shown in ((folder / "compared.txt").read_text(), ok("inspect", folder / "compared.json")):
        for part in (f"KV cache of {report.tokens} tokens", human_bytes(report.kv_bytes_full), reduction):
            assert part in shown
        assert human_bytes(report.entry_bytes) in shown


@pytest.mark.parametrize("name", ["generate", "compare", "inspect", "estimate"])
@pytest.mark.parametrize("command", [("inspect",), ("plot", "--out", "plots")], ids=str)
def test_what_a_command_printed_is_named(folder: Path, name: str, command: tuple[str, ...], tmp_path: Path) -> None:
    path = folder / f"{name}.json"
    result = run(command[0], path, *(tmp_path / part if part == "plots" else part for part in command[1:]))
    assert (result.exit_code, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    printed = "generate --compare" if name == "compare" else name
    assert line.startswith(f"error: {path} is the output of `plphp {printed} --json`")
    assert line.endswith("and not a report: expected what `plphp generate --report` writes.")
    assert not list(tmp_path.iterdir())


def test_what_left_before_layers_got_it(folder: Path, tmp_path: Path) -> None:
    chain = "encoder_random:retention_rate=0.5+fastv:layer=1,retention_rate=0.7+uniform:retention_rate=0.5"
    ask = ("generate", "--model", folder / "model", "--device", "cpu", "--image", folder / "a.png", "--prompt", "What?")
    result = run(*ask, "--max-new-tokens", 2, "--config", chain, "--report", tmp_path / "report.json")
    report = PruneReport.from_json(tmp_path / "report.json")
    encoder, inside = report.prompts[0].stages
    [came], [stayed], [left] = encoder.tokens_in, encoder.tokens_out, inside.tokens_out
    words = (
        f"{came} -> {stayed} vision tokens before the text model (encoder_random) -> {left} before layer 1 (fastv), "
    )
    assert words in result.stderr
    shown = ok("inspect", tmp_path / "report.json")
    assert words in shown
    assert f"tokens x layers computed ({report.computed_share:.0%})" in shown
    assert json.loads(ok("inspect", tmp_path / "report.json", "--json"))["computed_share"] == report.computed_share < 1
    assert ok("plot", tmp_path / "report.json", "--out", tmp_path / "plots").count(".png") == 3


def test_a_preset_is_no_report(tmp_path: Path) -> None:
    path = tmp_path / "preset.toml"
    path.write_text("[plphp]\nmethod = 'plphp'\n")
    assert f"{path} is not a JSON report" in run("inspect", path).stderr


def test_a_report_of_text_alone(tmp_path: Path) -> None:
    values: dict[str, Any] = {"batch": 1, "tokens": 5, "kv_bytes_full": 100, "kv_bytes": 180, "reserved_bytes": 80}
    report = PruneReport("a", "A", PLPHPConfig().to_dict(), **values, pruning_seconds=0.0, prompts=[])
    report.to_json(tmp_path / "report.json")
    shown = ok("inspect", tmp_path / "report.json")
    assert "KV cache of 5 tokens 100 B -> 100 B (0%) and 80 B of reserved room, no vision tokens" in shown
