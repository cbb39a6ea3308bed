# SPDX-License-Identifier: Apache-2.0
"""The bundled model, loaded once."""

from __future__ import annotations

from typing import Any

import pytest

from plphp.inputs.loading import load_model


@pytest.fixture(scope="session")
def bundled() -> Any:
    """(model, processor) in float32."""
    return load_model(dtype="float32", device="cpu")
