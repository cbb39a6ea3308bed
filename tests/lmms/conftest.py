# SPDX-License-Identifier: Apache-2.0
"""Tests that run lmms-eval, in the environment that environment.sh makes; elsewhere they are left out."""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import pytest

HAS_LMMS_EVAL = importlib.util.find_spec("lmms_eval") is not None
collect_ignore_glob = [] if HAS_LMMS_EVAL else ["test_*.py"]

if HAS_LMMS_EVAL:  # `datasets` reads it when it is imported, and lmms-eval has no option for it
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the samples and the tasks that read them."""
    import local_tasks

    return local_tasks.write(tmp_path_factory.mktemp("tasks"))
