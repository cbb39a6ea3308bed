# SPDX-License-Identifier: Apache-2.0
"""A tiny model in the hub's format and a picture, for commands."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny_hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hub.save(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hub.picture(tmp_path_factory.mktemp("images") / "a.png")
