# SPDX-License-Identifier: Apache-2.0
"""The queries that one answer is written with, as a worker hears them pass by pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plphp.errors import ConfigError
from plphp.policy.rotation import Rotation

TOKENS = 128
"""Tokens of an answer that are heard at most, from its first on."""


@dataclass
class HeardAnswer:
    """The queries that the answer to one prompt is written with.

    Parameters
    ----------
    request : vllm.v1.worker.gpu_input_batch.CachedRequestState
        Knows the length of the prompt and, with m-RoPE, what rotary positions are ahead of the number of tokens.
    """

    request: Any
    _queries: dict[int, list[Tensor]] = field(default_factory=dict)

    def hear(self, layer: int, position: int, query: Tensor) -> None:
        """Take the queries [tokens, q_heads, dim] of a layer, of tokens behind the prompt, the first at a position.

        Tokens that were heard before are left out: after a preemption an answer is read again.
        """
        heard = self._queries.setdefault(layer, [])
        next_position = self.request.num_prompt_tokens + len(heard)
        if position > next_position:
            raise ConfigError(f"the tokens {next_position} to {position - 1} of the request were missed")
        new = query[next_position - position :][: TOKENS - len(heard)]
        # vLLM reuses the memory of a pass.
        heard += new.detach().to("cpu", copy=True).unbind(0)

    def is_full(self) -> bool:
        """Whether as many tokens were heard of every layer that was heard as are held at most."""
        return bool(self._queries) and all(len(heard) >= TOKENS for heard in self._queries.values())

    def unrotated(self, rotations: dict[int, Rotation]) -> dict[int, Tensor]:
        """By decoder layer, the queries float32 [q_heads, tokens, dim] as they would be at position 0."""
        begin = self.request.num_prompt_tokens + int(getattr(self.request, "mrope_position_delta", None) or 0)
        tokens = min((len(heard) for heard in self._queries.values()), default=0)
        if not tokens:
            return {}
        back = -torch.arange(begin, begin + tokens)
        return {
            layer: rotations[layer].rotated(torch.stack(heard[:tokens], dim=1), back)
            for layer, heard in self._queries.items()
        }
