# SPDX-License-Identifier: Apache-2.0
"""``model.generate(..., custom_generate=...)``: the model's own ``generate`` with a pruned KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import plphp


def generate(model: Any, plphp_config: Any = None, plphp_decode: str = "eager", **arguments: Any) -> Any:
    """Generate with the vision tokens in the KV cache pruned, or held in few bits.

    Parameters
    ----------
    model : PreTrainedModel
        A vision-language model that plphp supports; transformers hands it over.
    plphp_config : str, mapping or PLPHPConfig, optional
        A line of settings such as ``"plphp:target_retention=0.4"``, settings by name, or a config; default: every
        vision entry in 3 bits.
    plphp_decode : {"eager", "auto", "graph"}
        How decoding steps run, see `plphp.prune`.
    **arguments
        Those of ``generate``.

    Returns
    -------
    Tensor or ModelOutput
        What ``generate`` returns.
    """
    config = plphp_config
    if isinstance(config, str):
        config = plphp.PLPHPConfig.parse(config)
    elif isinstance(config, Mapping):
        config = plphp.PLPHPConfig.from_dict(config)
    with plphp.prune(model, config, decode=plphp_decode):
        return model.generate(**arguments)
