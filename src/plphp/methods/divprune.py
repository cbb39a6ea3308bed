# SPDX-License-Identifier: Apache-2.0
"""DivPrune (arXiv:2503.02175): before the text model, the vision tokens of an image stay that differ the most.

Of each image ``retention_rate`` of the tokens stay, chosen greedily by the largest smallest cosine distance from those
that are chosen already (Algorithm 1; `plphp.policy.diversity.max_min`), as the features that the text model would be
given. A video or a tile is an image of its own, see docs/families.md.
"""

from plphp.policy.image_tokens import Chosen, ImageTokens
from plphp.policy.method import Method
from plphp.policy.stages import EncoderStage
from plphp.settings.config import PLPHPConfig

from ._encoder import check, staying


def choose(image: ImageTokens, config: PLPHPConfig) -> Chosen:
    """The most diverse tokens."""
    from plphp.policy.diversity import max_min

    return Chosen(max_min(image.features, staying(image, config)))


METHOD = Method(
    name="divprune",
    summary="before the text model: the vision tokens of an image stay that differ the most from each other",
    paper="arXiv:2503.02175, Algorithm 1",
    encoder=EncoderStage(choose),
    check=check,
    when="to halve prefill, before a method of the KV cache; answers about several regions suffer",
)
