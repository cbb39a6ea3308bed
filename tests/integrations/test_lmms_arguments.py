# SPDX-License-Identifier: Apache-2.0
"""What --model_args says of pruning; no lmms-eval is needed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from plphp import PLPHPConfig
from plphp.errors import ConfigError
from plphp.integrations.lmms_eval.arguments import check_known, read_count, read_settings
from plphp.settings.presets import default_settings, write_preset


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("none", "none"),
        ("plphp:target_retention=0.4", "plphp:target_retention=0.4"),
        ("'query_bank:bank=bundled,retention_rate=0.2'", "query_bank:bank=bundled,retention_rate=0.2"),
        ('"query_bank:bank=bundled,retention_rate=0.2"', "query_bank:bank=bundled,retention_rate=0.2"),
        (
            """'query_bank:bank=bundled,tiers="pr2=.20,rvq=.24,pq=.32"'""",
            'query_bank:bank=bundled,tiers="pr2=.20,rvq=.24,pq=.32"',
        ),
    ],
)
def test_settings_stand_in_quotes_or_without(written: str, meant: str) -> None:
    assert read_settings(written, None, bundled=False) == PLPHPConfig.parse(meant)


@pytest.mark.parametrize("bundled", [True, False])
def test_defaults_are_those_of_generate(bundled: bool) -> None:
    assert read_settings(None, None, bundled=bundled) == default_settings(bundled)


def test_a_preset_file(tmp_path: Path) -> None:
    config = PLPHPConfig.parse("plphp:target_retention=0.3")
    write_preset(tmp_path / "a,b.toml", config, {})
    assert read_settings(None, f"'{tmp_path}/a,b.toml'", bundled=False) == config


@pytest.mark.parametrize(
    ("config", "file", "said"),
    [
        ("plphp", "preset.toml", "contradict each other"),
        ("plhp", None, "Unknown method 'plhp'. Did you mean 'plphp'?"),
        ("plphp:retention=0.4", None, "retention"),
        ("query_bank:retention_rate=0.2", None, "would answer the first documents of the benchmark unpruned"),
    ],
)
def test_settings_that_are_refused(config: str, file: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_settings(config, file, bundled=False)


def test_the_rest_of_settings_that_were_cut_is_named() -> None:
    with pytest.raises(ConfigError, match=r"takes no argument 'seed'.*stand in single quotes"):
        check_known({"seed": 1}, ("config", "dtype"))


@pytest.mark.parametrize("value", ["auto", "0", "2.5", 0, None, "auto:4"])
def test_counts_are_integers(value: object) -> None:
    with pytest.raises(ConfigError, match=f"batch_size must be an integer of at least 1, got {value!r}"):
        read_count("batch_size", value)
    assert read_count("batch_size", "8") == 8


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    """Neither torch by the entry point, nor lmms-eval by plphp itself."""
    code = "import sys, plphp.integrations.lmms_eval, plphp.cli; assert not {'torch', 'lmms_eval'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
