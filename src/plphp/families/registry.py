# SPDX-License-Identifier: Apache-2.0
"""Model families by name, and the family of a model.

A package adds families with the entry point group ``plphp.families``, of which each entry names a `Family`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from plphp import families
from plphp.errors import UnsupportedModelError, did_you_mean
from plphp.plugins import Plugins

from .base import Family
from .unsupported import reason_against

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FAMILIES_BY_NAME = Plugins(
    Family,
    families,
    "FAMILY",
    "plphp.families",
    helpers=("base", "prompt_spans", "registry", "spans", "towers", "unsupported"),
)


def register_family(family: Family, *, replace: bool = False) -> None:
    """Make a model family known by its name and its model types.

    Parameters
    ----------
    family : Family
        The family; it wins over built-in and installed families of the same model types.
    replace : bool
        Allow to take the place of a family of the same name.

    Raises
    ------
    ConfigError
        If ``family`` is not a `Family`, or its name is taken.
    """
    FAMILIES_BY_NAME.register(family, replace)


def available_families() -> dict[str, Family]:
    """Return all model families by name: built in, then from installed packages, then registered."""
    return FAMILIES_BY_NAME.available()


def family_of(config: PretrainedConfig) -> Family:
    """Return the family that a model's config belongs to.

    Raises
    ------
    UnsupportedModelError
        If the model cannot be pruned rightly, with the reason, or is not known.
    """
    model_type = getattr(config, "model_type", type(config).__name__)
    reason = reason_against(config)
    if reason is not None:
        raise UnsupportedModelError(f"plphp does not prune this {model_type!r} model: {reason}")
    # Registered families come last and win, so that a user can correct a built-in family.
    families_of_type = [family for family in available_families().values() if model_type in family.model_types]
    if families_of_type:
        return families_of_type[-1]
    known = [name for family in available_families().values() for name in family.model_types]
    raise UnsupportedModelError(
        f"plphp does not know {model_type!r} models.{did_you_mean(model_type, known)} A new family is one "
        "small object: see plphp.register_family and docs/extending.md."
    )
