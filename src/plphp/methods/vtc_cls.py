# SPDX-License-Identifier: Apache-2.0
"""VTC-CLS (arXiv:2412.05819): before the text model, the vision tokens stay that the class token attends to most.

The attention of the class token, averaged over the heads, is summed over the layers of the vision tower from ``start``
to the last; the ``retention_rate`` best tokens of each image stay, in the order of the image. Towers without a class
token: the attention that a patch receives from all patches, in its place (ours; the paper has CLIP towers alone). Of a
token that several patches stand behind, the mean over them. The paper leaves ``start`` to the model; by default all
layers but the first count, those with windows never.
"""

from __future__ import annotations

from plphp.policy.image_tokens import Chosen, ImageTokens, TowerEvidence
from plphp.policy.method import Method
from plphp.policy.stages import EncoderStage
from plphp.settings.config import PLPHPConfig
from plphp.settings.options import Option, settings

from ._encoder import check, of_patches, staying

OPTIONS = {"start": Option(1)}


def asked(config: PLPHPConfig) -> TowerEvidence:
    """The layers of the tower from ``start`` on."""
    return TowerEvidence(slice(settings(OPTIONS, config.options)["start"], None))


def choose(image: ImageTokens, config: PLPHPConfig) -> Chosen:
    """The best tokens by the sum over the layers."""
    from plphp.policy.top_tokens import top_over_layers

    return Chosen(top_over_layers(of_patches(image.need_tower), staying(image, config)))


METHOD = Method(
    name="vtc_cls",
    summary="before the text model: the vision tokens stay that the class token of the vision tower attends to most",
    paper="arXiv:2412.05819",
    encoder=EncoderStage(choose, tower=asked),
    options=OPTIONS,
    check=check,
    when="for towers with a class token, such as CLIP",
)
