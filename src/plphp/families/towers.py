# SPDX-License-Identifier: Apache-2.0
"""What plphp has to know about a vision tower: where it is, and which of its patches stand behind a vision token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PretrainedConfig

StandIn = Literal["same", "mean", "average", "merged", "one", "zero", "empty"]
"""What takes the place of a module, a parameter or a buffer while scores go the way of the features.

``"same"``
    Returns what it is given: norms, activations, whatever works on each channel.
``"mean"``
    Returns the mean over the channels, in all channels of the result: linear layers, and whole projectors in which
    each token is read alone. A matrix of weights takes the mean too.
``"average"``
    Averages over the window that a convolution or a pooling layer reads.
``"merged"``
    Averages over ``spatial_merge_size ** 2`` patches that follow each other, as in the mergers of Qwen.
``"one"``, ``"zero"``
    Returns ones (gates, scales) or zeros (newline tokens, offsets).
``"empty"``
    Returns a channel of zeros for each position of its input: embeddings that scores have no use for.
"""


@dataclass(frozen=True)
class VisionTower:
    """Where the vision tower of a model class is, and how its patches become the vision tokens of the prompt.

    Scores of patches become scores of tokens on the way that features of patches take: the model's own
    ``get_image_features`` runs with scores in the place of the output of ``patches`` and with stand-ins for all that
    mixes channels, so that what reshapes, pools, packs and reorders them is the model's.

    Paths start at the module that has ``get_image_features``, for example ``"vision_tower.encoder"``. What a model
    does not have is left out.

    Parameters
    ----------
    module : str
        Path of the tower; the attention layers in it, and no others, look from patch to patch.
    patches : str, optional
        Path of what returns the features of all patches: the tower, its encoder, or its list of layers. None where no
        patch stands behind a token, as behind the latents of a resampler.
    stand_ins : mapping of str to StandIn
        What takes the place of modules, of all modules of a list, of parameters and of buffers, by path.
    tokens : str, optional
        Path of the stand-in behind which each token has its score, where that is not what ``get_image_features``
        returns, but on the way there.
    class_token : callable, optional
        ``config -> int or None``: position of the class token among those of an image; None where there is none.
    behind_video : int
        Newline tokens behind a video that ``get_video_features`` may leave for the model's ``forward`` to put there.
    full_attention : callable, optional
        ``config -> sequence of int``: the layers whose patches see their whole image or frame; None for all layers.
    """

    module: str
    patches: str | None
    stand_ins: Mapping[str, StandIn] = field(default_factory=dict)
    tokens: str | None = None
    class_token: Callable[[PretrainedConfig], int | None] = lambda config: None
    behind_video: int = 0
    full_attention: Callable[[PretrainedConfig], tuple[int, ...]] | None = None


def class_token_of_clip(config: PretrainedConfig) -> int | None:
    """Return the position of the class token of towers that may be CLIP or SigLIP, which has none."""
    return 0 if config.vision_config.model_type == "clip_vision_model" else None


def full_attention_blocks(config: PretrainedConfig) -> tuple[int, ...]:
    """Return the layers of the tower that do not attend within windows."""
    return tuple(config.vision_config.fullatt_block_indexes)


MERGED_BLOCKS: Mapping[str, StandIn] = {
    "visual.patch_embed": "empty",
    "visual.merger": "merged",
    "visual.deepstack_merger_list": "merged",
}
"""Stand-ins of the towers of Qwen and EXAONE, whose merger is a module of the tower."""
