# SPDX-License-Identifier: Apache-2.0
"""Stage 3: write the checkpoint as a folder that ``from_pretrained`` loads, with bf16 weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, LlavaForConditionalGeneration

from training import model as models
from training import rows, tokenizer
from training.train import CHECKPOINT
from training.weights import publish_names


def new_model(seed: int = 0, *, small: bool = False) -> LlavaForConditionalGeneration:
    """Build the untrained model for the shipped tokenizer."""
    vocab_size = len(tokenizer.bpe().get_vocab())
    return models.build(vocab_size, rows.IMAGE, rows.END, rows.PAD, seed=seed, small=small)


def export(run: Path, folder: Path) -> Path:
    """Write the running mean of a run's weights into ``folder``.

    Parameters
    ----------
    run
        The run folder, with ``text.pt``.
    folder
        Where to write; files of the same names are replaced.

    Returns
    -------
    Path
        ``folder``.
    """
    model = new_model()
    model.load_state_dict(torch.load(run / CHECKPOINT, weights_only=True, map_location="cpu")["average"])
    model.tie_weights()
    save(model, folder)
    return folder


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write a model and the processor into ``folder``, with bf16 weights; the model is changed in place."""
    model.set_attn_implementation("sdpa")
    model = model.to(torch.bfloat16).eval()
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=rows.END, pad_token_id=rows.PAD, max_new_tokens=128
    )
    model.save_pretrained(folder)
    publish_names(folder / "model.safetensors")
    tokenizer.build_processor().save_pretrained(folder)
