# SPDX-License-Identifier: Apache-2.0
"""Images fade below a budget, over families x methods x rules; what is held is what the ledger says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from invariants import assert_same_generation
from memory_chat import converse, vision_bytes
from plphp.settings.vision_budget import RULES
from tier_reference import books_file
from tiny_models import TIERS, tiers_model

pytestmark = pytest.mark.usefixtures("float64")

METHODS = ("none", "quantized", "plphp", "uniform:retention_rate=0.5", 'random:tiers="pr2=.2,whole=.1,rvq=.3,pq=.2"')


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("books")


def line(method: str, budget: Any, folder: Path, family: str = "llava", rule: str = "ranked") -> str:
    """A method with a budget, with codebooks where its rungs need them."""
    books = f",books={books_file(folder, family)}" if "pq" in method else ""
    return f"{method}{',' if ':' in method else ':'}vision_budget={budget},fading={rule}{books}"


def spent(method: str, folder: Path, family: str = "llava", turns: int = 4) -> int:
    """Bytes of the vision entries of a conversation that nothing bounds."""
    cache, _ = converse(tiers_model(family), TIERS[family], line(method, "1GB", folder, family), turns)
    return vision_bytes(cache)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", METHODS)
def test_bytes_stay_below_the_budget_after_every_turn(method: str, rule: str, folder: Path) -> None:
    full = spent(method, folder)
    for share in (0.6, 0.2):
        budget = int(share * full)
        for turns in (2, 4):
            cache, _ = converse(tiers_model("llava"), TIERS["llava"], line(method, budget, folder, rule=rule), turns)
            assert 0 < vision_bytes(cache) <= budget


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "gemma3"])
@pytest.mark.parametrize("method", METHODS)
def test_a_budget_that_does_not_bind_changes_nothing(method: str, family: str, folder: Path) -> None:
    model, tiny = tiers_model(family), TIERS[family]
    bounded = line(method, "1GB", folder, family)
    cache, outputs = converse(model, tiny, bounded, 3)
    free = bounded.replace("vision_budget=1GB,fading=ranked", "seed=0").replace(",books=", ",books=")
    other, expected = converse(model, tiny, free, 3)
    for output, own in zip(outputs, expected, strict=True):
        assert_same_generation(output, own)
    assert cache.nbytes == other.nbytes
