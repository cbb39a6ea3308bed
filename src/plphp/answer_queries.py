# SPDX-License-Identifier: Apache-2.0
"""What the queries of a model's answers are like: their mean and covariance, and the attention to expect from them."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import ConfigError
from .rotary import Rotation

AHEAD = (2, 8, 16, 28)
"""Places after the prompt at which a query is expected; the scores are summed."""
KEYS_AT_ONCE = 1024
"""Keys whose covariance terms are held in float32 at once."""
FORMAT = "plphp answer queries 1"
BUNDLED = Path(__file__).parent / "reference_model" / "answer_queries.safetensors"
"""Statistics of the bundled model, which the name ``bundled`` stands for."""


@dataclass(frozen=True)
class LayerQueries:
    """Queries of one layer, turned back to position 0.

    Positions count the tokens of a row from 0, ahead by ``rope_deltas`` with m-RoPE. A model that counts from another
    number (PaliGemma: 1) has its queries turned by a constant here, and the same constant is missing when they are
    turned on, so that it cancels.

    Parameters
    ----------
    mean : Tensor
        float32 [q_heads, dim].
    covariance : Tensor
        float32 [q_heads, dim, dim].
    rotation : Rotation
        That of the layer.
    """

    mean: Tensor
    covariance: Tensor
    rotation: Rotation


@dataclass(frozen=True)
class AnswerQueries:
    """Statistics of the queries of answers, see `plphp.collect_answer_queries`.

    Parameters
    ----------
    layers : mapping of int to LayerQueries
        By decoder layer; full-attention layers only.
    record : mapping
        JSON-ready: the model and how the statistics were made; ``decoder_layers`` among it.
    """

    layers: Mapping[int, LayerQueries]
    record: Mapping[str, Any]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        tensors, interleaved = {}, {}
        for number, layer in self.layers.items():
            tensors[f"{number}.mean"] = layer.mean.contiguous()
            tensors[f"{number}.covariance"] = layer.covariance.contiguous()
            tensors[f"{number}.frequencies"] = layer.rotation.frequencies.clone()
            interleaved[number] = layer.rotation.interleaved
        about = {"format": FORMAT, "interleaved": json.dumps(interleaved), "record": json.dumps(dict(self.record))}
        save_file(tensors, path, metadata=about)

    @classmethod
    def load(cls, path: str | Path) -> AnswerQueries:
        """Read what `save` wrote.

        Raises
        ------
        ConfigError
            If it cannot be read, or is something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise ConfigError(f"{path} does not hold the statistics of answer queries: {_ADVICE}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except OSError as error:
            raise ConfigError(f"Cannot read the statistics {path}: {error.strerror or error}. {_ADVICE}") from error
        except SafetensorError as error:
            raise ConfigError(f"{path} is not a safetensors file: {error}. {_ADVICE}") from error
        try:
            layers = {
                int(number): LayerQueries(
                    tensors[f"{number}.mean"],
                    tensors[f"{number}.covariance"],
                    Rotation(tensors[f"{number}.frequencies"], turned),
                )
                for number, turned in json.loads(about["interleaved"]).items()
            }
            return cls(layers, json.loads(about["record"]))
        except (KeyError, ValueError) as error:
            raise ConfigError(f"The statistics {path} are broken ({error!r}): {_ADVICE}") from error

    def of(self, layer: int) -> LayerQueries:
        """Those of a layer.

        Raises
        ------
        ConfigError
            If there are none.
        """
        if layer not in self.layers:
            known = ", ".join(map(str, self.layers))
            raise ConfigError(
                f"The statistics are of the layers {known}, not of layer {layer}: collect them with this model."
            )
        return self.layers[layer]

    @property
    def decoder_layers(self) -> int:
        """Decoder layers of the model that the statistics are of."""
        return int(self.record["decoder_layers"])


_ADVICE = "make them with plphp collect or plphp.collect_answer_queries."


def statistics_file(name: str) -> Path:
    """The file that the option ``statistics`` names: a path, or the bundled model's by the name ``bundled``."""
    return BUNDLED if name == "bundled" else Path(name)


def statistics_at(name: str) -> AnswerQueries:
    """The statistics of a file, see `statistics_file`. It is read again only when it has changed.

    Raises
    ------
    ConfigError
        See `AnswerQueries.load`.
    """
    path = statistics_file(name)
    try:
        changed = os.stat(path).st_mtime_ns
    except OSError as error:
        raise ConfigError(f"Cannot read the statistics {path}: {error.strerror or error}. {_ADVICE}") from error
    return _read(os.path.abspath(path), changed)


@functools.lru_cache(maxsize=4)
def _read(path: str, changed: int) -> AnswerQueries:
    return AnswerQueries.load(path)


def expected_attention(
    queries: LayerQueries, keys: Tensor, position: Tensor, vision: Tensor, scaling: float, gqa_reduction: str
) -> Tensor:
    """Attention that the answer will give to the vision tokens, before there is an answer.

    With queries of mean m and covariance C at position 0, and the key k of a token turned back by the position of the
    query, the expectation of exp(q.k s) over normally distributed q is exp(m.k s + k'Ck s^2 / 2) (after
    arXiv:2510.00636, equation for the expected attention score, there over the hidden states of the prompt).
    It is normalised over the vision tokens, for each of some positions after the prompt, and summed over them.

    Parameters
    ----------
    queries : LayerQueries
        Of the layer.
    keys : Tensor
        [batch, kv_heads, seq, dim]; post-RoPE.
    position : Tensor
        int64 [batch]; rotary position of the first token after the prompt.
    vision : Tensor
        bool [batch, seq]; the vision tokens.
    scaling : float
        Factor on the logits.
    gqa_reduction : {"mean", "max"}
        How the query heads of a KV head are combined.

    Returns
    -------
    Tensor
        float32 [batch, kv_heads, seq]; its logarithm, but for a constant; -inf on what is no vision token. As a
        logarithm it tells apart what is far down, too.

    Raises
    ------
    ConfigError
        If the statistics are of a model with other heads.
    """
    kv_heads, dim = keys.shape[1], keys.shape[3]
    q_heads = len(queries.mean)
    if queries.mean.shape[1] != dim or q_heads % kv_heads:
        raise ConfigError(
            f"The statistics are of {q_heads} query heads of dimension {queries.mean.shape[1]}, which do not go with "
            f"this model's {kv_heads} KV heads of dimension {dim}: collect them with this model."
        )
    mean = queries.mean.to(keys.device).unflatten(0, (kv_heads, -1)) * scaling
    covariance = queries.covariance.to(keys.device).unflatten(0, (kv_heads, -1)) * (scaling**2 / 2)
    total = None
    for ahead in AHEAD:
        back = -(position.to(keys.device) + ahead)[:, None, None]
        parts = []
        for part in keys.split(KEYS_AT_ONCE, dim=2):
            turned = queries.rotation.turned(part, back)[:, :, None]  # [batch, kv_heads, 1, keys, dim]
            spread = ((turned @ covariance) * turned).sum(-1)
            parts.append((turned @ mean[..., None])[..., 0] + spread)
        logits = torch.cat(parts, dim=-1).masked_fill_(~vision[:, None, None], -torch.inf)
        # A row without vision tokens is all -inf, and log_softmax of it NaN.
        logits = torch.where(vision[:, None, None], logits.log_softmax(-1), -torch.inf)
        total = logits if total is None else torch.logaddexp(total, logits)
    assert total is not None
    return total.amax(2) if gqa_reduction == "max" else total.logsumexp(2)
