# SPDX-License-Identifier: Apache-2.0
"""Settings of ``plphp generate`` where the user gives none or some."""

from plphp import PLPHPConfig
from plphp.cli.generate import read_settings


def test_without_a_rate_the_target_is_two_fifths() -> None:
    assert read_settings(None, None, None, None, None) == PLPHPConfig(target_retention=0.4)
    assert read_settings(None, None, "shared", None, None) == PLPHPConfig(method="shared", target_retention=0.4)


def test_given_rates_are_taken() -> None:
    assert read_settings(None, None, None, 0.3, None) == PLPHPConfig(retention_rate=0.3)
    assert read_settings(None, None, None, None, 0.5) == PLPHPConfig(target_retention=0.5)
    assert read_settings("plphp", None, None, None, None) == PLPHPConfig()
