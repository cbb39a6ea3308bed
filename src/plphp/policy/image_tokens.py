# SPDX-License-Identifier: Apache-2.0
"""What is known of the vision tokens of an image before the text model, and what a method makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from plphp.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TowerEvidence:
    """What an encoder stage wants to know of the attention inside of the vision tower.

    Parameters
    ----------
    layers : tuple of int, or slice
        Layers of the tower with attention over the whole image, negative ones from the end; of a slice what there is.
    """

    layers: tuple[int, ...] | slice


@dataclass(frozen=True)
class ImageTokens:
    """The vision tokens of an image (of a tile, or of a video, see `plphp.families.base.VisionSegment`).

    Parameters
    ----------
    features : Tensor
        [tokens, dim]; what the text model would be given, in the order of the prompt.
    text : Tensor
        [text, dim]; the embeddings of the text of the same prompt, without what earlier turns said.
    grid : tuple of int, optional
        ``(frames, height, width)`` in tokens; None where the family does not tell.
    row, number : int
        The row of the batch, and the number of the image in it.
    tower : Tensor, optional
        float32 [layers, tokens]; for a method that asks for `TowerEvidence`, the attention that the patches behind a
        token get in each layer: from the class token where the tower has one, else from all patches.
    """

    features: Tensor
    text: Tensor
    grid: tuple[int, int, int] | None
    row: int
    number: int
    tower: Tensor | None = None

    @property
    def need_grid(self) -> tuple[int, int, int]:
        """The grid of the tokens.

        Raises
        ------
        ConfigError
            If they have none: `EncoderStage.needs_grid` says beforehand that the method works on it.
        """
        if self.grid is None:
            raise ConfigError(
                "The method works on rows and columns of tokens, which it did not say: set EncoderStage.needs_grid."
            )
        return self.grid

    @property
    def need_tower(self) -> Tensor:
        """The attention inside of the vision tower.

        Raises
        ------
        ConfigError
            If the method did not ask for it.
        """
        if self.tower is None:
            raise ConfigError(
                "The method scores by the vision tower, which it did not ask for: set EncoderStage.tower."
            )
        return self.tower


@dataclass(frozen=True)
class Chosen:
    """The vision tokens of an image that go on to the text model.

    Parameters
    ----------
    stay : Tensor
        bool [tokens].
    features : Tensor, optional
        [staying, dim]; what stands in the place of their features, for methods that merge tokens.
    """

    stay: Tensor
    features: Tensor | None = None
