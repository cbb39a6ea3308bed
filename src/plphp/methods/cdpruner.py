# SPDX-License-Identifier: Apache-2.0
"""CDPruner (arXiv:2506.10967): before the text model, vision tokens stay that are diverse and relevant to the text.

Greedy MAP inference of a determinantal point process with the kernel r_i S_ij r_j, where S are the cosines of the
features and r the relevance of a token (`plphp.policy.relevance.relevance`). Simplified: the paper's relevance for
LLaVA compares CLIP's embeddings of image and text; here, as in the paper for models without a text tower, both are
those of the text model, so that it works for every family. The text is all of the prompt's, template words too. With
``sign="negative"`` the token that is least similar to the text is the most relevant, as in the authors' code; with
``"positive"`` the most similar.
"""

from __future__ import annotations

from plphp.policy.image_tokens import Chosen, ImageTokens
from plphp.policy.method import Method
from plphp.policy.stages import EncoderStage
from plphp.settings.config import PLPHPConfig
from plphp.settings.options import Option, settings

from ._encoder import check, staying

OPTIONS = {"sign": Option("negative", choices=("negative", "positive"))}


def choose(image: ImageTokens, config: PLPHPConfig) -> Chosen:
    """The tokens that span the largest volume, each with the length of its relevance."""
    from plphp.policy.diversity import dpp
    from plphp.policy.relevance import relevance

    own = relevance(image.features, image.text) if len(image.text) else None
    if own is not None and settings(OPTIONS, config.options)["sign"] == "positive":
        own = 1 - own
    return Chosen(dpp(image.features, staying(image, config), own))


METHOD = Method(
    name="cdpruner",
    summary="before the text model: the vision tokens of an image stay that are diverse and relevant to the text",
    paper="arXiv:2506.10967, with embeddings of the text model",
    encoder=EncoderStage(choose),
    options=OPTIONS,
    check=check,
    when="to see what relevance to the question adds to dpp",
)
