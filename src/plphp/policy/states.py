# SPDX-License-Identifier: Apache-2.0
"""Keys, values and queries of a layer, for rankers that attention scores say too little to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from plphp.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from .rotation import Rotation


@dataclass(frozen=True, eq=False)
class LayerStates:
    """Keys, values and queries of a layer while its entries are chosen.

    Keys and values are those that the layer holds, looked up when they are asked for: nothing here keeps them alive.
    The queries are a copy that is let go as soon as the layer is placed.

    Parameters
    ----------
    tail : callable
        ``() -> (keys, values)``; [batch, kv_heads, seq, dim], post-RoPE, in the dtype that they are held in.
    held : dict of str to Tensor
        The queries, until `let_go`.
    asking : Tensor
        bool [batch, rows]; the query rows that are tokens of their row's prompt, which padding is not.
    index : Tensor
        int64 [rows]; index of each query row among the entries.
    position : Tensor
        int64 [batch, rows]; rotary position of each query row. -1 where it is no single number: with m-RoPE the vision
        tokens, and the text between them and that before them in a later turn.
    end : Tensor
        int64 [batch, 1]; rotary position of the first token behind the prompt.
    scaling : float
        Factor on the logits.
    rotation : Rotation, optional
        Rotary position embedding of the layer, where `Evidence.rotation` asks for it.
    entries : int, optional
        How many entries there are, where the layer holds more.
    zero : tuple of int
        Rows of the batch whose states read as 0, as they are not finite.
    """

    tail: Callable[[], tuple[Tensor, Tensor]]
    held: dict[str, Tensor]
    asking: Tensor
    index: Tensor
    position: Tensor
    end: Tensor
    scaling: float
    rotation: Rotation | None = None
    entries: int | None = None
    zero: tuple[int, ...] = ()

    @property
    def keys(self) -> Tensor:
        """[batch, kv_heads, seq, dim]; post-RoPE keys, a view."""
        return self._sound(self.tail()[0][:, :, : self.entries])

    @property
    def values(self) -> Tensor:
        """[batch, kv_heads, seq, dim]; a view."""
        return self._sound(self.tail()[1][:, :, : self.entries])

    @property
    def queries(self) -> Tensor:
        """[batch, q_heads, rows, dim]; post-RoPE queries.

        Raises
        ------
        ConfigError
            If the layer has been placed.
        """
        if "queries" not in self.held:
            raise ConfigError("The queries of a layer are there for its ranker and allocator, and let go behind them.")
        return self._sound(self.held["queries"])

    def need_rotation(self) -> Rotation:
        """The rotary position embedding of the layer.

        Raises
        ------
        ConfigError
            If the method did not ask for it.
        """
        if self.rotation is None:
            raise ConfigError("The method turns queries, and its evidence does not ask for it: set Evidence.rotation.")
        return self.rotation

    def let_go(self) -> None:
        """Free the queries."""
        self.held.clear()

    def finite(self, valid: Tensor) -> Tensor:
        """bool [batch]; whether all states of valid entries, bool [batch, seq], and of query rows are finite."""
        import torch

        found = []
        for states, counts in ((self.keys, valid), (self.values, valid), (self.queries, self.asking)):
            # A sum is NaN or inf where a number is, and takes little memory.
            finite = states.sum(-1, dtype=torch.promote_types(states.dtype, torch.float32)).isfinite()
            found.append((finite | ~counts[:, None]).flatten(1).all(1))
        return torch.stack(found).all(0)

    def blanked(self, rows: Sequence[int]) -> LayerStates:
        """The states with 0 in some rows of the batch."""
        return replace(self, zero=(*self.zero, *rows))

    def first(self, entries: int) -> LayerStates:
        """The states of the first ``entries`` entries, with the same queries."""
        return replace(self, entries=entries)

    def _sound(self, states: Tensor) -> Tensor:
        if not self.zero:
            return states
        states = states.clone()
        states[list(self.zero)] = 0
        return states
