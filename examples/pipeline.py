# SPDX-License-Identifier: Apache-2.0
"""`plphp.apply` prunes everything that a model generates from then on: pipelines work unchanged."""

import sys
from pathlib import Path

from transformers import pipeline

import plphp
from plphp.inputs.loading import load_model
from plphp.inputs.media import load_image
from plphp.settings.presets import default_settings

name = sys.argv[1] if len(sys.argv) > 1 else None  # the bundled model
model, processor = load_model(name)
images = [load_image(Path(__file__).parent / "images" / name) for name in ("duo-1.png", "duo-2.png")]
content = [*({"type": "image", "image": image} for image in images)]
content.append({"type": "text", "text": "Look at image 1. Read line 1."})

session = plphp.apply(model, default_settings(bundled=name is None))
answer = pipeline("image-text-to-text", model=model, processor=processor)
result = answer(text=[{"role": "user", "content": content}], max_new_tokens=32, return_full_text=False)
plphp.remove(model)

print(result[0]["generated_text"])
print(f"{session.report.retention:.0%} of the vision entries kept")
