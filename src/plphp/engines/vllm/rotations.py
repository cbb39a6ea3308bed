# SPDX-License-Identifier: Apache-2.0
"""How a model that vLLM runs rotates its queries by their position: candidates are compared with what it does.

What a layer does is nowhere written down: some layers have a rotary embedding and do not call it, some scale what it
gives. So it is tried, see `plphp.engines.vllm.query_probe`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plphp.errors import UnsupportedModelError
from plphp.io.quoting import one_line
from plphp.policy.rotation import Rotation
from plphp.policy.rotation_finding import POSITIONS, explaining_rotations, growing_kind

from .query_probe import queries_at


def find_rotations(runner: Any) -> dict[int, Rotation]:
    """Find the rotation of every decoder layer.

    Parameters
    ----------
    runner : vllm.v1.worker.gpu_model_runner.GPUModelRunner
        Holds a model with `plphp.engines.vllm.attention.PrunedAttention` in its layers.

    Returns
    -------
    dict of int to Rotation
        By decoder layer.

    Raises
    ------
    UnsupportedModelError
        If nothing explains the queries of a layer, or the frequencies depend on the length of the prompt.
    """
    config = runner.model_config
    refuse_growing(config)
    name = f"{config.model!r} ({config.hf_text_config.model_type})"
    positions = [0, *(min(position, config.max_model_len - 1) for position in POSITIONS)]
    try:
        seen = queries_at(runner, positions)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises that expects tokens and pictures
        raise UnsupportedModelError(
            f"The text model of {name} cannot read tokens at positions of their own: {one_line(error)}"
        ) from error
    by_position = {layer: dict(zip(positions, queries, strict=True)) for layer, queries in seen.items()}
    return explaining_rotations(by_position, rotary_embeddings(runner.model), name)


def refuse_growing(config: Any) -> None:
    """Raise `UnsupportedModelError` where the frequencies of a model depend on the length of the prompt.

    Parameters
    ----------
    config : vllm.config.ModelConfig
        Of the engine.
    """
    kind = growing_kind(getattr(config.hf_text_config, "rope_parameters", None) or {})
    if kind is not None:
        raise UnsupportedModelError(
            f"plphp collects no query bank for {config.model!r}: its rotary embedding is of the kind {kind!r}, whose "
            "frequencies depend on the length of the prompt, so that its queries cannot be foretold. Choose another "
            "method."
        )


def rotary_embeddings(model: torch.nn.Module) -> list[Rotation]:
    """The rotations that the rotary embeddings of a model describe, whichever layer they belong to.

    Parameters
    ----------
    model : torch.nn.Module
        The cosines and sines of its rotary embeddings are computed again: those that they hold are rounded to the
        dtype of the model. A factor on both, as of YaRN, is no part of the rotation.
    """
    known: dict[tuple[tuple[float, ...], bool], Rotation] = {}
    for module in model.modules():
        compute, neox = getattr(module, "_compute_cos_sin_cache", None), getattr(module, "is_neox_style", None)
        if compute is None or not isinstance(neox, bool):
            continue
        cache = compute()
        if not isinstance(cache, Tensor) or cache.ndim != 2 or len(cache) < 2:
            continue
        cos, sin = cache[1].float().cpu().chunk(2)
        frequencies = torch.atan2(sin, cos)
        known[(tuple(frequencies.tolist()), neox)] = Rotation(frequencies, interleaved=not neox)
    return list(known.values())
