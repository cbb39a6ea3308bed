# SPDX-License-Identifier: Apache-2.0
"""A chat with a second image in its second turn: the cache goes on, each turn's image is pruned on its own."""

import sys
from pathlib import Path

import plphp
from plphp.engines.hf.cache_argument import cache_in, passed
from plphp.inputs.loading import load_model
from plphp.inputs.media import load_image
from plphp.inputs.prompt import build_inputs
from plphp.settings.presets import default_settings

IMAGES = Path(__file__).parent / "images"
name = sys.argv[1] if len(sys.argv) > 1 else None  # the bundled model
model, processor = load_model(name)
images = [load_image(IMAGES / name) for name in ("page-1.png", "page-2.png")]


def user(text: str) -> dict:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}


chat = [user("What does line 1 say?")]
with plphp.prune(model, default_settings(bundled=name is None)) as run:
    inputs = build_inputs(processor, messages=chat, images=images[:1])
    first = model.generate(**inputs, max_new_tokens=32, return_dict_in_generate=True)
    answer = processor.decode(first.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(answer)

    chat += [{"role": "assistant", "content": answer}, user("And what does line 2 of this one say?")]
    # The whole chat with all its images: what the cache holds already is left out.
    inputs = build_inputs(processor, messages=chat, images=images)
    second = model.generate(**inputs, max_new_tokens=32, **passed(cache_in(first)))
    print(processor.decode(second[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

for prompt in run.report.prompts:
    kept = [sum(layer.rows[0].kept) / len(layer.rows[0].kept) for layer in prompt.layers]
    print(f"prompt at {prompt.start}: {len(prompt.images[0])} image, kept per layer {kept}")
