# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that transformers has written, as vLLM reads them."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file


def publish_names(file: Path) -> None:
    """Name the weights of a SigLIP vision tower as checkpoints on the hub do.

    Transformers 5 writes ``vision_tower.encoder`` and reads both; vLLM reads ``vision_tower.vision_model.encoder``
    alone.

    Parameters
    ----------
    file : Path
        ``model.safetensors`` of a checkpoint; written anew.
    """
    old, new = "vision_tower.", "vision_tower.vision_model."
    weights = load_file(file)
    named = {name if new in name else name.replace(old, new): weight for name, weight in weights.items()}
    save_file(named, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors lets its owner alone read it
