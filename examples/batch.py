# SPDX-License-Identifier: Apache-2.0
"""A left-padded batch: every row has its own images, layer classes and kept tokens."""

import sys
from pathlib import Path

import plphp
from plphp.inputs.loading import load_model
from plphp.inputs.media import load_image
from plphp.settings.presets import default_settings

IMAGES = Path(__file__).parent / "images"
QUESTIONS = [
    (["grid-1.png"], "Look at row 2, column 1. What is there?"),
    (["duo-1.png", "duo-2.png"], "Look at image 1. Read line 1."),
]
name = sys.argv[1] if len(sys.argv) > 1 else None  # the bundled model
model, processor = load_model(name)
processor.tokenizer.padding_side = "left"

chats = [
    [{"role": "user", "content": [{"type": "image"}] * len(names) + [{"type": "text", "text": question}]}]
    for names, question in QUESTIONS
]
inputs = processor(
    text=[processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats],
    images=[[load_image(IMAGES / name) for name in names] for names, _ in QUESTIONS],
    padding=True,
    return_tensors="pt",
)
with plphp.prune(model, default_settings(bundled=name is None)) as run:
    output = model.generate(**inputs, max_new_tokens=32)

answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
for row, answer in enumerate(answers):
    rows = [layer.rows[row] for layer in run.report.prompts[0].layers]
    print(f"{answer}\n  kept of {rows[0].vision_tokens} per layer: {[one.kept[0] for one in rows]}")
