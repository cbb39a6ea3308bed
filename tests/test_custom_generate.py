# SPDX-License-Identifier: Apache-2.0
"""``generate(custom_generate=...)`` with the folder of the repository: the same as a session, and no trace after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import dynamic_module_utils

import plphp
from plphp import ConfigError, PLPHPConfig
from tiny_models import TIERS

pytestmark = pytest.mark.usefixtures("float64")

FOLDER = Path(__file__).parents[1] / "hub" / "custom_generate_plphp"
LINE = "plphp:target_retention=0.5"


@pytest.fixture
def model() -> Any:
    """A tiny model whose heads can be held in few bits."""
    return TIERS["llava"].build().eval()


@pytest.fixture
def call(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls ``generate`` of a tiny model; transformers copies the code of the folder to a place of the test."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    inputs = TIERS["llava"].inputs(model, (1,))

    def generate(**arguments: Any) -> Any:
        arguments = {"max_new_tokens": 8, "do_sample": False, **arguments}
        return model.generate(**inputs, custom_generate=str(FOLDER), trust_remote_code=True, **arguments)

    return generate


@pytest.mark.parametrize("config", [LINE, PLPHPConfig.parse(LINE), PLPHPConfig.parse(LINE).to_dict(), None])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"return_dict_in_generate": True, "output_logits": True}])
def test_is_a_session(model: Any, call: Any, config: Any, options: dict[str, Any]) -> None:
    output = call(plphp_config=config, **options)
    with plphp.prune(model, None if config is None else PLPHPConfig.parse(LINE)):
        expected = model.generate(**TIERS["llava"].inputs(model, (1,)), max_new_tokens=8, do_sample=False, **options)
    assert torch.equal(getattr(output, "sequences", output), getattr(expected, "sequences", expected))
    for step, own in zip(getattr(output, "logits", ()), getattr(expected, "logits", ()), strict=True):
        assert torch.equal(step, own)


def test_the_settings_count(call: Any) -> None:
    """By the logits of the second token, which the evicted entries would have had a part in."""
    logits = [
        call(plphp_config=f"plphp:retention_rate={rate}", return_dict_in_generate=True, output_logits=True).logits[1]
        for rate in (1.0, 0.1)
    ]
    assert not torch.allclose(*logits, atol=1e-6)


def test_a_bad_setting_is_named(call: Any) -> None:
    with pytest.raises(ConfigError, match="Unknown method 'plhp'"):
        call(plphp_config="plhp")


def test_code_is_not_run_without_consent(model: Any) -> None:
    inputs = TIERS["llava"].inputs(model, (1,))
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(**inputs, custom_generate=str(FOLDER), trust_remote_code=False)


def test_it_asks_for_nothing_but_plphp() -> None:
    assert (FOLDER / "custom_generate" / "requirements.txt").read_text().split() == ["plphp"]
    assert "- custom_generate\n" in (FOLDER / "README.md").read_text()
