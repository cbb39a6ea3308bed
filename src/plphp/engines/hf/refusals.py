# SPDX-License-Identifier: Apache-2.0
"""Methods that transformers, or a model in it, cannot run rightly."""

from __future__ import annotations

from transformers import PreTrainedModel

from plphp.errors import UnsupportedFeatureError
from plphp.families.registry import family_of
from plphp.kernels.bit_planes import BYTE
from plphp.kernels.codecs import INSTEAD
from plphp.policy.bank import QueryBank
from plphp.policy.chain import Chain
from plphp.settings.ladder import WHOLE

from .foreign_banks import refuse_foreign_banks

STAGES = ("encoder", "prefill", "attention", "kv")
"""Stages that plphp runs in transformers."""


def refuse_stages(chain: Chain, model: PreTrainedModel, own_bank: QueryBank | None = None) -> None:
    """Raise for a stage of a chain that cannot be done on a model.

    Parameters
    ----------
    chain : Chain
        What is to be done at each stage.
    model : PreTrainedModel
        The model.
    own_bank : QueryBank, optional
        The bank that a session has collected, for a method that asks for such a bank.

    Raises
    ------
    UnsupportedFeatureError
    ConfigError
        If codebooks are of another model.
    """
    chain.refuse_all_but(STAGES, "plphp's engine for transformers")
    _refuse_heads(chain, model)
    refuse_foreign_banks(chain, model, own_bank)
    if chain.tower is not None:
        _refuse_unread_tower(chain, model)
    implementation = model.config.get_text_config(decoder=True)._attn_implementation or ""
    if chain.changes_prefill and "flash" in implementation:
        methods = " and ".join(link.method for link in chain.changes_prefill)
        # It takes positions with gaps for packed sequences.
        raise UnsupportedFeatureError(
            f"{methods} takes tokens out before layers, or their attention, get them, which was not tried with flash "
            "attention: call model.set_attn_implementation('sdpa') first."
        )


def _refuse_unread_tower(chain: Chain, model: PreTrainedModel) -> None:
    """Raise `UnsupportedFeatureError` for a method that reads a vision tower of which nothing can be told."""
    family = family_of(model.config)
    if chain.encoder is not None and (family.tower is None or family.tower.patches is None):
        raise UnsupportedFeatureError(
            f"{chain.encoder.method} chooses vision tokens by the attention of their patches inside of the vision "
            f"tower, and in models of the family {family.name!r} no patches stand behind a token: take a method that "
            "does not read the tower, such as 'divprune'."
        )


def _refuse_heads(chain: Chain, model: PreTrainedModel) -> None:
    """Raise for tiers on heads that no rung can hold, before anything is read; where the config does not tell the width
    of a head, the first layer does."""
    rungs = chain.kv.stage.rungs(chain.kv.config)
    text = model.config.get_text_config(decoder=True)
    dim = vars(text).get("head_dim")  # in some configs layers differ, and reading it of all raises
    coded = (rungs is not None and set(rungs) != {WHOLE}) or chain.kv.config.vision_budget is not None
    if coded and isinstance(dim, int) and dim % BYTE:
        raise UnsupportedFeatureError(
            f"Tiers hold keys and values whose head dimension is a multiple of {BYTE}, and this model has {dim}: "
            f"{INSTEAD}."
        )
