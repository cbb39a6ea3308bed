# SPDX-License-Identifier: Apache-2.0
"""Methods and families by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from transformers import LlavaConfig, PretrainedConfig

import plphp
from plphp import ConfigError, UnsupportedModelError, plugins
from plphp.families.base import Family
from plphp.families.registry import FAMILIES_BY_NAME, family_of
from plphp.families.unsupported import UNSUPPORTED
from plphp.methods.registry import METHODS_BY_NAME, get_method
from plphp.policy.method import Method

PLPHP = plphp.available_methods()["plphp"]


class Config(PretrainedConfig):
    model_type = "unheard-of"


def config(model_type: str) -> PretrainedConfig:
    made = Config()
    made.model_type = model_type
    return made


def family(name: str, *model_types: str) -> Family:
    return Family(name, model_types, lambda config: (1,))


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(METHODS_BY_NAME, "registered", {})
    monkeypatch.setattr(FAMILIES_BY_NAME, "registered", {})
    yield
    METHODS_BY_NAME.forget_discovered()
    FAMILIES_BY_NAME.forget_discovered()


def test_builtin_methods_carry_their_name_and_their_source() -> None:
    known = plphp.available_methods()
    assert {"plphp", "uniform", "shared", "random", "none"} <= known.keys()
    for name, method in known.items():
        assert name == method.name
        assert method.summary
        assert "arXiv" in method.paper or method.paper.startswith("control")


def test_a_registered_method_is_found_and_replaces_only_when_asked() -> None:
    mine = dataclasses.replace(PLPHP, name="mine")
    plphp.register_method(mine)
    assert get_method("mine") is mine
    for taken in ("mine", "plphp"):
        other = dataclasses.replace(PLPHP, name=taken, summary="other")
        with pytest.raises(ConfigError, match=f"The name '{taken}' is taken; pass replace=True"):
            plphp.register_method(other)
        assert get_method(taken).summary != "other"
        plphp.register_method(other, replace=True)
        assert get_method(taken) is other


@pytest.mark.parametrize("item", [None, "plphp", Method, family("x", "y")], ids=["none", "text", "class", "family"])
def test_what_is_no_method_is_refused(item: Any) -> None:
    with pytest.raises(ConfigError, match="Expected a Method, got"):
        plphp.register_method(item)


def test_unknown_method() -> None:
    with pytest.raises(ConfigError, match=r"Unknown method 'plphq'\. Did you mean 'plphp'\?"):
        get_method("plphq")
    with pytest.raises(
        ConfigError, match=r"Unknown method 'xyz'\. Known: adakv, cdpruner, divprune, dpp, encoder_random"
    ):
        get_method("xyz")


def test_a_registered_family_wins_over_a_builtin_one() -> None:
    assert family_of(LlavaConfig()).name == "llava"
    mine = family("mine", "llava", "unheard-of")
    plphp.register_family(mine)
    assert family_of(LlavaConfig()) is mine
    assert family_of(config("unheard-of")) is mine
    with pytest.raises(ConfigError, match="The name 'llava' is taken"):
        plphp.register_family(family("llava", "other"))
    with pytest.raises(ConfigError, match="Expected a Family, got"):
        plphp.register_family(PLPHP)  # type: ignore[arg-type]


@pytest.mark.parametrize("model_type", sorted(UNSUPPORTED))
def test_unsupported_model_gives_its_reason(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        family_of(config(model_type))
    assert f"does not prune this {model_type!r} model: {UNSUPPORTED[model_type]}" in str(error.value)


def test_unknown_model() -> None:
    with pytest.raises(UnsupportedModelError, match=r"does not know 'lava' models\. Did you mean 'llava'\?"):
        family_of(config("lava"))


@dataclass
class FakeEntry:
    """An entry point of an installed package."""

    item: Any
    value: str = "some_package:ITEM"
    name: str = "item"

    def load(self) -> Any:
        if isinstance(self.item, Exception):
            raise self.item
        return self.item


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def entries(**items: Any) -> None:
        def entry_points(group: str) -> list[FakeEntry]:
            return [FakeEntry(items[group[6:]])] if group[6:] in items else []

        monkeypatch.setattr(plugins, "entry_points", entry_points)
        METHODS_BY_NAME.forget_discovered()
        FAMILIES_BY_NAME.forget_discovered()

    return entries


def test_entry_points_of_installed_packages(install: Callable[..., None]) -> None:
    theirs, toy = dataclasses.replace(PLPHP, name="theirs"), family("toy", "unheard-of")
    install(methods=theirs, families=toy)
    assert plphp.available_methods()["theirs"] is theirs
    assert family_of(config("unheard-of")) is toy
    with pytest.raises(ConfigError, match="The name 'theirs' is taken"):
        plphp.register_method(theirs)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (lambda: None, r"The entry point 'some_package:ITEM' of plphp.methods is not a Method"),
        (ImportError("no module"), r"The entry point 'some_package:ITEM' of plphp.methods .* ImportError: no module"),
    ],
    ids=["wrong type", "broken"],
)
def test_entry_point_that_is_no_method(install: Callable[..., None], item: Any, message: str) -> None:
    install(methods=item)
    with pytest.raises(ConfigError, match=message):
        plphp.available_methods()
