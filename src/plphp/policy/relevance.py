# SPDX-License-Identifier: Apache-2.0
"""How much each vision token has to do with a text. Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from plphp.errors import ConfigError
from plphp.kernels.precision import as_written

from .cosine import rounding, unit
from .token_checks import check_features


def relevance(features: Tensor, text: Tensor) -> Tensor:
    """Relevance of the vision tokens of an image to a text (CDPruner, arXiv:2506.10967).

    It is the *negative* mean cosine similarity to the embeddings of the text, moved and scaled to [0, 1] over the
    image. The sign is that of the authors' code, not what the word says: the token that is least similar to the text
    gets 1.

    Parameters
    ----------
    features : Tensor
        float [tokens, dim]; those of one image.
    text : Tensor
        float [text_tokens, dim]; embeddings in the same space.

    Returns
    -------
    Tensor
        float32, or float64 for such features, [tokens], in [0, 1]; 1 for all where they differ by rounding alone.

    Raises
    ------
    ConfigError
        If a shape is wrong or the dimensions differ.
    NonFiniteAttentionError
        If either holds NaN or inf.
    """
    check_features("features", features)
    check_features("text", text)
    if features.shape[1] != text.shape[1]:
        raise ConfigError(
            f"features and text must have the same dimension, got {features.shape[1]} and {text.shape[1]}: take the "
            "embeddings of the text from the space that the features are in."
        )
    with as_written(features.device):
        vectors = unit(features)
        # The mean of cosines is the cosine with the mean: no matrix of tokens by text tokens is needed.
        score = -(vectors @ unit(text).mean(0).to(vectors))
        least, most = score.min(), score.max()
        if float(most - least) <= rounding(vectors):
            return torch.ones_like(score)
        return (score - least) / (most - least)
