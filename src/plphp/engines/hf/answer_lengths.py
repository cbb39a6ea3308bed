# SPDX-License-Identifier: Apache-2.0
"""Where each answer of a batch ends in what ``generate`` returned."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig


def answer_lengths(answers: Tensor, config: GenerationConfig) -> list[int]:
    """How many tokens each answer has, its end token included.

    ``generate`` goes on with a row that has ended until all have, and fills it with padding.

    Parameters
    ----------
    answers : Tensor
        int64 [batch, new]; what was generated.
    config : GenerationConfig
        Says which tokens end an answer, and which is padding.
    """
    new, pad = answers.shape[1], config.pad_token_id
    ends = [] if config.eos_token_id is None else torch.as_tensor(config.eos_token_id).flatten().tolist()
    lengths = []
    for answer in answers.tolist():
        length = next((number + 1 for number, token in enumerate(answer) if token in ends), new)
        # A row that a stopping criterion has ended is filled as well, and has no end token.
        while length > 1 and answer[length - 1] == pad and pad not in ends:
            length -= 1
        lengths.append(length)
    return lengths
