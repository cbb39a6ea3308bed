# SPDX-License-Identifier: Apache-2.0
"""The bundled model behind a server, by the settings ``CONFIG`` and ``LIMITS`` of the file that asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from chat_client import Client, serving

from plphp.inputs.loading import load_model
from plphp.serving.served_model import ServedModel


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_model(None)


@pytest.fixture(scope="module")
def running(loaded: Any, request: pytest.FixtureRequest) -> Iterator[tuple[Client, ServedModel]]:
    with serving(*loaded, request.module.CONFIG, request.module.LIMITS) as pair:
        yield pair
    assert "generate" not in loaded[0].__dict__


@pytest.fixture
def client(running: Any) -> Client:
    return running[0]
