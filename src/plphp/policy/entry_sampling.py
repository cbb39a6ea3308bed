# SPDX-License-Identifier: Apache-2.0
"""A bounded sample of the vision entries of prompts, from which the codebooks of a query bank are learned."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from plphp.errors import ConfigError
from plphp.kernels.books import PART

log = logging.getLogger("plphp")

TOKENS = 4096
"""Vision tokens that a sample keeps, where nothing else is said."""
OF_PROMPT = 512
"""Vision tokens of a single prompt at most, so that prompts share the places."""

Entries = Mapping[int, tuple[Tensor, Tensor]]
"""By decoder layer, keys and values of the same tokens, [kv_heads, tokens, dim], less the mean over their prompt."""


def drawn(vision: int, tokens: int) -> list[int]:
    """The vision tokens of a prompt that may come into a sample, by their numbers among its vision tokens.

    Parameters
    ----------
    vision : int
        Vision tokens of the prompt.
    tokens : int
        All tokens of the prompt. The draws depend on both numbers alone, so that a prompt gives the same entries in
        whatever batch it stands, and prompts with images of one size do not all give the same places.

    Returns
    -------
    list of int
        Ascending; at most `OF_PROMPT`.
    """
    return sorted(random.Random(f"{vision} of {tokens}").sample(range(vision), min(vision, OF_PROMPT)))


def centred(keys: Tensor, values: Tensor, which: list[int]) -> tuple[Tensor, Tensor] | None:
    """Some entries of a layer as a sample keeps them; None where no product code fits a head.

    Parameters
    ----------
    keys, values : Tensor
        [kv_heads, vision, dim]; all vision entries of a prompt.
    which : list of int
        Those that are taken.

    Returns
    -------
    tuple of Tensor or None
        float16 [kv_heads, len(which), dim] in main memory: keys and values less their mean over all vision tokens.
    """
    if keys.shape[2] % PART or values.shape[2] % PART:
        return None
    kept = []
    for states in (keys, values):
        # In float32 at least: a mean over thousands of tokens in bfloat16 would be off by more than a code is.
        states = states.to(torch.promote_types(states.dtype, torch.float32))
        index = torch.tensor(which, device=states.device)
        kept.append((states.index_select(1, index) - states.mean(1, keepdim=True)).to("cpu", torch.float16))
    return kept[0], kept[1]


@dataclass(frozen=True)
class EntrySample:
    """A uniform sample of the tokens that prompts gave so far, the same tokens in every layer and KV head.

    Each token draws a number, and those with the lowest stay. It is immutable: `with_prompt` makes the next.

    Parameters
    ----------
    draws : Tensor
        float64 [tokens]; ascending.
    layers : mapping of int to tuple of Tensor
        See `Entries`; float16, in main memory.
    prompts : int
        Prompts that it was drawn from.

    Raises
    ------
    ConfigError
        If the parts do not belong together.
    """

    draws: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64), repr=False)
    layers: Entries = field(default_factory=dict, repr=False)
    prompts: int = 0

    def __post_init__(self) -> None:
        shapes = {layer: (tuple(keys.shape), tuple(values.shape)) for layer, (keys, values) in self.layers.items()}
        for layer, (keys, values) in shapes.items():
            fits = all(len(shape) == 3 and shape[1] == len(self) and shape[2] % PART == 0 for shape in (keys, values))
            if not fits or keys[0] != values[0]:
                raise ConfigError(
                    f"The sampled entries of layer {layer} have the shapes {keys} and {values}, expected "
                    f"[kv_heads, {len(self)}, dim] with a multiple of {PART} as dim."
                )

    def __len__(self) -> int:
        return len(self.draws)

    def with_prompt(self, entries: Entries, size: int = TOKENS, seed: int = 0) -> EntrySample:
        """The sample with the entries of a prompt among those that it is drawn from.

        Parameters
        ----------
        entries : mapping of int to tuple of Tensor
            See `centred`. Nothing of the prompt is taken where there are none, or some are not finite in float16.
        size : int
            Tokens that are kept at most.
        seed : int
            Of the draws, which depend on the number of the prompt besides.

        Raises
        ------
        ConfigError
            If the layers or their shapes are not those of the prompts before.
        """
        if not entries:
            return self
        if not all(bool(part.isfinite().all()) for pair in entries.values() for part in pair):
            log.warning("A prompt is left out of the codebooks: there is NaN or inf among its keys and values.")
            return self
        if self.layers and self.layers.keys() != entries.keys():
            raise ConfigError(
                f"The prompt has entries of the layers {', '.join(map(str, entries))}, expected those of "
                f"{', '.join(map(str, self.layers))}."
            )
        tokens = next(iter(entries.values()))[0].shape[1]
        numbers = random.Random(f"{seed} {self.prompts}")
        draws = torch.cat([self.draws, torch.tensor([numbers.random() for _ in range(tokens)], dtype=torch.float64)])
        kept = draws.argsort(stable=True)[:size]
        layers = {layer: self._joined(layer, pair, kept) for layer, pair in entries.items()}
        return EntrySample(draws[kept], layers, self.prompts + 1)

    def _joined(self, layer: int, newer: tuple[Tensor, Tensor], kept: Tensor) -> tuple[Tensor, Tensor]:
        own = self.layers.get(layer, (newer[0][:, :0], newer[1][:, :0]))
        for before, after in zip(own, newer, strict=True):
            if (before.shape[0], before.shape[2]) != (after.shape[0], after.shape[2]):
                raise ConfigError(
                    f"The prompt has entries of {after.shape[0]} KV heads of dimension {after.shape[2]} in layer "
                    f"{layer}, expected {before.shape[0]} of {before.shape[2]}."
                )
        keys, values = (torch.cat(pair, dim=1).index_select(1, kept) for pair in zip(own, newer, strict=True))
        return keys, values
