# SPDX-License-Identifier: Apache-2.0
"""DivPrune (arXiv:2503.02175): before the text model, the vision tokens of an image stay that differ the most.

Of each image ``retention_rate`` of the tokens stay, chosen greedily by the largest smallest cosine distance from those
that are chosen already (Algorithm 1; `plphp.policy.diversity.max_min`), as the features that the text model would be
given. A video or a tile is an image of its own, see docs/families.md.

Ours: with ``distance="euclidean"`` features are compared by where they are and not by their direction alone.
"""

from plphp.policy.image_tokens import Chosen, ImageTokens
from plphp.policy.method import Method
from plphp.policy.stages import EncoderStage
from plphp.settings.config import PLPHPConfig
from plphp.settings.options import Option, settings

from ._encoder import check, staying

OPTIONS = {"distance": Option("cosine", choices=("cosine", "euclidean"))}


def choose(image: ImageTokens, config: PLPHPConfig) -> Chosen:
    """The most diverse tokens."""
    from plphp.policy.diversity import max_min

    euclidean = settings(OPTIONS, config.options)["distance"] == "euclidean"
    return Chosen(max_min(image.features, staying(image, config), euclidean=euclidean))


METHOD = Method(
    name="divprune",
    summary="before the text model: the vision tokens of an image stay that differ the most from each other",
    paper="arXiv:2503.02175, Algorithm 1",
    encoder=EncoderStage(choose),
    options=OPTIONS,
    check=check,
    when="to halve prefill, before a method of the KV cache; by distance=euclidean where answers are about regions",
)
