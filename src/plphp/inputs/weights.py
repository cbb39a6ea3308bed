# SPDX-License-Identifier: Apache-2.0
"""The weights of a model by their hash."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from plphp.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn


SAMPLED = 64
"""Values of each tensor that `_sample` reads; smaller tensors are read whole."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_kept: WeakKeyDictionary[nn.Module, tuple[Any, dict[str, str]]] = WeakKeyDictionary()
_lock = threading.Lock()


def kept_weights_hash(model: nn.Module) -> str:
    """`weights_hash`, worked out once and again only after the weights have changed.

    That they have changed is seen by where their tensors lie, by the count of writes that PyTorch keeps for each
    (optimizers, ``load_state_dict`` and whatever else writes to a parameter), and by `SAMPLED` values of each at fixed
    places. What writes past that count (to ``parameter.data``, as frameworks of reinforcement learning and moving
    averages do, to memory that is shared with NumPy, or to tensors made in inference mode) is noticed where it changes
    one of those values: whenever it changes more than a few.

    Raises
    ------
    UnsupportedModelError
        See `weights_hash`.
    """
    return hash_kept(model, "weights", weights_hash)


def hash_kept(model: nn.Module, kind: str, hash_of: Callable[[nn.Module], str]) -> str:
    """A hash of the weights of a model, worked out as `kept_weights_hash` says; ``kind`` names it."""
    with _lock:
        tensors = [tensor.detach() for part in (model.parameters(), model.buffers()) for tensor in part]
        state = [_state(tensor) for tensor in tensors], _sample(tensors)
        kept = _kept.get(model)
        if kept is None or kept[0] != state:
            kept = _kept[model] = state, {}
        if kind not in kept[1]:
            kept[1][kind] = hash_of(model)
        return kept[1][kind]


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """What differs after a tensor was written to or replaced; reading it costs no pass over its elements."""
    writes = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), writes, tensor.dtype, tuple(tensor.shape)


def _sample(tensors: Iterable[Tensor]) -> list[bytes]:
    """Values of each tensor at places that are always the same, by device and by the size of a value; the reading
    waits for the devices. What is not in memory as it is (`weights_in_memory`) is left out."""
    parts: dict[tuple[torch.device, int], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        if not _in_memory(tensor):
            continue
        values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        bits = values.view(_BITS[values.element_size()])  # of which NaN is equal to itself
        count = bits.numel()
        taken = bits.flatten() if count <= SAMPLED else torch.take(bits, _places(count, bits.device))
        parts[bits.device, bits.element_size()].append(taken)
    return [torch.cat(part).cpu().numpy().tobytes() for part in parts.values()]


@functools.lru_cache
def _places(count: int, device: torch.device) -> Tensor:
    """Places among so many values, int64 [`SAMPLED`]: drawn once, as equal steps would stay in a few columns."""
    return torch.randint(count, (SAMPLED,), generator=torch.Generator().manual_seed(count)).to(device)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over the names, types and bytes of all weights, in the order of their names.

    Raises
    ------
    UnsupportedModelError
        If some weights are not in memory as they are: offloaded to a disk, or a tensor of several others.
    """
    digest = hashlib.sha256()
    state = weights_in_memory(model)
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_in_memory(model: nn.Module) -> dict[str, Tensor]:
    """All weights by name.

    Raises
    ------
    UnsupportedModelError
        If some are not in memory as they are.
    """
    state: dict[str, Tensor] = model.state_dict()
    for name, tensor in state.items():
        if not _in_memory(tensor):
            raise UnsupportedModelError(
                f"The weights {name!r} of {type(model).__name__} are not in memory as they are (offloaded, spread over "
                "devices, or packed?), so they have no hash."
            )
    return state


def _in_memory(tensor: Tensor) -> bool:
    made_of_others = hasattr(tensor, "__tensor_flatten__")  # on other devices, or packed
    return not tensor.is_meta and not made_of_others
