# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures: one model per family, built once."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not os.path.exists("/dev/nvidiactl"):  # torch imports triton, which has to know before
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers.utils import logging

import precision
from tiny_models import tiny_model

logging.set_verbosity_error()
torch.set_num_threads(int(os.environ.get("PLPHP_TEST_THREADS", "1")))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "own_dtype: names the dtype of its models, in a module of tests in float64")


@pytest.fixture
def float64(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny models in float64, see `precision`: what compares two routes to the same logits."""
    with nullcontext() if request.node.get_closest_marker("own_dtype") else precision.float64():
        yield


@pytest.fixture
def llava() -> Iterator[Any]:
    """A tiny LLaVA; fails the test if it is not left as it was."""
    model = tiny_model("llava")
    before = set(model.__dict__), model.config.get_text_config()._attn_implementation
    yield model
    assert (set(model.__dict__), model.config.get_text_config()._attn_implementation) == before
