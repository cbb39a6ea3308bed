# SPDX-License-Identifier: Apache-2.0
"""Methods that transformers, or a model in it, cannot run rightly."""

from __future__ import annotations

from transformers import PreTrainedModel

from plphp.errors import UnsupportedFeatureError, UnsupportedModelError
from plphp.kernels.bit_planes import BYTE
from plphp.kernels.codecs import INSTEAD
from plphp.policy.bank import QueryBank
from plphp.policy.chain import Chain
from plphp.settings.ladder import WHOLE

from .foreign_banks import refuse_foreign_banks

STAGES = ("prefill", "kv")
"""Stages that plphp runs in transformers."""


def refuse_stages(chain: Chain, model: PreTrainedModel, all_full: bool, own_bank: QueryBank | None = None) -> None:
    """Raise for a stage of a chain that cannot be done on a model.

    Parameters
    ----------
    chain : Chain
        What is to be done at each stage.
    model : PreTrainedModel
        The model.
    all_full : bool
        Whether all of its text layers have full attention.
    own_bank : QueryBank, optional
        The bank that a session has collected, for a method that asks for such a bank.

    Raises
    ------
    UnsupportedModelError, UnsupportedFeatureError
    ConfigError
        If codebooks are of another model.
    """
    chain.refuse_all_but(STAGES, "plphp's engine for transformers")
    _refuse_heads(chain, model)
    refuse_foreign_banks(chain, model, own_bank)
    if chain.prefill is None:
        return
    method = chain.prefill.method
    # A layer with a window or a recurrent state makes its entries while it reads: nothing can be hidden from it later.
    if not all_full:
        raise UnsupportedModelError(
            f"{method} takes tokens out of all later layers, and some text layers of this "
            f"{model.config.model_type!r} model have no full attention, where they would still be seen."
        )
    if "flash" in (model.config.get_text_config(decoder=True)._attn_implementation or ""):
        raise UnsupportedFeatureError(
            f"{method} hides tokens by a mask per layer, which flash attention does not take: call "
            "model.set_attn_implementation('sdpa') first."
        )


def _refuse_heads(chain: Chain, model: PreTrainedModel) -> None:
    """Raise for tiers on heads that no rung can hold, before anything is read; where the config does not tell the width
    of a head, the first layer does."""
    ladder = chain.kv.config.ladder
    text = model.config.get_text_config(decoder=True)
    dim = vars(text).get("head_dim")  # in some configs layers differ, and reading it of all raises
    if ladder is not None and set(ladder.names) != {WHOLE} and isinstance(dim, int) and dim % BYTE:
        raise UnsupportedFeatureError(
            f"Tiers hold keys and values whose head dimension is a multiple of {BYTE}, and this model has {dim}: "
            f"{INSTEAD}."
        )
