# SPDX-License-Identifier: Apache-2.0
"""What is compared: methods with their settings, at each retention, and the built-in controls."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from plphp.errors import ConfigError, did_you_mean
from plphp.evaluation.settings import FULL
from plphp.methods.registry import available_methods, chain_of, get_method
from plphp.policy.allocation import keep_all
from plphp.policy.method import Method
from plphp.settings.config import PLPHPConfig
from plphp.settings.grammar import Line, keys_of, read_chain, read_line, split_lines
from plphp.settings.ladder import quoting_hint

if TYPE_CHECKING:
    from plphp.evaluation.tasks.task import Sample

CONTROLS = {
    "full": "every vision token kept",
    "zero": "every vision token evicted after the prompt was read",
    "blank": "every image replaced by uniform grey, nothing evicted",
    "downsample": "every image made smaller before it is read, nothing evicted",
}
"""What may be compared beside the methods."""
BUDGET, SHARE = "vision_budget", "share"
"""A line with ``vision_budget=share`` is run at each retention as the share of its budget, its own settings as they
are."""
ANY_BUDGET = 1
"""Bytes that stand for a budget which is not known yet."""
FIXED_BY = ("retention_rate", "target_retention", "attentive_threshold", "indifferent_threshold", "tiers")
"""Settings that say how much is kept, as some options do: a method with any of them is taken as it is."""


@dataclass(frozen=True)
class Variant:
    """A method at a retention, or a control: what the samples are answered with.

    Parameters
    ----------
    label : str
        Name of its line in tables and plots.
    retention : float, optional
        The retention asked for; None where the method says itself how much it keeps.
    config : PLPHPConfig
        Settings of its cache.
    images : {"as they are", "blank", "smaller"}
        What is done to the images before the model reads them.
    budget_share : float, optional
        Where the budget of the vision memory is a share of what the full cache holds of a conversation's images: the
        share. The config has `ANY_BUDGET` then, in the place of the bytes that `with_budget` works out.
    """

    label: str
    retention: float | None
    config: PLPHPConfig
    images: str = "as they are"
    budget_share: float | None = None

    @property
    def name(self) -> str:
        """The label with the retention: unique among the variants of a run."""
        return self.label if self.retention is None else f"{self.label}@{self.retention:g}"

    @property
    def draws(self) -> bool:
        """Whether chance has a part in what is kept."""
        return chain_of(self.config).draws

    def for_sample(self, sample: Sample) -> Variant:
        """Return the variant with a seed of its own for a sample.

        If the draw were the same for all samples, it would be as lucky for all of them, and their number would not
        average it out.
        """
        if not self.draws:
            return self

        def seeded(config: PLPHPConfig) -> PLPHPConfig:
            seed = zlib.crc32(f"{config.seed} {sample.task} {sample.id}".encode())
            return dataclasses.replace(config, seed=seed, earlier=tuple(map(seeded, config.earlier)))

        return dataclasses.replace(self, config=seeded(self.config))

    def with_budget(self, full_nbytes: int) -> Variant:
        """Return the variant with its share of so many bytes as its budget, at least one byte."""
        nbytes = max(1, int((self.budget_share or 0) * full_nbytes))
        return dataclasses.replace(self, config=_with_setting(self.config, BUDGET, nbytes))


def split_methods(texts: Iterable[str]) -> list[str]:
    """Cut comma-separated lines of methods apart, see `plphp.settings.grammar`."""
    return split_lines(texts, {*available_methods(), *CONTROLS})


def make_variants(methods: Sequence[str], retention: Sequence[float]) -> list[Variant]:
    """Spell out methods x retentions, with ``full`` first.

    Parameters
    ----------
    methods : sequence of str
        Each a line of `plphp.settings.grammar`, such as ``"method"``, ``"label=method:key=value,..."`` or a chain, or
        one of `CONTROLS`. What follows an ``@`` at the end, as in ``"fastv@0.5+0.25"``, takes the place of
        ``retention`` for that line. Of a chain the last method is asked for it: the others need rates of their own.
    retention : sequence of float
        Fractions of the vision tokens to keep. A method whose own settings say how much it keeps takes no part
        in them, nor do ``full``, ``zero`` and ``blank``.

    Returns
    -------
    list of Variant

    Raises
    ------
    ConfigError
        If a method or setting is not known, a label is given twice, or a retention is out of range.
    """
    if not methods:
        raise ConfigError("Name at least one method to evaluate.")
    variants = [Variant(FULL, None, PLPHPConfig(method="none"))]
    for text in methods:
        if text != FULL:
            line = read_line(text)
            made = _spelled_out(line, _rates(retention if line.rates is None else line.rates))
            if line.rates is not None and any(variant.retention is None for variant in made):
                raise ConfigError(f"{text!r} asks for retentions of a method that says itself how much it keeps.")
            variants += made
    names = [variant.name for variant in variants]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(f"{twice[0]!r} is given twice: put a label before it, as in 'mine={twice[0]}'.")
    return variants


def _rates(values: Sequence[object]) -> list[float]:
    """Retentions without doubles, from numbers or their texts."""
    rates: list[float] = []
    for value in values:
        try:
            rate = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            rate = -1.0
        if isinstance(value, bool) or not 0 <= rate <= 1:
            raise ConfigError(f"A retention must be between 0 and 1, got {value!r}.")
        rates.append(rate)
    return list(dict.fromkeys(rates))


def with_retention(config: PLPHPConfig, retention: float) -> PLPHPConfig:
    """Ask a method for a retention: as the target of its layer classes where it sorts layers, else as its rate."""
    if retention == 0:  # of nothing no layer can have more than another
        by_rate = dataclasses.replace(config, target_retention=None, class_quantile=PLPHPConfig.class_quantile)
        return dataclasses.replace(by_rate, retention_rate=0.0, min_kept=0)
    if get_method(config.method).uses_class_rule(config):
        return dataclasses.replace(config, target_retention=retention)
    return dataclasses.replace(config, retention_rate=retention)


def _spelled_out(line: Line, retention: list[float]) -> list[Variant]:
    if line.chain.partition(":")[0].strip() in CONTROLS:
        return _control(line, retention)
    for name, _ in read_chain(line.chain):
        if name in CONTROLS:
            raise ConfigError(f"{name!r} is no method and stands alone, got {line.chain!r}.")
        if name not in available_methods():
            hint = quoting_hint(name) or did_you_mean(name, [*available_methods(), *CONTROLS])
            raise ConfigError(f"Unknown method {name!r}.{hint}")
    settings = read_chain(line.chain)[-1][1]
    if settings.get(BUDGET) == SHARE:
        return _with_shares(line, retention)
    config = PLPHPConfig.parse(line.chain)
    method = get_method(config.method)
    fixed_by = {*FIXED_BY, *(name for name, option in method.options.items() if option.sets_rate)}
    if keys_of(line.chain) & fixed_by or method.tiers is not None or _keeps_all(method):
        chain_of(config)  # names, options and stages; what depends on the model's layers comes when it is there
        return [Variant(line.label, None, method.settled(config))]
    if not retention:
        raise ConfigError(f"Give at least one retention for the method {line.label!r}, or settings that fix it.")
    variants = [Variant(line.label, rate, with_retention(config, rate)) for rate in retention]
    for variant in variants:
        chain_of(variant.config)  # as above
    return variants


def _keeps_all(method: Method) -> bool:
    """Whether a method of the KV cache evicts nothing, whatever the rate."""
    return method.kv is not None and method.kv.allocate is keep_all


def _with_shares(line: Line, shares: list[float]) -> list[Variant]:
    """A line whose budget is a share of what the full cache holds, at each share."""
    if not shares or 0 in shares:
        raise ConfigError(f"Give the shares of the budget above 0 for {line.label!r}, as in {line.chain}@0.25+0.1.")
    config = PLPHPConfig.parse(line.chain.replace(f"{BUDGET}={SHARE}", f"{BUDGET}={ANY_BUDGET}"))
    config = get_method(config.method).settled(config)
    chain_of(config)
    return [Variant(line.label, share, config, budget_share=share) for share in shares]


def _with_setting(config: PLPHPConfig, name: str, value: object) -> PLPHPConfig:
    return PLPHPConfig.from_dict({**config.to_dict(), name: value})


def _control(line: Line, retention: list[float]) -> list[Variant]:
    name, colon, _ = line.chain.partition(":")
    if colon:
        raise ConfigError(f"{name.strip()!r} takes no settings, got {line.chain!r}.")
    none = PLPHPConfig(method="none")
    if name == "zero":
        return [Variant(line.label, None, with_retention(PLPHPConfig(method="uniform"), 0))]
    if name == "blank":
        return [Variant(line.label, None, none, "blank")]
    if name == "downsample":
        return [Variant(line.label, rate, none, "smaller") for rate in retention if rate > 0]
    return [Variant(line.label, None, none)]
