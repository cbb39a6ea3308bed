# SPDX-License-Identifier: Apache-2.0
"""FoPru (arXiv:2411.14164): before the text model, the vision tokens stay that receive the most attention in the tower.

``by="rank"``: the best tokens of each image; ``by="row"``: whole rows of the image, those with the largest sums, the
last of them in part so that the rate is met. What stays keeps the order of the image. The attention is that of the
tower's layer ``layer``, averaged over the heads and the patches that give it, and where the tower has a class token,
that token's. Which layer the authors read could not be verified; by default it is the last but one, whose features
LLaVA reads.
"""

from __future__ import annotations

from plphp.policy.image_tokens import Chosen, ImageTokens, TowerEvidence
from plphp.policy.method import Method
from plphp.policy.stages import EncoderStage
from plphp.settings.config import PLPHPConfig
from plphp.settings.options import Option, settings

from ._encoder import check, of_patches, staying

OPTIONS = {"by": Option("rank", choices=("rank", "row")), "layer": Option(-2)}


def asked(config: PLPHPConfig) -> TowerEvidence:
    """A layer of the tower."""
    return TowerEvidence((settings(OPTIONS, config.options)["layer"],))


def by_rows(config: PLPHPConfig) -> bool:
    """Whether whole rows stay."""
    return bool(settings(OPTIONS, config.options)["by"] == "row")


def choose(image: ImageTokens, config: PLPHPConfig) -> Chosen:
    """The best tokens, or the best rows."""
    from plphp.policy.top_tokens import top, top_rows

    score, keep = of_patches(image.need_tower[0]), staying(image, config)
    if not by_rows(config):
        return Chosen(top(score, keep))
    frames, rows, columns = image.need_grid
    return Chosen(top_rows(score, (frames * rows, columns), keep))


METHOD = Method(
    name="fopru",
    summary="before the text model: the vision tokens stay that receive the most attention in the vision tower",
    paper="arXiv:2411.14164",
    encoder=EncoderStage(choose, tower=asked, needs_grid=by_rows),
    options=OPTIONS,
    check=check,
    when="for towers without a class token; by=row keeps whole lines, as of text",
)
