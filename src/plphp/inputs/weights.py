# SPDX-License-Identifier: Apache-2.0
"""The weights of a model by their hash."""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from plphp.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn


_kept: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()
_lock = threading.Lock()


def kept_weights_hash(model: nn.Module) -> str:
    """`weights_hash`, worked out once and again only after the weights have changed.

    That they have changed is seen by where their tensors lie, and by the count of writes that PyTorch keeps for each:
    optimizers, ``load_state_dict`` and whatever else writes to a parameter are noticed. What writes past that count (to
    ``parameter.data``, to memory that is shared with NumPy, or to tensors made in inference mode) is not.

    Raises
    ------
    UnsupportedModelError
        See `weights_hash`.
    """
    with _lock:
        state = [_state(tensor) for part in (model.parameters(), model.buffers()) for tensor in part]
        kept = _kept.get(model)
        if kept is None or kept[0] != state:
            kept = _kept[model] = state, weights_hash(model)
        return kept[1]


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """What differs after a tensor was written to or replaced; reading it costs no pass over its elements."""
    writes = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), writes, tensor.dtype, tuple(tensor.shape)


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
