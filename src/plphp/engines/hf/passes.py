# SPDX-License-Identifier: Apache-2.0
"""Where a forward pass over the layers of a cache is, so that one that was cut off is noticed."""

from __future__ import annotations


class PassGuard:
    """Follows the updates of a cache: layers come in order, and each is read before the next one is updated.

    Parameters
    ----------
    end : int
        The last layer that a pass updates.

    Attributes
    ----------
    pending : int or None
        Layer that was updated and not read yet.
    """

    def __init__(self, end: int) -> None:
        self._end = end
        self.reset()

    def reset(self) -> None:
        """Between two passes."""
        self.pending: int | None = None
        self._reached, self._conv_of = self._end, -1

    def begins_anew(self, layer: int) -> bool:
        """Whether an update of this layer follows a pass that never reached its end."""
        return layer <= self._reached < self._end

    def enter(self, layer: int) -> None:
        """Note the update of a layer."""
        self._reached, self._conv_of = layer, -1

    def enter_conv(self, layer: int) -> None:
        """Note the first of the two updates of a linear-attention layer."""
        self.enter(layer)
        self._conv_of = layer

    def in_conv(self, layer: int) -> bool:
        """Note the second update of a linear-attention layer; whether the first came before: decoding may skip it."""
        due, self._conv_of = self._conv_of == layer, -1
        return due

    @property
    def cut_off(self) -> bool:
        """Whether a pass that is over did not get to its end."""
        return self._reached != self._end or self._conv_of >= 0 or self.pending is not None
