# SPDX-License-Identifier: Apache-2.0
"""The model that ships with plphp, trained and of another family: answers that mean something, methods, bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine import run
from plphp import PLPHPConfig
from plphp.engines.vllm.server import server_arguments
from plphp.inputs.sources import bundled_model_path
from reference import Reference, example_requests, in_blocks

BLOCK = 32
TARGET = {"target_retention": 0.5, "query_rows": "text"}
QUERY_BANK = {"method": "query_bank", "heads": "equal", "options": {"bank": "bundled"}}
OTHERS = {
    "off": ("bfloat16", None, 12),
    "per-image": ("float32", {"target_retention": 0.5, "image_quota": "per_image"}, 8),
    "query-bank": ("bfloat16", {**QUERY_BANK, "retention_rate": 0.4}, 12),
    "snapkv": ("float32", {"method": "snapkv", "retention_rate": 0.5}, 9),
}
CASES = [
    pytest.param("bfloat16", TARGET, 10, id="plphp"),
    *(pytest.param(*case, id=name, marks=pytest.mark.thorough) for name, case in OTHERS.items()),
]


@pytest.mark.parametrize(("dtype", "settings", "least"), CASES)
def test_answers_are_those_of_transformers(
    tmp_path: Path, dtype: str, settings: dict[str, Any] | None, least: int
) -> None:
    """And at least so many of the twelve are right."""
    reference = Reference(bundled_model_path(), getattr(torch, dtype))
    some = example_requests(reference.processor)
    rounded = None
    if settings is not None:
        method = in_blocks(PLPHPConfig.from_dict(settings).method, BLOCK)
        rounded = PLPHPConfig.from_dict({**settings, "method": method})
    found = run(tmp_path, bundled_model_path(), requests=some, settings=settings, engine={"dtype": dtype})
    assert found["tokens"] == [reference.answer(one, rounded)[0] for one in some]
    assert len(found["pruned"]) == (0 if settings is None else len(some))
    texts = [reference.processor.decode(tokens, skip_special_tokens=True) for tokens in found["tokens"]]
    assert sum(text.strip() == one["answer"] for text, one in zip(texts, some, strict=True)) >= least


@pytest.mark.parametrize("model", [[], [str(bundled_model_path())]], ids=["by default", "by name"])
def test_served_by_default_it_has_settings_of_its_own(model: list[str]) -> None:
    own = PLPHPConfig.from_dict({**QUERY_BANK, "target_retention": 0.4})
    options = [*model, "--enforce-eager", "--max-model-len", "2048"]
    arguments = server_arguments(PLPHPConfig(target_retention=0.4), options, for_bundled=own)
    assert PLPHPConfig.from_dict(arguments.additional_config["plphp"]) == own
