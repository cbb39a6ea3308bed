# SPDX-License-Identifier: Apache-2.0
"""Whether a config, its method and a model go together."""

from __future__ import annotations

from transformers import PreTrainedModel

from plphp.errors import UnsupportedFeatureError, UnsupportedModelError
from plphp.policy.method import Method


def refuse_unanswered(method: Method) -> None:
    """Raise `UnsupportedFeatureError` for a method that ranks by the answer, where there is none."""
    if method.needs_answer:
        raise UnsupportedFeatureError(
            f"The method {method.name!r} ranks by the queries of the answer, which is not there yet: it is for "
            "plphp.branch(..., answer_ids=...) only."
        )


def refuse_prompt_stage(method: Method, model: PreTrainedModel, all_full: bool) -> None:
    """Raise for a method of the prompt stage on a model where tokens cannot leave.

    Parameters
    ----------
    method : Method
        Any method; those without a prompt stage pass.
    model : PreTrainedModel
        The model.
    all_full : bool
        Whether all of its text layers have full attention.

    Raises
    ------
    UnsupportedModelError, UnsupportedFeatureError
    """
    if method.stage is None:
        return
    if not all_full:
        raise UnsupportedModelError(
            f"{method.name} takes tokens out of all later layers, and some text layers of this "
            f"{model.config.model_type!r} model have no full attention, where they would still be seen."
        )
    if "flash" in (model.config.get_text_config(decoder=True)._attn_implementation or ""):
        raise UnsupportedFeatureError(
            f"{method.name} hides tokens by a mask per layer, which flash attention does not take: call "
            "model.set_attn_implementation('sdpa') first."
        )
