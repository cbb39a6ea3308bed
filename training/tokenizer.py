# SPDX-License-Identifier: Apache-2.0
"""Byte-level tokenizer: one token for each word of the question language, everything else is spelled out."""

from __future__ import annotations

import string
from functools import lru_cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast, SiglipImageProcessorPil

from plphp.evaluation.tasks.synthetic import questions, scenes, sprites, truths

PAD, END, IMAGE, SYSTEM, USER, ASSISTANT = (
    "<|pad|>",
    "<|end|>",
    "<image>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
SPECIAL = (PAD, END, IMAGE, SYSTEM, USER, ASSISTANT)
WORDS = """
a an and the this that these is are was it in on of to for from with not no yes there here you me I one two
three four five six image images picture pictures says say said shows show nothing digit row rows line lines
column columns left right top bottom number letter letters shape colour color empty grid value table key things all
first comes so where which what how many count compare difference above below
"""


def _words() -> list[str]:
    """Return every word of the questions, answers and system texts, in a fixed order."""
    texts = [WORDS, *questions.SYSTEMS, *questions.IN_IMAGE, *questions.BEFORE, *questions.AFTER, *truths.SIDES]
    texts += [*scenes.COLOURS, *sprites.SHAPES]
    texts += [phrase for group in questions.PHRASINGS.values() for phrase in group]
    words: dict[str, None] = {}
    for text in texts:
        for word in "".join(c if c in string.ascii_letters else " " for c in text).split():
            words[word.lower()] = None
    return list(words)


def build_bpe() -> Tokenizer:
    """Return the tokenizer: 256 bytes, then every word in lower case and capitalised, bare and after a space.

    A piece of text that is a known word is one token, everything else is spelled in bytes: there are no
    partial merges. Codes and numbers are always spelled, because the pre-tokenizer cuts at everything
    that is not a word. Any text is encoded without unknown tokens and decoded to itself.
    """
    vocab = {token: i for i, token in enumerate((*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    for word in _words():
        for form in (word, word.capitalize(), "Ġ" + word, "Ġ" + word.capitalize()):
            vocab.setdefault(form, len(vocab))
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[A-Z]?[a-z]+|[\s\S]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(SPECIAL))
    return bpe


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer as the transformers class that ships with the model (pads on the left)."""
    return PreTrainedTokenizerFast(
        tokenizer_object=build_bpe(),
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens={
            "image_token": IMAGE,
            "system_token": SYSTEM,
            "user_token": USER,
            "turn_token": ASSISTANT,
        },
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def chat_template() -> str:
    """Return the chat template's source."""
    return (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")


def build_processor() -> LlavaProcessor:
    """Return the processor: any image is converted to RGB and resized to 112 x 112."""
    side = {"height": scenes.SIDE, "width": scenes.SIDE}
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size=side),
        tokenizer=build_tokenizer(),
        patch_size=scenes.PATCH,
        vision_feature_select_strategy="full",
        chat_template=chat_template(),
        image_token=IMAGE,
    )


@lru_cache(maxsize=1)
def bpe() -> Tokenizer:
    """Return one shared tokenizer."""
    return build_bpe()


@lru_cache(maxsize=50_000)
def encode(text: str) -> tuple[int, ...]:
    """Return the token ids of a text; special tokens in it count as such."""
    return tuple(bpe().encode(text, add_special_tokens=False).ids)


NUMBERS = tuple(encode(f" {number}")[0] for number in truths.NUMBERS[1:5])
"""Tokens of the numbers of images, in order."""


def attribute_words() -> list[int | None]:
    """Return the token of every class, colour, row and column of the patch labels, in order; None where none is."""
    names = [None, " nothing", *scenes.OBJECTS[2:], None, *scenes.COLOURS]
    words = [name if name is None or len(name) == 1 else f" {name.strip()}" for name in names]
    tokens = [None if word is None else encode(word) for word in words]
    found = [token[0] if token is not None and len(token) == 1 else None for token in tokens]
    return found + [None] * (scenes.MAX_ROWS + 1 + scenes.MAX_COLS + 1)
