# SPDX-License-Identifier: Apache-2.0
"""Random vision tokens leave before the text model: what any method of the encoder stage has to beat."""

from __future__ import annotations

from plphp.policy.image_tokens import Chosen, ImageTokens
from plphp.policy.method import Method
from plphp.policy.stages import EncoderStage
from plphp.settings.config import PLPHPConfig

from ._encoder import check, staying


def choose(image: ImageTokens, config: PLPHPConfig) -> Chosen:
    """Draw the tokens that stay, by the seed, the number of the image and that of its tokens."""
    import torch

    tokens = len(image.features)
    # Whatever the other rows are: a padded row is the row alone.
    generator = torch.Generator().manual_seed((config.seed * 1_000_003 + image.number) % 2**63)
    drawn = torch.randperm(tokens, generator=generator)[: staying(image, config)]
    return Chosen(torch.zeros(tokens, dtype=torch.bool).index_fill(0, drawn, True))


METHOD = Method(
    name="encoder_random",
    summary="before the text model: random vision tokens leave",
    paper="control",
    encoder=EncoderStage(choose, draws=True),
    check=check,
    when="as the control that a method of the encoder stage has to beat",
)
