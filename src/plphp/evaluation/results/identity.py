# SPDX-License-Identifier: Apache-2.0
"""Which model, on what: the hash of its weights, versions, hardware and date."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from plphp.inputs.weights import weights_hash
from plphp.studies.provenance import provenance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLACE = ("hardware", "date")
VERSIONS = ("plphp", "torch", "transformers", "python")


def identity(model: PreTrainedModel) -> dict[str, Any]:
    """Describe a model and the place that it runs in, JSON-ready.

    Returns
    -------
    dict
        ``model`` (class, type, dtype, layers, number of parameters, SHA-256 of the weights), ``versions``,
        ``hardware`` and ``date``.
    """
    known = provenance(model)
    about = {name: value for name, value in known.items() if name not in (*PLACE, *VERSIONS, "model")}
    about["parameters"] = sum(weight.numel() for weight in model.parameters())
    about["sha256"] = weights_hash(model)
    return {
        "model": about,
        "versions": {**{name: known[name] for name in VERSIONS}, "numpy": np.__version__},
        "hardware": {"device": known["hardware"], "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "date": known["date"],
    }
