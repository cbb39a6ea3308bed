# SPDX-License-Identifier: Apache-2.0
"""Thresholds from a few prompts, so that a target retention holds on others without seeing all layers first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from .config import PLPHPConfig
from .errors import ConfigError
from .session import prune


def calibrate(model: PreTrainedModel, prompts: Iterable[Mapping[str, Any]], config: PLPHPConfig) -> PLPHPConfig:
    """Choose the thresholds of the layer classes from the vision attention scores of some prompts.

    The vision attention score grows with the number of vision tokens, so fixed thresholds do not carry over from
    short prompts to long ones. Take prompts like those that will be pruned.

    Parameters
    ----------
    model : PreTrainedModel
        A supported vision-language model.
    prompts : iterable of mapping
        Inputs of ``generate``, each with at least one image; each is read once, unpruned.
    config : PLPHPConfig
        ``target_retention`` is the mean retention rate to reach; ``class_quantile`` of the scores over all layers
        and prompts will be attentive, and as many indifferent. Other settings are taken over.

    Returns
    -------
    PLPHPConfig
        With ``retention_rate`` in the place of ``target_retention`` and both thresholds set: layers are compacted
        one by one during prefill again. The mean retention of one prompt may be off the target; over the prompts
        given it is met but for ties.

    Raises
    ------
    ConfigError
        If ``target_retention`` is not set, or no prompt has a vision token.
    """
    if config.target_retention is None:
        raise ConfigError("calibrate needs a config with target_retention, got None.")
    exempt = {layer % model.config.get_text_config().num_hidden_layers for layer in config.exempt_layers}
    scores: list[float] = []
    observe = dataclasses.replace(config, method="none", target_retention=None, exempt_layers=())
    for inputs in prompts:
        with prune(model, observe) as run:
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
        layers = [layer for prompt in run.report.prompts for layer in prompt.layers if layer.layer not in exempt]
        scores += [row.vision_score for layer in layers for row in layer.rows if row.vision_tokens]
    if not scores:
        raise ConfigError("No prompt with a vision token was given: calibrate needs at least one.")
    ranked = torch.tensor(sorted(scores), dtype=torch.float64)
    share = min(len(ranked) // 2, round(config.class_quantile * len(ranked)))
    # Thresholds halfway between neighbours, so that float error does not move a layer to another class.
    low = (ranked[max(share - 1, 0)] + ranked[share]) / 2 if share else ranked[0]
    high = (ranked[-share - 1] + ranked[-share]) / 2 if share else ranked[-1] + 1e-6
    return dataclasses.replace(
        config,
        retention_rate=config.target_retention,
        target_retention=None,
        indifferent_threshold=min(1.0, max(0.0, low.item())),
        attentive_threshold=min(1.0, max(0.0, high.item())),
    )
