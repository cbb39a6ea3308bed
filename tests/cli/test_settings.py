# SPDX-License-Identifier: Apache-2.0
"""Settings of the commands where the user gives none or some, and what the bundled model is used with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import error, run
from typer.testing import Result

import plphp
import tiny_hub
from plphp import ConfigError, PLPHPConfig
from plphp.cli._app import BUNDLED_NOTE
from plphp.cli._settings import read_settings
from plphp.inputs.loading import load_model
from plphp.inputs.media import load_image
from plphp.inputs.prompt import build_inputs
from plphp.inputs.sources import BUNDLED
from plphp.settings.config import checked
from plphp.settings.presets import default_settings

IMAGES = Path(__file__).resolve().parents[2] / "examples" / "images"
BANK = {"bank": "bundled"}


def test_without_a_rate_the_target_is_two_fifths() -> None:
    assert read_settings(None, None, "plphp", None, None) == PLPHPConfig(target_retention=0.4)
    assert read_settings(None, None, "shared", None, None) == PLPHPConfig(method="shared", target_retention=0.4)


def test_a_method_with_a_ladder_of_its_own_has_no_default_target() -> None:
    for bundled in (False, True):
        assert read_settings(None, None, "quantized", None, None, bundled=bundled) == PLPHPConfig(method="quantized")
    for rate, target in ((0.3, None), (0.4, None), (None, 0.5)):
        with pytest.raises(ConfigError, match=r"^The ladder of the method 'quantized' says how much is kept"):
            read_settings(None, None, "quantized", rate, target)


def test_explicit_rates_are_taken() -> None:
    assert read_settings(None, None, None, 0.3, None) == PLPHPConfig(retention_rate=0.3)
    assert read_settings(None, None, None, None, 0.5) == PLPHPConfig(target_retention=0.5)
    assert read_settings("plphp", None, None, None, None) == PLPHPConfig()


def test_the_bundled_model_has_its_query_bank_unless_a_method_is_named() -> None:
    def settings(method: str | None = None, rate: float | None = None, target: float | None = None) -> PLPHPConfig:
        return read_settings(None, None, method, rate, target, bundled=True)

    assert settings() == PLPHPConfig(method="query_bank", options=BANK, tiers="t10")
    assert settings() == default_settings(bundled=True)
    assert default_settings(bundled=False) == PLPHPConfig(method="quantized", tiers="c3") == checked(None)
    assert settings(target=0.2) == PLPHPConfig(method="query_bank", options=BANK, target_retention=0.2)
    assert settings(rate=0.2) == PLPHPConfig(method="query_bank", options=BANK, retention_rate=0.2)
    assert settings("query_bank") == PLPHPConfig(method="query_bank", options=BANK, target_retention=0.4)
    assert settings("plphp") == PLPHPConfig(target_retention=0.4)
    assert settings("plphp", rate=0.3) == PLPHPConfig(retention_rate=0.3)
    assert read_settings("plphp", None, None, None, None, bundled=True) == PLPHPConfig()


def test_an_unknown_method_is_refused_in_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('method = "plhp"')
    with pytest.raises(ConfigError, match="Did you mean 'plphp'"):
        read_settings(None, tmp_path / "a.toml", None, None, None)


def test_the_default_keeps_the_answers_of_all_shipped_questions() -> None:
    model, processor = load_model(dtype="float32")  # in bfloat16 a tie may fall otherwise on another processor
    settings = read_settings(None, None, None, None, None, bundled=True)
    for question in json.loads((IMAGES / "questions.json").read_text(encoding="utf-8")):
        images = [load_image(IMAGES / name) for name in question["images"]]
        inputs = build_inputs(processor, question["question"], images=images)
        with plphp.prune(model, settings), torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert answer == question["answer"].strip()


def generate(*options: object) -> Result:
    ask = (
        "generate",
        "--image",
        IMAGES / "grid-1.png",
        "--prompt",
        "What is in row 1?",
        "--max-new-tokens",
        24,
        "--dtype",
        "float32",
    )
    done = run(*ask, *options)
    assert done.exit_code == 0, done.output
    return done


@pytest.mark.parametrize("model", [(), ("--model", BUNDLED)], ids=["default", "folder"])
def test_generate_asks_the_bundled_model_with_its_bank_and_says_what_it_knows(model: tuple[object, ...]) -> None:
    done = generate(*model, "--report", "/dev/null")
    assert done.stdout.strip() == "Row 1 shows: orange heart, purple 1, white star."
    assert done.stderr.splitlines()[0] == BUNDLED_NOTE
    assert "drawn shapes" in BUNDLED_NOTE


def test_generate_with_json_keeps_quiet_and_names_the_method() -> None:
    done = generate("--json")
    assert done.stderr == ""
    config = json.loads(done.stdout)["report"]["config"]
    assert (config["method"], config["options"], config["tiers"]) == ("query_bank", BANK, "t10")
    assert json.loads(generate("--json", "--method", "plphp").stdout)["report"]["config"]["method"] == "plphp"


def test_another_model_is_held_in_three_bits_and_has_no_note(tmp_path: Path) -> None:
    folder = tiny_hub.save(tmp_path)
    done = generate("--model", folder)
    assert BUNDLED_NOTE not in done.stderr
    report = json.loads(generate("--model", folder, "--json").stdout)["report"]
    assert (report["config"]["method"], report["config"]["tiers"]) == ("quantized", "c3")
    assert report["kv_bytes"] < report["kv_bytes_full"]


def test_settings_that_do_not_fit_the_model_are_refused_before_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plphp.inputs.loading.load_weights", None)
    ask = ("generate", "--image", IMAGES / "grid-1.png", "--prompt", "What?", "--config")
    for config, part in (
        ("plphp:exempt_layers=8", "exempt_layers names layer 8, but the model has the layers 0 to 7"),
        ("query_bank:bank=nowhere", "Cannot read the query bank nowhere"),
        ("fastv:retention_rate=0.1", "fastv keeps everything in its first 2 of 8 layers"),
    ):
        assert part in error(*ask, config)
