# SPDX-License-Identifier: Apache-2.0
"""Stream an answer word by word, from a thread of its own, with a pruned cache."""

import sys
from pathlib import Path
from threading import Thread

from transformers import TextIteratorStreamer

import plphp
from plphp.inputs.loading import load_model
from plphp.inputs.media import load_image
from plphp.inputs.prompt import build_inputs
from plphp.settings.presets import default_settings

name = sys.argv[1] if len(sys.argv) > 1 else None  # the bundled model
model, processor = load_model(name)
image = load_image(Path(__file__).parent / "images" / "page-2.png")
inputs = build_inputs(processor, "Please read the whole text, line by line.", images=[image])

# Without a timeout an error in the thread would leave this one waiting for text for ever.
streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=600)
with plphp.prune(model, default_settings(bundled=name is None)) as run:
    thread = Thread(target=model.generate, kwargs={**inputs, "max_new_tokens": 64, "streamer": streamer})
    thread.start()
    for text in streamer:
        print(text, end="", flush=True)
    thread.join()

print(f"\n{run.report.kv_reduction:.0%} of all KV bytes gone")
