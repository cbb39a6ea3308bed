# SPDX-License-Identifier: Apache-2.0
"""The settings of one pruning run: a frozen, validated dataclass."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from plphp.errors import ConfigError, did_you_mean

from .checks import (
    KEPT_BY,
    check_choice,
    check_classes,
    check_fraction,
    check_int,
    check_rates,
    check_room,
    check_tiers,
    layer_numbers,
    table_of,
)
from .grammar import read_chain
from .hub_settings import HubSettings
from .ladder import Ladder
from .options import Options, Value
from .vision_budget import check_budget

DECODE_MODES = ("eager", "auto", "graph")
DEFAULT_RATE, DEFAULT_DELTA = 0.4, 0.3
DEFAULT: dict[str, Any] = {"method": "quantized", "tiers": "c3"}
"""Settings of a run that is given none: they need nothing that was measured on the model."""
QueryRows = int | Literal["text", "text_after_first"]


@dataclass(frozen=True, kw_only=True)
class PLPHPConfig(HubSettings):
    """Settings of Per-Layer Per-Head Vision Token Pruning and of the methods beside it.

    Rates are retention rates: the fraction of vision tokens *kept*, between 0 and 1. The default values are
    starting points; the paper's abstract does not give its own.

    Parameters
    ----------
    method : str
        Name of the method, see ``plphp methods``.
    retention_rate : float
        Retention rate of a vision-balanced layer (the paper's r), in [0, 1]; at 0 a KV head still keeps ``min_kept``
        tokens. For methods without layer classes it is the mean over the layers.
    retention_delta : float, optional
        What a vision-attentive layer keeps more and a vision-indifferent layer keeps less (the paper's delta r).
        Default: 0.3, or less where ``retention_rate`` leaves less room in [0, 1]; so ``retention_rate=1.0``
        keeps everything.
    attentive_threshold : float
        Vision attention score from which a layer is vision-attentive (the paper's alpha), in [0, 1]. Beside ``tiers``
        it is refused, and so is the other threshold.
    indifferent_threshold : float
        Vision attention score below which a layer is vision-indifferent (the paper's beta), in [0, 1].
    target_retention : float, optional
        Mean retention rate over the layers of each prompt, exempt ones aside, in (0, 1]. It takes the place of
        ``retention_rate``, which is refused beside it, and quantiles of the prompt's own vision attention scores take
        the place of both thresholds, too: the ``class_quantile`` of layers with the highest score are attentive, as
        many with the lowest are indifferent. Until the last layer has been scored, each keeps what it may still be
        allowed to.
    class_quantile : float
        See ``target_retention``; in (0, 0.5].
    exempt_layers : tuple of int
        Decoder layers that keep all vision tokens; negative numbers count from the last layer.
    query_rows : int, "text" or "text_after_first", optional
        Which rows of the prompt's attention rank the vision tokens: the last n prompt tokens, all text after the last
        image, or all text after the first. Default: the method's own; 1 for ``plphp``, as in the paper.
    gqa_reduction : {"mean", "max"}
        How the query heads that share a KV head are combined.
    image_quota : {"pooled", "per_image"}
        Whether the images of a prompt compete for the kept places, or each keeps its own share.
    score_pool : int
        Odd number of neighbouring vision tokens of an image, in prompt order, over which the ranking is averaged;
        1 leaves it as it is.
    min_kept : int
        Vision tokens that each KV head keeps at least (per image with ``image_quota="per_image"``).
    heads : {"equal", "ragged"}, optional
        Whether every KV head of a layer keeps as many tokens, or the heads compete for the places of their layer, by
        the method's own scores; a layer keeps as much either way. Default: the method's own. vLLM needs "equal".
    head_safeguard : float
        Share of its equal part that each head keeps in any case where ``heads`` is "ragged", in [0, 1].
    tiers : str, optional
        The ladder (`plphp.settings.ladder`) by which a layer holds its vision entries in few bits, the best in the
        most: a name such as ``"t10"``, or rungs with shares, ``"pr2=.20,rvq=.24,pq=.32"``; what no rung takes is
        dropped. It says how much is kept, as ``target_retention`` does: layers that a method sorts into classes have
        more or less of every rung. Default: entries are held whole, or dropped.
    read : float
        Share of the entries in few bits that a decoding step reads, in (0, 1]; each step and KV head has its own.
    rest : bool
        Whether the entries that a step does not read stand in by what their codes say of them, all of a head together;
        false goes with a ``read`` below 1 alone.
    books : str, optional
        File, folder or hub id of a query bank, or ``"bundled"``, whose codebooks the product codes of ``tiers`` use.
        Default: those of the bank that the method asks.
    vision_budget : int or str, optional
        Most bytes of the vision entries of a cache: a number, ``"200MB"`` or ``"2048 tokens"``
        (`plphp.settings.vision_budget`). Beyond it images fade to fewer bits.
    fading, tier_device : str, optional
        The rule by which they fade (`plphp.policy.fading_rules`), and ``"cpu"`` for whole images to wait there.
    seed : int
        Seed of what is drawn at random.
    options : mapping
        Options of the method itself, see ``plphp methods``; immutable.
    earlier : tuple of PLPHPConfig
        Methods that act before this one at earlier stages, each with settings of its own and none before it: what
        leaves there is not there for this one. ``"fastv:retention_rate=0.5+plphp"`` on a line.
    calibrated_layers : int, optional
        Decoder layers of the model that the thresholds were calibrated on, see `plphp.calibrate`. Used on a model
        with another number, a warning is logged once.

    Raises
    ------
    ConfigError
        If a value is out of range, has the wrong type, or contradicts another one.

    References
    ----------
    .. [1] PLPHP: Per-Layer Per-Head Vision Token Pruning for Efficient Large Vision-Language Models,
       arXiv:2502.14504.
    """

    method: str = "plphp"
    retention_rate: float = DEFAULT_RATE
    retention_delta: float | None = None
    attentive_threshold: float = 0.25
    indifferent_threshold: float = 0.10
    target_retention: float | None = None
    class_quantile: float = 1 / 3
    exempt_layers: tuple[int, ...] = ()
    query_rows: QueryRows | None = None
    gqa_reduction: Literal["mean", "max"] = "mean"
    image_quota: Literal["pooled", "per_image"] = "pooled"
    score_pool: int = 1
    min_kept: int = 1
    heads: Literal["equal", "ragged"] | None = None
    head_safeguard: float = 0.2
    tiers: str | None = None
    read: float = 1.0
    rest: bool = True
    books: str | None = None
    vision_budget: int | str | None = None
    fading: Literal["ranked", "oldest", "newest", "equal"] = "ranked"
    tier_device: Literal["cpu"] | None = None
    seed: int = 0
    options: Mapping[str, Value] = field(default_factory=lambda: Options({}))
    calibrated_layers: int | None = None
    earlier: tuple[PLPHPConfig, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or not self.method:
            raise ConfigError(f"method must be the name of a method, got {self.method!r}.")
        check_classes(self.attentive_threshold, self.indifferent_threshold, self.class_quantile)
        self._check_how_much_is_kept()
        object.__setattr__(self, "exempt_layers", layer_numbers(self.exempt_layers))
        if self.query_rows not in (None, "text", "text_after_first"):
            check_int("query_rows", self.query_rows, minimum=1, or_else="'text' or 'text_after_first'")
        check_choice("gqa_reduction", self.gqa_reduction, ("mean", "max"))
        check_choice("image_quota", self.image_quota, ("pooled", "per_image"))
        check_int("score_pool", self.score_pool, minimum=1)
        if self.score_pool % 2 == 0:
            raise ConfigError(f"score_pool must be odd, so that it has a middle, got {self.score_pool}.")
        check_int("min_kept", self.min_kept, minimum=0)
        if self.heads is not None:
            check_choice("heads", self.heads, ("equal", "ragged"))
        check_fraction("head_safeguard", self.head_safeguard)
        check_int("seed", self.seed, minimum=0)
        check_budget(self.vision_budget, self.fading, self.tier_device)
        object.__setattr__(self, "options", Options(self.options))
        if self.calibrated_layers is not None:
            check_int("calibrated_layers", self.calibrated_layers, minimum=1, or_else="None")
        object.__setattr__(self, "earlier", _chained(self.earlier))

    def _check_how_much_is_kept(self) -> None:
        check_fraction("retention_rate", self.retention_rate)
        for name in ("retention_delta", "target_retention"):
            if getattr(self, name) is not None:
                check_fraction(name, getattr(self, name))
        if self.target_retention == 0:
            raise ConfigError(
                "target_retention must be above 0, got 0: to evict every vision token, use retention_rate=0 with "
                "min_kept=0."
            )
        check_tiers(self.tiers, self.read, self.rest, self.books, self.vision_budget)
        check_rates(self.tiers, self.given_rates)
        which = "retention_rate" if self.target_retention is None else "target_retention"
        check_room(which if self.tiers is None else "the rate of tiers", self.base_rate, self.delta)

    @property
    def ladder(self) -> Ladder | None:
        """The ladder that ``tiers`` names; None where entries are held whole or dropped."""
        return None if self.tiers is None else _ladder_of(self.tiers)

    @property
    def base_rate(self) -> float:
        """Retention rate of a balanced layer: what the ladder keeps, else ``target_retention`` if set, else
        ``retention_rate``."""
        if self.ladder is not None:
            return self.ladder.kept
        return self.retention_rate if self.target_retention is None else self.target_retention

    @property
    def sorts_by_order(self) -> bool:
        """Whether the order of a prompt's vision attention scores sorts its layers into classes, so that their rates
        have the mean that ``target_retention`` or the ladder says; else both thresholds do."""
        return self.target_retention is not None or (self.ladder is not None and self.delta > 0)

    @property
    def given_rates(self) -> dict[str, float]:
        """Those of the settings that say how much is kept beside a ladder which are not at their defaults."""
        values = {name: getattr(self, name) for name in KEPT_BY}
        return {name: value for name, value in values.items() if value != getattr(PLPHPConfig, name)}

    @property
    def delta(self) -> float:
        """``retention_delta``, or its default for the base rate."""
        if self.retention_delta is not None:
            return self.retention_delta
        return min(DEFAULT_DELTA, self.base_rate, 1 - self.base_rate)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as JSON-ready values; ``from_dict`` reads them back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        earlier = [config.to_dict() for config in self.earlier]
        return {**values, "exempt_layers": list(self.exempt_layers), "options": dict(self.options), "earlier": earlier}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PLPHPConfig:
        """Make a config from a mapping of setting names to values.

        Raises
        ------
        ConfigError
            If a key is unknown or a value is not valid. The options of a method are checked where it is looked up
            (`plphp.methods.registry.resolve`).
        """
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"Expected a mapping of settings, got {type(values).__name__}: PLPHPConfig.parse reads text."
            )
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise ConfigError(f"Unknown setting {key!r}.{did_you_mean(str(key), known)}")
        earlier = values.get("earlier", ())
        if not isinstance(earlier, (list, tuple)) or not all(isinstance(part, (cls, Mapping)) for part in earlier):
            raise ConfigError(f"earlier must be a list of tables of settings, got {earlier!r}.")
        for part in earlier:
            if not isinstance(part, cls) and "method" not in part:
                raise ConfigError(f"A table of earlier names its method, got {dict(part)!r}.")
        chained = tuple(part if isinstance(part, cls) else cls.from_dict(part) for part in earlier)
        return cls(**{**values, "earlier": chained})

    @classmethod
    def from_toml(cls, path: str | Path) -> PLPHPConfig:
        """Read a config from a TOML file, from its table ``[plphp]`` if there is one, else from the top level.

        Raises
        ------
        ConfigError
            If the file cannot be read, is not TOML, or holds an unknown key or value.
        """
        return cls.from_dict(table_of(path, {*SETTINGS, "options", "earlier"}))

    @classmethod
    def parse(cls, text: str) -> PLPHPConfig:
        """Read a config from one line, ``"method"``, ``"method:key=value,key=value"`` or a chain of these by ``+``.

        A key that is no setting is taken for an option of the method, and refused where the method is looked up if it
        is none. `plphp.settings.grammar` has the whole grammar.

        Examples
        --------
        >>> PLPHPConfig.parse("plphp:retention_rate=0.5,gqa_reduction=max").retention_rate
        0.5
        >>> PLPHPConfig.parse("snapkv:kernel=7,retention_rate=0.3").options
        {'kernel': 7}
        >>> PLPHPConfig.parse("fastv:retention_rate=0.5+plphp").earlier[0].method
        'fastv'
        """
        *earlier, last = (cls._of_part(method, values) for method, values in read_chain(text))
        return dataclasses.replace(last, earlier=tuple(earlier))

    @classmethod
    def _of_part(cls, method: str, values: dict[str, Any]) -> PLPHPConfig:
        settings = {key: value for key, value in values.items() if key in SETTINGS}
        options = {key: value for key, value in values.items() if key not in SETTINGS}
        check_rates(settings.get("tiers"), settings)  # on a line a default was given, too, where it is written out
        return cls(method=method, **settings, options=options)


SETTINGS = tuple(field.name for field in dataclasses.fields(PLPHPConfig) if field.name not in ("options", "earlier"))
"""Names of the settings that every method has, and that a line can give."""


def checked_mode(decode: str) -> str:
    """Return a mode of decoding.

    Raises
    ------
    ConfigError
        If there is none of that name.
    """
    if decode not in DECODE_MODES:
        raise ConfigError(f"decode must be one of {', '.join(map(repr, DECODE_MODES))}, got {decode!r}.")
    return decode


def checked(config: object) -> PLPHPConfig:
    """Return a config, for None the one of `DEFAULT`: every vision entry in 3 bits.

    Raises
    ------
    ConfigError
        If it is anything else.
    """
    if config is None:
        return PLPHPConfig(**DEFAULT)
    if not isinstance(config, PLPHPConfig):
        raise ConfigError(
            f"config must be a PLPHPConfig, got {type(config).__name__}: use PLPHPConfig.parse for text and "
            "PLPHPConfig.from_dict for a mapping."
        )
    return config


@functools.lru_cache
def _ladder_of(tiers: str) -> Ladder:
    return Ladder.parse(tiers)


def _chained(values: object) -> tuple[PLPHPConfig, ...]:
    if not isinstance(values, (list, tuple)) or not all(isinstance(config, PLPHPConfig) for config in values):
        raise ConfigError(f"earlier must be a tuple of PLPHPConfig, got {values!r}.")
    for config in values:
        if config.earlier:
            raise ConfigError(
                f"A method of a chain names no chain of its own: list all of them in one; {config.method!r} has one."
            )
        if config.vision_budget is not None:
            raise ConfigError("vision_budget is of the whole cache: give it to the last method of a chain.")
    return tuple(values)
