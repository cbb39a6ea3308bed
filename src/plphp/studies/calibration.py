# SPDX-License-Identifier: Apache-2.0
"""Thresholds from a few prompts, so that a target retention holds on further prompts layer by layer.

A target retention alone waits for the scores of all layers; thresholds decide on each layer as soon as it is read.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from plphp.engines.hf.cache import PrunedCache
from plphp.errors import ConfigError
from plphp.methods.registry import resolve
from plphp.pruning.prompt_report import RowReport
from plphp.pruning.report import PruneReport
from plphp.settings.config import PLPHPConfig

from .reading import read_prompt
from .schedule_search import search_schedule

Rows = list[tuple[int, RowReport]]
"""Layer numbers with what each layer did to a row."""


@dataclass(frozen=True)
class RetentionMeasurement:
    """What pruned caches kept of some prompts; each row of a batch counts as a prompt.

    Parameters
    ----------
    config : PLPHPConfig
        Settings that the prompts were pruned with.
    retentions : tuple of float
        Per prompt, vision entries kept as a fraction of all, over heads and all layers but the exempt ones: what
        ``target_retention`` is about.
    retentions_all_layers : tuple of float
        Per prompt, the fraction with the exempt layers, which keep everything.
    vision_tokens : tuple of int
        Per prompt, its vision tokens.
    classes : dict
        Per layer, how many prompts put it in each class.
    """

    config: PLPHPConfig
    retentions: tuple[float, ...]
    retentions_all_layers: tuple[float, ...]
    vision_tokens: tuple[int, ...]
    classes: dict[int, dict[str, int]]

    @property
    def mean(self) -> float:
        """Mean of ``retentions``."""
        return statistics.fmean(self.retentions)

    @property
    def std(self) -> float:
        """Standard deviation of ``retentions`` over the prompts (of the sample); 0 for a single prompt."""
        return statistics.stdev(self.retentions) if len(self.retentions) > 1 else 0.0

    def summary(self) -> dict[str, float]:
        """Return the number of prompts with mean, spread and extremes, JSON-ready."""
        return {
            "prompts": len(self.retentions),
            "vision_tokens_min": min(self.vision_tokens),
            "vision_tokens_max": max(self.vision_tokens),
            "retention_mean": self.mean,
            "retention_std": self.std,
            "retention_min": min(self.retentions),
            "retention_max": max(self.retentions),
            "retention_mean_all_layers": statistics.fmean(self.retentions_all_layers),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values, the summary among them."""
        return {
            **self.summary(),
            "config": self.config.to_dict(),
            "retentions": list(self.retentions),
            "retentions_all_layers": list(self.retentions_all_layers),
            "vision_tokens": list(self.vision_tokens),
            "classes": {str(layer): dict(counts) for layer, counts in self.classes.items()},
        }


def calibrate(model: PreTrainedModel, prompts: Iterable[Mapping[str, Any]], config: PLPHPConfig) -> PLPHPConfig:
    """Choose the thresholds of the layer classes from the vision attention scores of some prompts.

    For a method that takes a schedule ("g_search") search for that instead, see
    `plphp.studies.schedule_search.search_schedule`.

    The vision attention score grows with the number of vision tokens, so fixed thresholds do not carry over from
    short prompts to long ones. Take prompts like those that will be pruned.

    Parameters
    ----------
    model : PreTrainedModel
        A supported vision-language model.
    prompts : iterable of mapping
        Inputs of ``generate``, each with an image or more; each is read once, unpruned.
    config : PLPHPConfig
        ``target_retention`` is the mean retention rate to reach; ``class_quantile`` of the scores over all layers
        and prompts will be attentive, and as many indifferent. All further settings are taken over.

    Returns
    -------
    PLPHPConfig
        With ``retention_rate`` in the place of ``target_retention``, and its delta and both thresholds set: layers
        are compacted during prefill again, each as soon as it is read. The mean retention of a single prompt may be
        off the target; over the calibration prompts it is met but for ties. `measure_retention` measures it on
        further prompts.

    Raises
    ------
    ConfigError
        If ``target_retention`` is not set, the method has no layer classes, or no prompt has a vision token.
    """
    check_calibratable(config)
    if resolve(config).with_schedule is not None:
        return search_schedule(model, prompts, config)
    return _with_thresholds(model, prompts, config)


