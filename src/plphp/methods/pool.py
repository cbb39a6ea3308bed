# SPDX-License-Identifier: Apache-2.0
"""Before the text model, the vision tokens of an image are averaged over cells of it: the control of every choice.

The cells are as square as the grid of the tokens allows, so many that about ``retention_rate`` of the tokens is left
(`plphp.policy.merging.pool`). The mean of a cell stands at the place of the token in its middle. Images whose tokens
form no plain grid are refused by name.
"""

from plphp.policy.image_tokens import Chosen, ImageTokens
from plphp.policy.method import Method
from plphp.policy.stages import EncoderStage
from plphp.settings.config import PLPHPConfig

from . import _encoder
from ._unused import refuse_unused


def choose(image: ImageTokens, config: PLPHPConfig) -> Chosen:
    """Means of cells; the frames of a video are averaged one by one."""
    import torch

    from plphp.policy.merging import pool

    if config.base_rate == 1:
        return Chosen(torch.ones(len(image.features), dtype=torch.bool))
    frames, rows, columns = image.need_grid
    share = max(config.base_rate, 1 / (rows * columns))
    parts = [pool(frame, (rows, columns), share) for frame in image.features.chunk(frames)]
    return Chosen(torch.cat([stay for stay, _ in parts]), torch.cat([features for _, features in parts]))


def check(config: PLPHPConfig, layers: int) -> None:
    """Refuse also a least number of tokens: they are as many as cells."""
    _encoder.check(config, layers)
    refuse_unused(config, ("min_kept",), "keeps a token of each cell, and cells are as large as the rate says")


METHOD = Method(
    name="pool",
    summary="before the text model: the vision tokens of an image are averaged over cells of it",
    paper="control",
    encoder=EncoderStage(choose, needs_grid=lambda config: config.base_rate < 1),
    check=check,
    when="as the control that a choice of tokens has to beat",
)
