# SPDX-License-Identifier: Apache-2.0
"""Read a prompt into a cache and generate no more than that takes: what every measurement on prompts begins with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from plphp.engines.hf.cache import PrunedCache
from plphp.engines.hf.cache_argument import passed


def read_prompt(model: PreTrainedModel, inputs: Mapping[str, Any], cache: PrunedCache) -> None:
    """Read a prompt into a cache that was made for it.

    Parameters
    ----------
    model : PreTrainedModel
        The model that the cache was made for.
    inputs : mapping
        Inputs of ``generate``, the ones that the cache was made for.
    cache : PrunedCache
        Holds afterwards what is kept of the prompt.
    """
    generate: Any = model.generate
    # A single token, which needs no further pass; explicit, as the model's generation_config may sample or use beams.
    generate(**inputs, **passed(cache), max_new_tokens=1, do_sample=False, num_beams=1, num_return_sequences=1)
