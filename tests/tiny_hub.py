# SPDX-License-Identifier: Apache-2.0
"""A tiny model with its processor as a folder in the hub's format, and image files to ask it about."""

from __future__ import annotations

import string
import struct
import zlib
from pathlib import Path

from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from tiny_models import BOS, EOS, IMAGE, PAD, TEXT_IDS, TIERS, VOCAB

IMAGE_TOKENS = 16
CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}{{ message['role'] }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of characters, with the special ids of the tiny models."""
    characters = (string.ascii_letters + string.digits + " \n" + string.punctuation)[: TEXT_IDS[1] - TEXT_IDS[0]]
    vocab = {f"<unused{index}>": index for index in range(TEXT_IDS[1], VOCAB)}
    vocab = {token: index for token, index in vocab.items() if index != IMAGE}
    vocab |= {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, "<image>": IMAGE}
    vocab |= {character: TEXT_IDS[0] + index for index, character in enumerate(characters)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )


def processor(chat_template: str | None = CHAT_TEMPLATE) -> LlavaProcessor:
    """Return the processor of the tiny LLaVA."""
    side = {"height": 32, "width": 32}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, crop_size=side),
        tokenizer=tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=chat_template,
    )


def save(folder: Path) -> Path:
    """Write a tiny LLaVA, whose heads can be held in few bits, and its processor."""
    TIERS["llava"].build().save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def png_header(path: Path, size: tuple[int, int]) -> Path:
    """Write a PNG file that claims any size and holds no pixels."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""), b"IEND"
    framed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))
    return path


def picture(path: Path, size: tuple[int, int] = (48, 40), seed: int = 0) -> Path:
    """Write an image file whose pixels differ with the seed."""
    image = Image.effect_noise(size, 90).convert("RGB")
    image.putpixel((0, 0), (seed, seed, seed))
    image.save(path)
    return path
