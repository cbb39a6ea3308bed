# SPDX-License-Identifier: Apache-2.0
"""Where a measurement comes from: versions, hardware and date, as every file with figures names them."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from plphp._version import __version__
from plphp.inputs.sources import BUNDLED


def provenance(model: PreTrainedModel) -> dict[str, Any]:
    """Describe the model of a measurement, and where and when it is made.

    Returns
    -------
    dict
        JSON-ready: ``model`` (hub id or folder, as it was loaded, or "the bundled model"), ``model_type``,
        ``model_class``, ``decoder_layers``, ``dtype``, ``hardware``, ``plphp``, ``torch``, ``transformers``,
        ``python`` (versions), and ``date`` (ISO, local).
    """
    cuda = model.device.type == "cuda"
    return {
        "model": "the bundled model" if Path(model.name_or_path) == BUNDLED else model.name_or_path,
        "model_type": model.config.model_type,
        "model_class": type(model).__name__,
        "decoder_layers": model.config.get_text_config(decoder=True).num_hidden_layers,
        "dtype": str(model.dtype).removeprefix("torch."),
        "hardware": torch.cuda.get_device_name(model.device) if cuda else f"CPU ({platform.machine()})",
        "plphp": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }
