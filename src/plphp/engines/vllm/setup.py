# SPDX-License-Identifier: Apache-2.0
"""What the worker knows before the first request: the methods, the model's layers, blocks and processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from plphp.policy.chain import Chain

from .tensor_parallel import TensorParallel


@dataclass(frozen=True)
class Setup:
    """How one worker prunes.

    Parameters
    ----------
    chain : Chain
        What is done at each stage.
    layers : int
        Decoder layers of the model.
    block_size : int
        Tokens of a block of the pool.
    tensor_parallel : TensorParallel
        The processes that share the heads of a layer.
    """

    chain: Chain
    layers: int
    block_size: int
    tensor_parallel: TensorParallel = field(default_factory=TensorParallel)
