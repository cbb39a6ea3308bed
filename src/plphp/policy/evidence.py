# SPDX-License-Identifier: Apache-2.0
"""What is known of a layer's attention before anything is decided: `Evidence` asks for it, `LayerScores` holds it.

Axis names: batch, layer, q_heads, kv_heads, seq, dim, kept. A *row* is a prompt of the batch; a *query row* is a row of
its attention matrix, that of one query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from plphp.errors import ConfigError
from plphp.settings.config import QueryRows

from .states import LayerStates

if TYPE_CHECKING:
    from torch import Tensor

SINKS = 4
"""Tokens at the start of a conversation that attention falls on for want of anything better (arXiv:2309.17453)."""


@dataclass(frozen=True)
class OwnBank:
    """A query bank that the engine collects by itself, from the answers to the first prompts; they are not pruned.

    Parameters
    ----------
    prompts : int
        Prompts whose answers it is collected from.
    folder : str
        Folder that keeps it over restarts (`plphp.policy.bank_folder`); "" to keep it in memory alone.
    """

    prompts: int
    folder: str = ""


@dataclass(frozen=True)
class Evidence:
    """What a method wants to know of a layer beside the mean attention; what nobody asks for is not computed.

    Parameters
    ----------
    rows : int, "text" or "text_after_first"
        The method's own query rows, for a config that leaves ``query_rows`` open: the last n tokens of the prompt, the
        text after its last image, or all text after its first.
    random_rows : int
        How many other tokens of the prompt, drawn at random by the config's ``seed``, are query rows beside those.
    candidates : {"vision", "prompt"}
        Entries that may be evicted: the vision tokens, or all tokens of the prompt before the first query row.
    peak : bool
        Ask for `LayerScores.peak`.
    best_position : bool
        Ask for `LayerScores.best_position`.
    density : float, optional
        Ask for `LayerScores.density` at this fraction of a row's maximum.
    value_norm : bool
        Ask for `LayerScores.value_norm`.
    bank : str or OwnBank, optional
        Name of a query bank (`plphp.policy.bank.bank_file`), or the wish for one that the engine collects by itself;
        its queries take the place of the prompt's own rows.
    beside_rows : bool
        Let the queries of the bank ask beside the prompt's own rows, each query with the same weight in a mean. An own
        row sees the prompt up to itself, a query of the bank all of it.
    weigh_rows : callable, optional
        Ask for `LayerScores.weighted_attention` with the weights that this function gives to the query rows of one
        prompt, from their attention to each other: float32 [q_heads, rows, rows], softmax mass over all keys, to
        float [rows], at least 0. Whatever the sum of the weights, they are scaled to 1; where all are 0, the rows count
        alike. A function of a module and no lambda: methods that ask the same share their scores.
    turned_rows : int, optional
        Most of the prompt's own queries that ask from behind it, in the place of its rows: evenly spread over the
        tokens of this turn, text and vision, without the first 4 of the conversation, and turned there by the rotary
        embedding of the layer, so that each sees the whole prompt. Only tokens of a known rotary position ask (see
        `plphp.policy.states.LayerStates.position`): with m-RoPE the text behind the last image, and in the first turn
        that before the first. Where none is left, the last token asks, as it is if its position is not known.
    turned_ahead : int
        How many tokens behind the first place behind the prompt these queries ask from.
    states : {"rows", "prompt"}, optional
        Ask for `LayerScores.states`, with the queries of the query rows or of all tokens of this turn's prompt.
    rotation : bool
        Ask for `LayerStates.rotation`, which not every engine has.

    Raises
    ------
    ConfigError
        If they contradict each other.
    """

    rows: QueryRows = 1
    random_rows: int = 0
    candidates: Literal["vision", "prompt"] = "vision"
    peak: bool = False
    best_position: bool = False
    density: float | None = None
    value_norm: bool = False
    bank: str | OwnBank | None = None
    beside_rows: bool = False
    weigh_rows: Callable[[Tensor], Tensor] | None = None
    turned_rows: int | None = None
    turned_ahead: int = 0
    states: Literal["rows", "prompt"] | None = None
    rotation: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("candidates", ("vision", "prompt")), ("states", (None, "rows", "prompt"))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"Evidence.{name} must be one of {choices}, got {getattr(self, name)!r}.")
        if type(self.random_rows) is not int or self.random_rows < 0:
            raise ConfigError(f"Evidence.random_rows must be an integer of at least 0, got {self.random_rows!r}.")
        if self.beside_rows and self.bank is None:
            raise ConfigError("Evidence.beside_rows says how a bank asks, and the evidence names no bank.")
        if self.weigh_rows is not None and self.bank is not None:
            raise ConfigError("Evidence.weigh_rows weighs the rows of a prompt, and a bank has no such rows.")
        self._check_turned()
        if self.rotation and self.states is None:
            raise ConfigError("Evidence.rotation comes with the states of a layer: set Evidence.states.")

    @property
    def turns_queries(self) -> bool:
        """Whether the rotary embedding of the model has to be known, which not every engine finds out."""
        return self.rotation or self.turned_rows is not None

    def _check_turned(self) -> None:
        if self.turned_rows is None:
            if self.turned_ahead:
                raise ConfigError("Evidence.turned_ahead says from where turned rows ask: set Evidence.turned_rows.")
            return
        for name, low in (("turned_rows", 1), ("turned_ahead", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"Evidence.{name} must be an integer of at least {low}, got {value!r}.")
        for name, value in (("bank", self.bank), ("weigh_rows", self.weigh_rows)):
            if value is not None:
                raise ConfigError(
                    "Evidence.turned_rows takes the place of the rows that ask a prompt, and does not go together "
                    f"with Evidence.{name}: leave out one of them."
                )


EVIDENCE = ("attention", "weighted_attention", "peak", "best_position", "density", "value_norm")
"""The tensors of `LayerScores` that say something of heads, which are their second dimension."""


@dataclass(frozen=True)
class LayerScores:
    """What a layer's prefill attention says about the entries that may be evicted.

    What follows ``kv_heads`` is there where the method's `Evidence` asks for it.

    Parameters
    ----------
    attention : Tensor
        float32 [batch, q_heads, seq]; softmax mass over *all* keys, averaged over the query rows.
    segment : Tensor
        int64 [batch, seq]; image number of each entry, -1 on text and padding.
    valid : Tensor
        bool [batch, seq]; False on padding.
    layer : int
        Number of the decoder layer.
    kv_heads : int
        KV heads of the layer; ``q_heads`` is a multiple of it.
    queries : Tensor, optional
        bool [batch, seq]; the query rows.
    evictable : Tensor, optional
        bool [batch, seq]; the candidates, where text is among them.
    peak : Tensor, optional
        float32 [batch, q_heads, seq]; largest softmax mass that any query row gives to an entry.
    best_position : Tensor, optional
        int64 [batch, kv_heads, seq]; the best position (0 is the first) that any query row gives to an entry among
        the candidates, after the query heads of a KV head were combined. ``seq`` where no query row sees it.
    density : Tensor, optional
        float32 [batch, q_heads]; share of the entries seen by a query row that get at least a given fraction of
        the row's maximum, averaged over the query rows.
    value_norm : Tensor, optional
        float32 [batch, kv_heads, seq]; L2 norm of the values.
    weighted_attention : Tensor, optional
        float32 [batch, q_heads, seq]; as ``attention``, with the query rows weighed by `Evidence.weigh_rows`.
    token_number : Tensor, optional
        int64 [batch, seq]; number of each entry among the tokens of its row, from 0, those of earlier turns counted.
        Always there behind a model; that of padding means nothing.
    states : LayerStates, optional
        Keys, values and queries.
    """

    attention: Tensor
    segment: Tensor
    valid: Tensor
    layer: int
    kv_heads: int
    queries: Tensor | None = None
    evictable: Tensor | None = None
    peak: Tensor | None = None
    best_position: Tensor | None = None
    density: Tensor | None = None
    value_norm: Tensor | None = None
    weighted_attention: Tensor | None = None
    token_number: Tensor | None = None
    states: LayerStates | None = None

    @property
    def vision(self) -> Tensor:
        """bool [batch, seq]; True on vision tokens."""
        return self.segment >= 0

    @property
    def candidates(self) -> Tensor:
        """bool [batch, seq]; True on the entries that may be evicted."""
        return self.vision if self.evictable is None else self.evictable

    def need(self, name: str) -> Tensor:
        """Return a piece of evidence.

        Raises
        ------
        ConfigError
            If the method did not ask for it.
        """
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ConfigError(f"The method scores by {name!r}, which its evidence does not ask for: see Evidence.")
        return value

    def need_states(self) -> LayerStates:
        """Return keys, values and queries.

        Raises
        ------
        ConfigError
            If the method did not ask for them.
        """
        if self.states is None:
            raise ConfigError("The method scores by keys, values or queries: set Evidence.states.")
        return self.states

    def finite(self) -> Tensor:
        """bool [batch]; whether all that ranks a row is a finite number, as that of padding need not be."""
        finite = self.attention.isfinite().flatten(1).all(1)
        if self.value_norm is not None:
            finite &= (self.value_norm.isfinite() | ~self.valid[:, None]).flatten(1).all(1)
        if self.states is not None:
            finite &= self.states.finite(self.valid)
        return finite

    def blanked(self, rows: Sequence[int]) -> LayerScores:
        """The scores with 0 in all evidence of some rows."""
        evidence = {name: getattr(self, name) for name in EVIDENCE}
        copies: dict[str, Any] = {name: tensor.clone() for name, tensor in evidence.items() if tensor is not None}
        for tensor in copies.values():
            tensor[list(rows)] = 0
        return replace(self, **copies, states=None if self.states is None else self.states.blanked(rows))

    def first(self, entries: int) -> LayerScores:
        """The scores of the first ``entries`` entries alone."""
        from torch import Tensor

        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "density"}
        cut: dict[str, Any] = {name: v[..., :entries] for name, v in tensors.items() if isinstance(v, Tensor)}
        return replace(self, **cut, states=None if self.states is None else self.states.first(entries))

    def vision_score(self) -> Tensor:
        """float32 [batch]; the layer's vision attention score gamma, in [0, 1]."""
        masked = self.attention.masked_fill(~self.vision[:, None], 0)
        return masked.sum(-1).mean(-1)
