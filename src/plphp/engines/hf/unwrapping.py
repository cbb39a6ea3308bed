# SPDX-License-Identifier: Apache-2.0
"""From a wrapper of torch or PEFT to the transformers model inside of it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from plphp.errors import UnsupportedFeatureError, UnsupportedModelError

INNER = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
"""Wrappers of torch that leave the model as it is, by the name of their class, and where they hold it."""
CHANGES_ATTENTION = ("ADAPTION_PROMPT", "XLORA")
"""Adapters of PEFT that attend to entries of their own, or run the model twice for each step."""


def unwrapped(model: Any) -> PreTrainedModel:
    """Find the transformers model inside of what `torch.compile`, ``DataParallel`` or PEFT made of it.

    Parameters
    ----------
    model : object
        A model, or a wrapper around one.

    Returns
    -------
    PreTrainedModel
        The very object that the wrapper holds, so that what is put on it also works through the wrapper.

    Raises
    ------
    UnsupportedModelError
        If there is no model; where an attribute holds a model, the message names it.
    UnsupportedFeatureError
        If the wrapper puts entries into the cache that are no tokens of the prompt.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        name = type(inner).__name__
        if name in INNER and hasattr(inner, INNER[name]):
            inner = getattr(inner, INNER[name])
        elif hasattr(inner, "peft_config") and hasattr(inner, "base_model"):
            refuse_adapters(inner)
            # A model with adapters of several kinds has no get_base_model.
            inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner.base_model.model
        else:
            raise UnsupportedModelError(
                f"Expected a transformers PreTrainedModel, got {type(model).__name__}{_hint(inner)}."
            )
    return inner


def refuse_adapters(wrapper: Any) -> None:
    """Raise `UnsupportedFeatureError` for adapters of a PEFT model that do more than change weights."""
    for name, config in wrapper.peft_config.items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if config.is_prompt_learning:
            raise UnsupportedFeatureError(
                f"The adapter {name!r} is {kind.replace('_', ' ').lower()}: it puts virtual tokens into the cache that "
                "no position of the prompt stands for, so plphp cannot tell the vision tokens. Adapters that change "
                "weights, such as LoRA, work."
            )
        if kind in CHANGES_ATTENTION:
            raise UnsupportedFeatureError(
                f"The adapter {name!r} is of the kind {kind}, which changes attention itself or runs the model twice a "
                "step; plphp does not prune that. Adapters that change weights, such as LoRA, work."
            )


def _hint(holder: Any) -> str:
    """Name the attribute that holds the model, for users who passed a pipeline or a trainer."""
    for name in ("model", "module", "base_model"):
        if isinstance(getattr(holder, name, None), PreTrainedModel):
            return f": pass its attribute {name!r}, the {type(getattr(holder, name)).__name__}"
    return ""
