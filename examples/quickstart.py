# SPDX-License-Identifier: Apache-2.0
"""Prune the vision KV cache of whatever the model generates inside a `with` block."""

import sys
from pathlib import Path

import plphp
from plphp.inputs.loading import load_model
from plphp.inputs.media import load_image
from plphp.inputs.prompt import build_inputs
from plphp.settings.presets import default_settings

name = sys.argv[1] if len(sys.argv) > 1 else None  # the bundled model
model, processor = load_model(name)
image = load_image(Path(__file__).parent / "images" / "grid-1.png")
inputs = build_inputs(processor, "List everything, row by row.", images=[image])

with plphp.prune(model, default_settings(bundled=name is None)) as run:
    output = model.generate(**inputs, max_new_tokens=64)

print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(f"{run.report.retention:.0%} of the vision entries kept, {run.report.kv_reduction:.0%} of all KV bytes gone")
for layer in run.report.prompts[0].layers:
    row = layer.rows[0]
    print(f"layer {layer.layer}: vision attention {row.vision_score:.2f} ({row.layer_class}), kept {row.kept}")
