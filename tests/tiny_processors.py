# SPDX-License-Identifier: Apache-2.0
"""Processors of tiny models of several families: their own image processors, and the tokenizer of characters.

Without torchvision transformers makes no processor of videos. Those that ask for one are given none here, and take
images alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import tiny_hub
from image_processors import image_processor, load
from tiny_models.tokens import END, IMAGE, INDICATORS, START, TAG, VIDEO

_QWEN = {"<|vision_start|>": START, "<|vision_end|>": END, "<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO}
_QWEN_SLOT = "<|vision_start|><|image_pad|><|vision_end|>"
_SPLIT = {"<fake_token_around_image>": START, "<global-img>": TAG, "<image>": IMAGE, "<end_of_utterance>": END} | {
    f"<row_{row}_col_{column}>": 116 + 2 * row + column for row in (1, 2) for column in (1, 2)
}
_OVIS = {"<IMG_ATOM>": IMAGE, "<image>": VIDEO} | {
    f"<IMG_{name}>": token for name, token in zip(("START", "GRID", "COL", "ROW", "END"), INDICATORS, strict=True)
}
_ONEVISION = {
    "num_image_tokens": 16,
    "vision_feature_select_strategy": "full",
    "vision_aspect_ratio": "anyres_max_2",
    "video_processor": None,
}
_NEXT = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}

PROCESSORS: dict[str, tuple[str, str, str, dict[str, int], dict[str, Any]]] = {
    "gemma3": ("gemma3", "Gemma3", "<boi>", {"<boi>": START, "<eoi>": END, "<img>": IMAGE}, {"image_seq_length": 16}),
    "idefics3": ("idefics3", "Idefics3", "<image>", _SPLIT, {"image_seq_len": 16}),
    "llava-next": ("llava_next", "LlavaNext", "<image>", {"<image>": IMAGE}, _NEXT),
    "llava-onevision": (
        "llava_onevision",
        "LlavaOnevision",
        "<image>",
        {"<image>": IMAGE, "<video>": VIDEO},
        _ONEVISION,
    ),
    "ovis2": ("ovis2", "Ovis2", "<image>", _OVIS, {"image_seq_length": 16}),
    "qwen2-vl": ("qwen2_vl", "Qwen2VL", _QWEN_SLOT, _QWEN, {"video_processor": None}),
    "qwen3-vl": ("qwen3_vl", "Qwen3VL", _QWEN_SLOT, _QWEN, {"video_processor": None}),
}
"""Module, prefix of the class, what the chat template writes for an image, special tokens, options."""


def processor(name: str) -> Any:
    """Return the processor of a tiny model, see `PROCESSORS`."""
    module, prefix, slot, special, options = PROCESSORS[name]
    kind = load(f"{module}.processing_{module}", f"{prefix}Processor")
    if "video_processor" in options:
        kind = _of_images_alone(kind)
    return kind(
        image_processor=image_processor("qwen2-vl" if name == "qwen3-vl" else name),
        tokenizer=_tokenizer(special),
        chat_template=tiny_hub.CHAT_TEMPLATE.replace("<image>", slot),
        **options,
    )


def _of_images_alone(kind: Any) -> Any:
    """A class of processors that may be made without a processor of videos."""

    def check(self: Any, name: str, argument: Any) -> Any:
        return None if name == "video_processor" else kind.check_argument_for_proper_class(self, name, argument)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})


def _tokenizer(special: Mapping[str, int]) -> PreTrainedTokenizerFast:
    """The tokenizer of characters, whose special ids are called as a family calls them."""
    data = json.loads(tiny_hub.tokenizer()._tokenizer.to_str())
    kept = {text: token for text, token in data["model"]["vocab"].items() if token not in special.values()}
    data["model"]["vocab"] = {**kept, **special}
    names = {"<boi>": "boi_token", "<eoi>": "eoi_token"}
    own = {name: text for text, name in names.items() if text in special}
    own["image_token"] = next(text for text, token in special.items() if token == IMAGE)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=own,
        additional_special_tokens=list(special),
        padding_side="left",
    )
