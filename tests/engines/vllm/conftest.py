# SPDX-License-Identifier: Apache-2.0
"""Tests that run vLLM engines, in the environment that environment.sh makes; elsewhere they are left out."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

# This folder's name is found as a package without a file; vllm itself has this module.
HAS_VLLM = importlib.util.find_spec("vllm.config") is not None
collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model."""
    import tiny_checkpoint

    return tiny_checkpoint.save(tmp_path_factory.mktemp("checkpoint"))
