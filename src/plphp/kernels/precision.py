# SPDX-License-Identifier: Apache-2.0
"""Arithmetic that is done in the dtypes that it is written in, whatever ``torch.autocast`` asks of the model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def as_written(device: torch.device) -> AbstractContextManager[Any]:
    """Leave autocast while the context is open: under it a product of float32 tensors is taken in bfloat16.

    Parameters
    ----------
    device : torch.device
        Of the tensors. Where autocast is off for it nothing is done, which costs less than a microsecond.
    """
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
