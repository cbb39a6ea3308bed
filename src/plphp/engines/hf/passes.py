# SPDX-License-Identifier: Apache-2.0
"""Where a forward pass over the layers of a cache is, so that a pass that was cut off is noticed.

Transformers tells a cache nothing of passes: it sees `update` calls, layer by layer. So their order has to say it all.
Three things can go wrong, and each has its sign:

- An error stops the model between two layers. The next pass begins with a low layer before the last one was reached.
- A layer is updated and its attention never comes to plphp's function: `pending` still names it at the next update.
- A layer with linear attention is updated twice in a pass, its convolution and its recurrent state. An error may fall
  in between, so the convolution alone is no finished layer.
"""

from __future__ import annotations


class PassGuard:
    """Follows the updates of a cache: layers come in order, and each is read before the next is updated.

    Parameters
    ----------
    end : int
        The last layer that a pass updates.

    Attributes
    ----------
    pending : int or None
        Layer that was updated and not read yet: set by the cache's ``update``, taken back by its ``after_attention``.
    """

    def __init__(self, end: int) -> None:
        self._end = end
        self.reset()

    def reset(self) -> None:
        """Stand between two passes."""
        self.pending: int | None = None
        # As after a whole pass: the next update may be of any layer.
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
        """Note the second update of a linear-attention layer; return whether the first came before it.

        Kernels that decode write the convolution's state in place and skip the first update.
        """
        due, self._conv_of = self._conv_of == layer, -1
        return due

    @property
    def cut_off(self) -> bool:
        """Whether a pass that runs no more stopped before its end."""
        return self._reached != self._end or self._conv_of >= 0 or self.pending is not None
