# SPDX-License-Identifier: Apache-2.0
"""Numbers of bytes as people write them."""

from __future__ import annotations

import pytest

from plphp.errors import ConfigError
from plphp.settings.byte_counts import byte_count


@pytest.mark.parametrize(
    ("text", "count"),
    [("5", 5), ("7b", 7), ("200MB", 200_000_000), ("1.5GiB", 3 * 2**29), (" 2 kib ", 2048), ("1tb", 10**12)],
)
def test_units(text: str, count: int) -> None:
    assert byte_count(text, "x") == count


@pytest.mark.parametrize("text", ["", "GB", "-1MB", "1e9", "2 G", "0", "0.1B", "1,5GB", "inf"])
def test_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="x must be a number of bytes"):
        byte_count(text, "x")
