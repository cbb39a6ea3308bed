# SPDX-License-Identifier: Apache-2.0
"""Before the text model, a likely set of a determinantal point process over the vision tokens of an image stays.

The diversity of CDPruner (arXiv:2506.10967) without its relevance: greedy MAP inference with the cosines of the
features as kernel (`plphp.policy.diversity.dpp`).
"""

from plphp.policy.image_tokens import Chosen, ImageTokens
from plphp.policy.method import Method
from plphp.policy.stages import EncoderStage
from plphp.settings.config import PLPHPConfig

from ._encoder import check, staying


def choose(image: ImageTokens, config: PLPHPConfig) -> Chosen:
    """The tokens that span the largest volume."""
    from plphp.policy.diversity import dpp

    return Chosen(dpp(image.features, staying(image, config)))


METHOD = Method(
    name="dpp",
    summary="before the text model: the vision tokens of an image stay that span the largest volume",
    paper="arXiv:2506.10967 without relevance",
    encoder=EncoderStage(choose),
    check=check,
    when="in the place of divprune, where it keeps more of your answers",
)
