# SPDX-License-Identifier: Apache-2.0
"""The settings of a budget: how it is written, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from plphp import ConfigError, PLPHPConfig
from plphp.methods.registry import chain_of
from plphp.settings.vision_budget import VisionBudget


@pytest.mark.parametrize(
    ("written", "nbytes"),
    [
        (1, 1),
        ("12 B", 12),
        ("200MB", 200_000_000),
        ("200 mb", 200_000_000),
        ("1.5GiB", 1_610_612_736),
        (".5kB", 500),
        ("2KiB", 2048),
        ("1TB", 10**12),
    ],
)
def test_bytes(written: Any, nbytes: int) -> None:
    assert VisionBudget.parse(written) == VisionBudget(nbytes=nbytes)
    assert VisionBudget.parse(written).bytes_of(10) == nbytes
    config = PLPHPConfig(vision_budget=written)
    assert PLPHPConfig.from_dict(config.to_dict()) == config


def test_tokens_on_a_line() -> None:
    config = PLPHPConfig.parse("query_bank:bank=bundled,vision_budget=2048 tokens,fading=equal")
    assert VisionBudget.parse(config.vision_budget).bytes_of(100) == 204_800
    assert config.fading == "equal"
    assert PLPHPConfig.parse('plphp:vision_budget="1 tokens"') == PLPHPConfig(vision_budget="1 tokens")
    assert PLPHPConfig.parse("plphp:vision_budget=200000").vision_budget == 200_000


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        True,
        1.5,
        "0MB",
        "MB",
        "200",
        "200 images",
        "0 tokens",
        "1.5 tokens",
        "\u0663MB",
        "-1GB",
        "1e9",
        "",
        ["1MB"],
    ],
)
def test_what_is_no_budget_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="vision_budget must be a number of bytes above 0, as in 200000000, 200MB"):
        PLPHPConfig(vision_budget=value)


def test_a_rule_is_of_a_budget() -> None:
    with pytest.raises(ConfigError, match=r"fading must be one of 'ranked', 'oldest', 'newest', 'equal', got 'best'"):
        PLPHPConfig(vision_budget=1, fading="best")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"fading=oldest says how images fade under a vision_budget: give one"):
        PLPHPConfig(fading="oldest")


def test_images_wait_for_a_budget_in_host_memory_alone() -> None:
    assert PLPHPConfig.parse("plphp:vision_budget=1MB,tier_device=cpu").tier_device == "cpu"
    with pytest.raises(ConfigError, match="tier_device must be 'cpu' or None, got 'disk'"):
        PLPHPConfig(vision_budget=1, tier_device="disk")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="tier_device=cpu is where images wait that a vision_budget"):
        PLPHPConfig(tier_device="cpu")


def test_a_chain_has_one_budget_with_its_last_method() -> None:
    config = PLPHPConfig.parse("fastv:retention_rate=0.5+plphp:vision_budget=1MB")
    assert chain_of(config).kv.config.vision_budget == "1MB"
    assert chain_of(PLPHPConfig.parse("fastv:vision_budget=1MB")).kv.config.vision_budget == "1MB"
    with pytest.raises(ConfigError, match="give it to the last method of a chain"):
        PLPHPConfig.parse("fastv:vision_budget=1MB+plphp")


def test_codebooks_come_without_tiers_where_images_fade() -> None:
    chain_of(PLPHPConfig.parse("plphp:vision_budget=1MB,books=bundled"))
    chain_of(PLPHPConfig.parse("quantized:vision_budget=1MB,books=bundled"))
    with pytest.raises(ConfigError, match="books=bundled is for entries in few bits"):
        PLPHPConfig.parse("plphp:books=bundled")