def _with_thresholds(model: PreTrainedModel, prompts: Iterable[Mapping[str, Any]], config: PLPHPConfig) -> PLPHPConfig:
    """The config with thresholds in the place of its target."""
    # Rate 1 evicts nothing, and the method still scores the layers.
    by_thresholds = dataclasses.replace(
        config, retention_rate=1.0, target_retention=None, class_quantile=PLPHPConfig.class_quantile
    )
    observe = dataclasses.replace(by_thresholds, retention_delta=None, calibrated_layers=None)
    scores: list[float] = []
    layers = 0
    for inputs in prompts:
        cache = PrunedCache.for_inputs(model, inputs, observe)
        read_prompt(model, inputs, cache)
        layers = len(cache.layers)
        scores += [row.vision_score for rows in _rows(cache.report()) for _, row in rows if row.layer_class != "exempt"]
        del cache  # the model is as it was when no cache is left
    if not scores:
        raise ConfigError("No prompt with a vision token was given: calibrate needs at least one.")
    ordered = torch.tensor(sorted(scores), dtype=torch.float64)
    share = min(len(ordered) // 2, round(config.class_quantile * len(ordered)))
    # Thresholds halfway between neighbours, so that float error does not move a layer to another class.
    low = (ordered[max(share - 1, 0)] + ordered[share]) / 2 if share else ordered[0]
    high = (ordered[-share - 1] + ordered[-share]) / 2 if share else ordered[-1] + 1e-6
    return dataclasses.replace(
        by_thresholds,
        retention_rate=config.base_rate,
        retention_delta=config.delta,
        indifferent_threshold=min(1.0, max(0.0, low.item())),
        attentive_threshold=min(1.0, max(0.0, high.item())),
        calibrated_layers=layers,
    )


def check_calibratable(config: PLPHPConfig) -> None:
    """Raise `ConfigError` for a config that `calibrate` does not take.

    A method takes a schedule, or ``target_retention`` is set and the method, with these settings, sorts layers into
    classes.
    """
    if resolve(config).with_schedule is not None:
        return
    if config.target_retention is None:
        raise ConfigError("calibrate needs a config with target_retention, got None.")
    if not resolve(config).uses_class_rule(config):
        options = f" with {', '.join(f'{name}={value}' for name, value in config.options.items())}"
        raise ConfigError(
            f"The method {config.method!r}{options if config.options else ''} does not sort layers into classes by "
            "thresholds, so there is nothing to calibrate: set its retention_rate."
        )


def measure_retention(
    model: PreTrainedModel, prompts: Iterable[Mapping[str, Any]], config: PLPHPConfig
) -> RetentionMeasurement:
    """Prune some prompts and read from the reports of the caches how much of them is left.

    Parameters
    ----------
    model : PreTrainedModel
        A supported vision-language model.
    prompts : iterable of mapping
        Inputs of ``generate``; each is read once. Rows without a vision token are left out.
    config : PLPHPConfig
        Settings, such as `calibrate` returns.

    Returns
    -------
    RetentionMeasurement
        Retention and classes of the layers, per prompt.

    Raises
    ------
    ConfigError
        If no prompt has a vision token.
    """
    retentions, of_all_layers, tokens = [], [], []
    classes: dict[int, Counter[str]] = {}
    for inputs in prompts:
        cache = PrunedCache.for_inputs(model, inputs, config)
        read_prompt(model, inputs, cache)
        for rows in _rows(cache.report()):
            retentions.append(_kept([row for _, row in rows if row.layer_class != "exempt"]))
            of_all_layers.append(_kept([row for _, row in rows]))
            tokens.append(rows[0][1].vision_tokens)
            for layer, row in rows:
                classes.setdefault(layer, Counter())[row.layer_class] += 1
        del cache  # as above
    if not tokens:
        raise ConfigError("No prompt with a vision token was given: there is no retention to measure.")
    counts = {layer: dict(counter) for layer, counter in sorted(classes.items())}
    return RetentionMeasurement(config, tuple(retentions), tuple(of_all_layers), tuple(tokens), counts)


def _rows(report: PruneReport) -> list[Rows]:
    """What each layer did to a row, for each row with vision tokens."""
    return [
        rows
        for prompt in report.prompts
        for number in range(report.batch)
        if (rows := [(layer.layer, layer.rows[number]) for layer in prompt.layers]) and rows[0][1].vision_tokens
    ]


def _kept(rows: list[RowReport]) -> float:
    """Vision entries kept as a fraction of all; 1 where there are none."""
    total = sum(row.vision_tokens * len(row.kept) for row in rows)
    return sum(sum(row.kept) for row in rows) / total if total else 1.0
