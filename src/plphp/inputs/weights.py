# SPDX-License-Identifier: Apache-2.0
"""The weights of a model by their hash."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from plphp.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over the names, types and bytes of all weights, in the order of their names.

    Raises
    ------
    UnsupportedModelError
        If some weights are not in memory, as where they are offloaded to a disk.
    """
    digest = hashlib.sha256()
    state = model.state_dict()
    for name in sorted(state):
        if state[name].is_meta:
            raise UnsupportedModelError(
                f"The weights {name!r} of {type(model).__name__} are not in memory (offloaded?), so they have no hash."
            )
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
