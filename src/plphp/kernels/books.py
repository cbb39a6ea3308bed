# SPDX-License-Identifier: Apache-2.0
"""Codebooks of product codes: a vector is cut into parts of 8 or 16 channels, each held as the number of a centroid."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plphp.errors import ConfigError

DTYPE = torch.float16
"""Of centroids."""
CENTROIDS = 256
"""Centroids of a part: as many as a byte can name."""
PART, COARSE_PART = 8, 16
"""Channels of a part of `Books.fine` and `Books.residual`, and of `Books.coarse`."""


@dataclass(frozen=True)
class Books:
    """Centroids of the keys, or of the values, of one decoder layer.

    Keys are as they are cached (post-RoPE). From keys and values alike, the mean over the vision tokens of their prompt
    is taken first, per KV head and channel.

    Parameters
    ----------
    fine : Tensor
        float16 [kv_heads, dim // 8, 256, 8].
    residual : Tensor
        float16 [kv_heads, dim // 8, 256, 8]; of what is left when the nearest centroid of ``fine`` is taken off.
    coarse : Tensor, optional
        float16 [kv_heads, dim // 16, 256, 16]; None where 16 does not divide ``dim``.

    Raises
    ------
    ConfigError
        If the tensors have other shapes or dtypes, or lie on different devices.
    """

    fine: Tensor = field(repr=False)
    residual: Tensor = field(repr=False)
    coarse: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.fine.dim() != 4 or 0 in self.fine.shape:
            raise ConfigError(
                f"Codebooks have the shape [kv_heads, dim // {PART}, {CENTROIDS}, {PART}], got {list(self.fine.shape)}."
            )
        heads, parts = self.fine.shape[:2]
        expected = {"fine": [heads, parts, CENTROIDS, PART], "residual": [heads, parts, CENTROIDS, PART]}
        if parts * PART % COARSE_PART == 0:
            expected["coarse"] = [heads, parts * PART // COARSE_PART, CENTROIDS, COARSE_PART]
        tensors = self.tensors()
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        if shapes != expected:
            raise ConfigError(f"Codebooks have the shapes {shapes}, expected {expected}.")
        if any(tensor.dtype != DTYPE for tensor in tensors.values()):
            dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
            raise ConfigError(f"Codebooks are float16, got {dtypes}.")
        if len({tensor.device for tensor in tensors.values()}) > 1:
            raise ConfigError(f"Codebooks lie on one device, got {[str(t.device) for t in tensors.values()]}.")

    @property
    def kv_heads(self) -> int:
        """KV heads of the layer."""
        return self.fine.shape[0]

    @property
    def dim(self) -> int:
        """Channels of a head."""
        return self.fine.shape[1] * PART

    @property
    def device(self) -> torch.device:
        """Where the centroids are."""
        return self.fine.device

    @property
    def nbytes(self) -> int:
        """Bytes of all centroids."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names of the parameters, without ``coarse`` where there is none."""
        named = {"fine": self.fine, "residual": self.residual}
        return named if self.coarse is None else {**named, "coarse": self.coarse}

    def to(self, device: torch.device) -> Books:
        """The codebooks on a device; the same object if they are there."""
        if self.device == device:
            return self
        return Books(**{name: tensor.to(device) for name, tensor in self.tensors().items()})


@dataclass(frozen=True)
class LayerBooks:
    """Codebooks of one decoder layer.

    Parameters
    ----------
    keys, values : Books
        Of as many KV heads; their dims may differ.

    Raises
    ------
    ConfigError
        If they are of different numbers of KV heads.
    """

    keys: Books
    values: Books
    _elsewhere: dict[torch.device, LayerBooks] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.keys.kv_heads != self.values.kv_heads:
            raise ConfigError(
                f"The codebooks of keys are of {self.keys.kv_heads} KV heads, and those of values of "
                f"{self.values.kv_heads}: expected as many."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerBooks:
        return self  # nothing in it changes, and copies of a cache are of the same model

    @property
    def kv_heads(self) -> int:
        """KV heads of the layer."""
        return self.keys.kv_heads

    @property
    def nbytes(self) -> int:
        """Bytes of all centroids."""
        return self.keys.nbytes + self.values.nbytes

    def to(self, device: torch.device) -> LayerBooks:
        """The codebooks on a device: the same object if they are there, else a copy that all prompts share."""
        if self.keys.device == self.values.device == device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = LayerBooks(self.keys.to(device), self.values.to(device))
        return self._elsewhere[device]

    def check(self, kv_heads: int, key_dim: int, value_dim: int) -> None:
        """Raise `ConfigError` unless the codebooks are of a model with these KV heads and these dimensions."""
        own = self.kv_heads, self.keys.dim, self.values.dim
        if own != (kv_heads, key_dim, value_dim):
            raise ConfigError(
                f"The codebooks are of {own[0]} KV heads with keys of {own[1]} and values of {own[2]} channels, and "
                f"this model has {kv_heads} with {key_dim} and {value_dim}: collect a bank with this model."
            )
