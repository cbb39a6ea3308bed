# SPDX-License-Identifier: Apache-2.0
"""Means of what was kept, and errors that name their documents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import plphp
import tiny_hub
from plphp.errors import ConfigError, LoadError
from plphp.inputs.prompt import build_batch
from plphp.integrations.lmms_eval.document import Document, downsampled, named_after
from plphp.integrations.lmms_eval.totals import Totals
from tiny_models import tiny_model

ASK = {"type": "text", "text": "What?"}


def test_rows_with_vision_tokens_are_counted(tmp_path: Path) -> None:
    model, processor = tiny_model("llava"), tiny_hub.processor()
    image = {"type": "image", "url": str(tiny_hub.picture(tmp_path / "a.png"))}
    pictured, text = [{"role": "user", "content": [image, ASK]}], [{"role": "user", "content": [ASK]}]
    totals = Totals()
    assert totals.means == {}
    with plphp.prune(model, plphp.PLPHPConfig.parse("uniform:retention_rate=0.5")) as run:
        for chats in ([pictured, pictured], [text], [pictured]):
            model.generate(**build_batch(processor, chats), max_new_tokens=2, do_sample=False)
            totals.add(run.report, 2 * len(chats))
    assert (totals.rows, totals.tokens) == (3, 8)
    assert totals.means == pytest.approx({"plphp_held": 0.5, "plphp_vision": 0.5, "plphp_computed": 1.0})


def test_media_of_a_document() -> None:
    image, video = {"type": "image", "url": "a.png"}, {"type": "video", "url": "a.gif"}
    chats = {(False, False): [ASK], (True, False): [image, image, ASK], (True, True): [image, video]}
    for media, content in chats.items():
        assert Document("d", [{"role": "user", "content": content}]).media == media
    assert Document("d", [{"role": "system", "content": "Be brief."}]).media == (False, False)


def test_images_are_made_smaller(tmp_path: Path) -> None:
    path = tiny_hub.picture(tmp_path / "a.png", (48, 40))
    chat = [{"role": "user", "content": [{"type": "image", "url": str(path)}, ASK]}]
    [message] = downsampled(chat, 3)
    assert [part.get("text") or part["image"].size for part in message["content"]] == [(16, 13), "What?"]
    assert downsampled(chat, 1) is chat


def test_errors_name_the_documents(tmp_path: Path) -> None:
    missing = [{"role": "user", "content": [{"type": "image", "url": str(tmp_path / "no.png")}, ASK]}]
    documents = [Document("chartqa, document 3", missing), Document("chartqa, document 9", missing)]
    with pytest.raises(LoadError, match=r"chartqa, document 3; chartqa, document 9: .*no\.png"), named_after(documents):
        build_batch(tiny_hub.processor(), [document.chat for document in documents])


def test_a_text_alone_is_read_as_it_is() -> None:
    """A benchmark may have questions without an image; a prompt for plphp itself may not."""
    processor = tiny_hub.processor()
    text = [{"role": "user", "content": [ASK]}]
    inputs = build_batch(processor, [text])
    assert processor.decode(inputs["input_ids"][0]) == "<bos>user: What?assistant: "
    assert "pixel_values" not in inputs
    with pytest.raises(ConfigError, match="has no text"):
        build_batch(processor, [[{"role": "user", "content": [{"type": "text", "text": " "}]}]])


def test_rows_are_padded_on_the_left() -> None:
    processor = tiny_hub.processor()
    chats = [[{"role": "user", "content": text}] for text in ("a", "abcde")]
    inputs = build_batch(processor, chats)
    assert inputs["attention_mask"].tolist()[0][:4] == [0] * 4
    alone = build_batch(processor, chats[:1])["input_ids"]
    assert torch.equal(inputs["input_ids"][:1, 4:], alone)
