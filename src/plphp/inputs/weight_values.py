# SPDX-License-Identifier: Apache-2.0
"""The weights of a model by a hash of their values: the same in every dtype that a checkpoint is read in."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .weights import hash_kept, weights_in_memory

if TYPE_CHECKING:
    from torch import nn

THREADS = 8
"""Tensors that are hashed at once by `weights_values_hash`."""
LEAST = torch.finfo(torch.float16).tiny
"""Numbers below it count as 0 in `weights_values_hash`: float16 holds them in fewer bits than bfloat16, or none."""


def kept_weights_values_hash(model: nn.Module) -> str:
    """`weights_values_hash`, worked out again only after the weights have changed, as `kept_weights_hash` is.

    Raises
    ------
    UnsupportedModelError
        See `weights_values_hash`.
    """
    return hash_kept(model, "values", weights_values_hash)


def weights_values_hash(model: nn.Module) -> str:
    """SHA-256 over the shapes and values of all weights, whatever their names, with the values rounded to bfloat16.

    A checkpoint has the same in whatever dtype it is read, and in versions of transformers that name its weights
    otherwise. (One of float32 may have another in float16, where its numbers are rounded twice.)

    Raises
    ------
    UnsupportedModelError
        If some weights are not in memory as they are: offloaded to a disk, or a tensor of several others.
    """
    state = weights_in_memory(model)
    with ThreadPoolExecutor(THREADS) as threads:
        # A set: whether weights that are shared are there once or twice depends on the version of transformers.
        digests = set(threads.map(_values_hash, state.values()))
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def _values_hash(tensor: Tensor) -> str:
    values = tensor.detach()
    if values.is_floating_point():
        values = values.to(torch.bfloat16)
        values = torch.where(values.abs() < LEAST, 0, values)
    values = values.cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(values.shape)};".encode())
    digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
