# SPDX-License-Identifier: Apache-2.0
"""Decode without `generate`: a PrunedCache goes wherever transformers takes a cache."""

import sys
from pathlib import Path

import torch

from plphp import PrunedCache
from plphp.engines.hf.cache_argument import passed
from plphp.inputs.loading import load_model
from plphp.inputs.media import load_image
from plphp.inputs.prompt import build_inputs
from plphp.settings.presets import default_settings

name = sys.argv[1] if len(sys.argv) > 1 else None  # the bundled model
model, processor = load_model(name)
image = load_image(Path(__file__).parent / "images" / "page-1.png")
inputs = build_inputs(processor, "What does line 1 say?", images=[image])

cache = PrunedCache.for_inputs(model, inputs, default_settings(bundled=name is None))
tokens: list[int] = []
with torch.no_grad():
    step = inputs
    while len(tokens) < 32:
        logits = model(**step, **passed(cache)).logits  # past_key_values, and from transformers 5.24 on cache
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] == processor.tokenizer.eos_token_id:
            break
        step = {"input_ids": torch.tensor([tokens[-1:]])}

print(processor.decode(tokens, skip_special_tokens=True))
held = cache.nbytes - cache.reserved_nbytes
print(f"{cache.get_seq_length()} tokens seen, {held} of {cache.full_nbytes} bytes held")
