# SPDX-License-Identifier: Apache-2.0
"""What the page asks for, without the page: both answers, what is chosen, what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import plphp
import tiny_hub
from plphp import ConfigError, LoadError, PLPHPConfig
from plphp.inputs.prompt import build_inputs
from plphp.methods.registry import available_methods, chain_of
from plphp.settings.ladder import LADDERS
from plphp.ui.asking import DEFAULT, EVICT, HELD, Asking, Choice, shown_error
from tiny_models import TIERS

NEW = 6
OWN = PLPHPConfig.parse("plphp:target_retention=0.4")


@pytest.fixture(scope="module")
def model() -> Any:
    return TIERS["llava"].build().eval()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hub.picture(tmp_path_factory.mktemp("images") / "a.png")


@pytest.fixture(scope="module")
def asking(model: Any) -> Asking:
    return Asking(model, tiny_hub.processor(), OWN, bundled=False, max_new_tokens=NEW)


def by_hand(model: Any, file: Path, config: PLPHPConfig) -> tuple[str, int]:
    """The answer, and the tokens of the prompt."""
    processor = tiny_hub.processor()
    inputs = build_inputs(processor, "What?", images=[file])
    with plphp.prune(model, config):
        output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip(), inputs[
        "input_ids"
    ].shape[1]


@pytest.mark.parametrize(
    ("choice", "line"),
    [
        (Choice(), "plphp:target_retention=0.4"),
        (Choice("uniform", retention=0.25), "uniform:retention_rate=0.25"),
        (Choice("snapkv_vision", held="r20"), "snapkv_vision:tiers=r20"),
        (Choice("quantized", held=EVICT), "quantized:tiers=c3"),
        (Choice("uniform", line="fastv:retention_rate=0.7+random:retention_rate=0.5"), None),
    ],
)
def test_both_answers_are_those_by_hand(
    model: Any, asking: Asking, file: Path, choice: Choice, line: str | None
) -> None:
    config = PLPHPConfig.parse(line or choice.line)
    steps: list[str] = []
    outcome = asking.answer(file, "What?", choice, steps.append)
    unpruned, _ = by_hand(model, file, PLPHPConfig(method="none"))
    pruned, tokens = by_hand(model, file, config)
    assert (outcome.unpruned, outcome.pruned) == (unpruned, pruned)
    names = [name for name, _, _ in outcome.rows]
    assert names == [f"KV cache of {tokens} tokens", "first token", "decode per token"]
    assert re.search(r", with [1-9]\d?% of the prompt's KV bytes gone\.$", outcome.verdict)
    assert outcome.verdict.startswith("The same" if pruned == unpruned else "Another")
    assert min(outcome.picture.size) > 200
    assert steps[-1] == "round 1 of 1, pruned"
    assert "generate" not in model.__dict__


def test_settings_are_warmed_up_once(model: Any, file: Path) -> None:
    asking = Asking(model, tiny_hub.processor(), OWN, bundled=False, max_new_tokens=2)
    steps: list[str] = []
    for _ in range(2):
        asking.answer(file, "What?", Choice(), steps.append)
    assert steps.count("getting ready") == 1


def test_every_listed_method_answers(asking: Asking, file: Path) -> None:
    listed = [name for _, name in asking.methods()]
    assert listed[0] == DEFAULT
    assert len(set(listed)) == len(listed)
    # Without a bank there is nothing to compare; the rest answers, or says why this model cannot.
    assert set(available_methods()) - set(listed) <= {"none", "oracle", "query_bank", "g_search"}
    refused = []
    for name in listed:
        try:
            asking.answer(file, "What?", Choice(name, retention=0.9))
        except plphp.PLPHPError as error:
            refused.append((name, shown_error(error)))
    assert {name for name, _ in refused} <= {"vtc_cls", "fopru", "visionzip", "cdpruner", "vtw", "zipvl"}, refused


def test_every_choice_of_the_bundled_model_is_settings_that_fit(model: Any) -> None:
    bundled = Asking(model, tiny_hub.processor(), OWN, bundled=True)
    for held in HELD:
        line = bundled._line(Choice("snapkv_vision", held))
        chain_of(PLPHPConfig.parse(line))
        needs_books = held in LADDERS and any(rung in LADDERS[held] for rung in ("pr2", "pq"))
        assert ("books=bundled" in line) is needs_books
    assert bundled._line(Choice("query_bank", "t10")) == "query_bank:bank=bundled,tiers=t10"


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(line="plhp"), "Did you mean 'plphp'"),
        (Choice("plhp"), "Did you mean 'plphp'"),
        (Choice(line="plphp:retention_rate=2"), "must be between 0 and 1"),
        (Choice(line="plphp@0.5+0.25"), "is not one way to prune"),
        (Choice(line="full"), "is not one way to prune"),
        (Choice(line="blank"), "is not one way to prune"),
        (Choice("uniform", retention=1.5), "A retention must be between 0 and 1"),
        (Choice("divprune", held="c3"), "tiers"),
        (Choice(line="query_bank"), "A comparison"),
        (Choice(line="query_bank:bank=/etc/passwd"), "/etc/passwd is no query bank of this page: it has bundled"),
        (Choice(line="query_bank:bank=me/bank"), "me/bank is no query bank of this page"),
        (Choice(line="query_bank:folder=banks"), "banks is no query bank of this page"),
        (Choice(line="fastv:evidence=bank,bank=a.safetensors+plphp"), "a.safetensors is no query bank of this page"),
        (Choice(line="quantized:tiers=p12.5,books=b.safetensors"), "b.safetensors is no query bank of this page"),
    ],
)
def test_a_choice_that_cannot_be(asking: Asking, file: Path, choice: Choice, message: str) -> None:
    with pytest.raises(plphp.PLPHPError) as caught:
        asking.answer(file, "What?", choice)
    assert message in str(shown_error(caught.value))


def test_a_bank_that_the_page_was_started_with_may_be_named(model: Any) -> None:
    asking = Asking(model, tiny_hub.processor(), OWN, bundled=False)
    asking.config = PLPHPConfig.parse("query_bank:bank=mine.safetensors")
    asking._refuse_others_files(PLPHPConfig.parse("fastv:evidence=bank,bank=mine.safetensors"))


def test_input_that_is_missing_or_broken(asking: Asking, file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no picture: choose one first"):
        asking.answer(None, "What?", Choice())
    for question in (None, "", " \n"):
        with pytest.raises(ConfigError, match="There is no question"):
            asking.answer(file, question, Choice())
    (tmp_path / "broken.png").write_bytes(file.read_bytes()[:200])
    with pytest.raises(LoadError, match="broken"):
        asking.answer(tmp_path / "broken.png", "What?", Choice())
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(LoadError, match="is not an image"):
        asking.answer(tmp_path / "text.png", "What?", Choice())


def test_settings_that_collect_a_bank_first_are_refused_at_the_start(model: Any) -> None:
    with pytest.raises(plphp.UnsupportedFeatureError, match="A comparison"):
        Asking(model, tiny_hub.processor(), PLPHPConfig.parse("query_bank:retention_rate=0.5"), bundled=False)


def test_an_image_of_pillow_does_as_well(asking: Asking, file: Path) -> None:
    assert (
        asking.answer(Image.open(file), "What?", Choice()).unpruned == asking.answer(file, "What?", Choice()).unpruned
    )


def test_errors_that_are_shown() -> None:
    assert shown_error(ConfigError("a\nb")) == "a b"
    assert "Out of memory" in str(shown_error(MemoryError("large")))
    assert shown_error(KeyError("x")) is None
