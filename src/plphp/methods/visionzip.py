# SPDX-License-Identifier: Apache-2.0
"""VisionZip (arXiv:2412.04467): before the text model, dominant vision tokens stay and the others are merged.

Of the ``retention_rate`` of an image's tokens that stay, the share ``dominant`` are those that the class token of the
tower's last layer but one attends to most; the others are *contextual*: evenly spread over what is left, each with the
mean of the tokens that are the most similar to it added to its own features. The paper's 191 dominant and 30 contextual
tokens (of 576) give the default share. Simplified: similarity and merging are of the features behind the projector, the
paper's of the tower's keys and of the features before it, which families without a one-to-one projector do not have.
Towers without a class token: as in `plphp.methods.vtc_cls`.
"""

from __future__ import annotations

from plphp.policy.image_tokens import Chosen, ImageTokens, TowerEvidence
from plphp.policy.method import Method
from plphp.policy.stages import EncoderStage
from plphp.settings.config import PLPHPConfig
from plphp.settings.options import Option, settings

from ._encoder import check, of_patches, staying

OPTIONS = {"dominant": Option(191 / 221, low=0, high=1), "layer": Option(-2)}


def asked(config: PLPHPConfig) -> TowerEvidence:
    """A layer of the tower."""
    return TowerEvidence((settings(OPTIONS, config.options)["layer"],))


def choose(image: ImageTokens, config: PLPHPConfig) -> Chosen:
    """Dominant tokens as they are, contextual ones with what is merged into them."""
    from plphp.policy.merging import visionzip

    keep = staying(image, config)
    share = settings(OPTIONS, config.options)["dominant"] if keep < len(image.features) else 1
    dominant = int(share * keep + 0.5)
    features = image.features
    return Chosen(*visionzip(features, features, of_patches(image.need_tower[0]), dominant, keep - dominant))


METHOD = Method(
    name="visionzip",
    summary="before the text model: vision tokens that the tower attends to stay, the others are merged into a few",
    paper="arXiv:2412.04467",
    encoder=EncoderStage(choose, tower=asked),
    options=OPTIONS,
    check=check,
    when="like vtc_cls, where what leaves is still to be felt",
)
