# SPDX-License-Identifier: Apache-2.0
"""Packed training rows: one shared prefix (system text, images) and many independent conversations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plphp.evaluation.tasks.synthetic import questions, scenes
from plphp.evaluation.tasks.synthetic.scenes import Scene
from training import model as models
from training import tokenizer

SYSTEM_SLOT = max(len(tokenizer.encode(f"<|system|>{text}<|end|>\n")) for text in questions.SYSTEMS)
PER_IMAGE = len(tokenizer.encode("Image 1: ")) + models.IMAGE_TOKENS + 1
PAD, END, IMAGE, _, USER, _ = range(len(tokenizer.SPECIAL))
IMAGE_MENTIONS = {tokenizer.encode(word) for word in ("Image ", "image ", " Image ", " image ")}
DIGITS = [tokenizer.encode(str(k))[0] for k in range(1, 5)]
WIDTH = 120
"""Tokens of a block. A conversation lies in one block; those of a block do not see each other."""
PREFIX_BLOCK, PAD_BLOCK = 0, -1
AHEAD = len(tokenizer.encode(" red, in image"))
"""Tokens between the word behind a thing that was found ("... star is") and the number of its image, or line."""
IN_ROW = tokenizer.encode(" is in row ")


@dataclass(frozen=True)
class Row:
    """One packed row.

    Attributes
    ----------
    pixels
        uint8, shape (images, 112, 112, 3).
    ids
        int64, shape (seq,): left padding, prefix, then blocks of ``WIDTH`` tokens.
    labels
        int64, shape (seq,): the next token where it belongs to an answer, else -100.
    numbers
        int64, shape (seq,): the number, counted from 0, that a token is to know early, see ``known_numbers``; of a
        patch with several images the one of its image. -100 where there is none.
    blocks
        int64, shape (seq,): 0 for the prefix (visible to all), 1, 2, ... for conversations (each visible to
        itself), -1 for pads.
    positions
        int64, shape (seq,): every conversation continues from the end of the prefix.
    """

    pixels: np.ndarray
    ids: np.ndarray
    labels: np.ndarray
    numbers: np.ndarray
    blocks: np.ndarray
    positions: np.ndarray


def prefix_length(n_images: int) -> int:
    """Return the fixed number of positions before the first block, padding included."""
    return SYSTEM_SLOT + 1 + n_images * PER_IMAGE


def prefix_ids(n_images: int, system: str) -> list[int]:
    """Return the tokens of the chat template up to the first question."""
    ids = list(tokenizer.encode(f"<|system|>{system}<|end|>\n")) if system else []
    ids += tokenizer.encode("<|user|>")
    for k in range(1, n_images + 1):
        ids += tokenizer.encode(f"Image {k}: ")
        ids += [IMAGE] * models.IMAGE_TOKENS
        ids += tokenizer.encode("\n")
    return ids


def block_ids(turns: Sequence[questions.Question]) -> tuple[list[int], list[int]]:
    """Return (ids, labels) of a dialogue: its questions and answers in the chat template's form."""
    ids: list[int] = []
    labels: list[int] = []
    for i, turn in enumerate(turns):
        opening = tokenizer.encode(("\n<|user|>" if i else "") + turn.text + "<|end|>\n<|assistant|>")
        answer = [*tokenizer.encode(turn.answer), END]
        ids += [*opening, *answer]
        labels += [-100] * (len(opening) - 1) + answer + [-100]
    # The last <|end|> is only ever predicted.
    return ids[:-1], labels[:-1]


def known_numbers(ids: Sequence[int], labels: Sequence[int]) -> list[int]:
    """Return for each token of a dialogue the number, counted from 0, that it is to know early; -100 where none is.

    The words of an answer are to know the number of the image that was last mentioned. Where none was, the word behind
    a thing that is looked up ("the star is") is to know the number, of its image, line or row, that will be said of it,
    up to four.
    """
    found = [-100] * len(ids)
    mentioned = -100
    for at, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if token == USER:
            mentioned = -100
        if tuple(ids[max(0, at - 2) : at]) in IMAGE_MENTIONS and token in DIGITS:
            mentioned = DIGITS.index(token)
        if label >= 0:
            found[at] = mentioned
        if label in tokenizer.NUMBERS and mentioned < 0:
            found[at - AHEAD] = tokenizer.NUMBERS.index(label)
        behind = at + 1 - len(IN_ROW)
        if label in DIGITS and mentioned < 0 and tuple(ids[max(0, behind) : at + 1]) == IN_ROW:
            found[behind] = DIGITS.index(label)
    return found


def draw_turns(rng: random.Random, drawn: Sequence[Scene], *, dialogues: float) -> list[questions.Question]:
    """Ask one question, or two or three with probability ``dialogues``; none where the scenes allow none."""
    wanted = rng.choice((2, 2, 3)) if rng.random() < dialogues else 1
    turns = [questions.ask_any(rng, drawn) for _ in range(wanted)]
    return [turn for turn in turns if turn is not None]


def draw_system(rng: random.Random) -> str:
    """Return a system text: the default in half of the rows, none in some."""
    draw = rng.random()
    if draw < 0.5:
        return questions.DEFAULT_SYSTEM
    return "" if draw < 0.6 else rng.choice(questions.SYSTEMS[1:])


def make_row(
    rng: random.Random, n_images: int, n_blocks: int, largest: int = 5, kinds: Sequence[scenes.Kind] = ("grid", "text")
) -> Row:
    """Draw scenes (training split) and as many conversations about them as fit into ``n_blocks`` blocks."""
    drawn = scenes.make_scenes(rng, "train", n_images, largest=largest, kinds=kinds)
    prefix = prefix_ids(n_images, draw_system(rng))
    start = prefix_length(n_images)
    length = start + n_blocks * WIDTH
    ids = np.full(length, PAD, np.int64)
    labels = np.full(length, -100, np.int64)
    numbers = np.full(length, -100, np.int64)
    blocks = np.full(length, PAD_BLOCK, np.int64)
    positions = np.zeros(length, np.int64)
    ids[start - len(prefix) : start] = prefix
    blocks[start - len(prefix) : start] = PREFIX_BLOCK
    positions[start - len(prefix) : start] = np.arange(len(prefix))
    if n_images > 1:
        numbers[ids == IMAGE] = np.arange(n_images).repeat(models.IMAGE_TOKENS)
    used = [0] * n_blocks
    conversation, misses = 1, 0
    seen: set[str] = set()
    while misses < 10:
        turns = draw_turns(rng, drawn, dialogues=0.3)
        if not turns or turns[0].answer in seen:
            misses += 1
            continue
        turn_ids, turn_labels = block_ids(turns)
        roomy = [i for i in range(n_blocks) if used[i] + len(turn_ids) <= WIDTH]
        if not roomy:
            misses += 1
            continue
        seen.add(turns[0].answer)
        at = start + roomy[0] * WIDTH + used[roomy[0]]
        end = at + len(turn_ids)
        ids[at:end], labels[at:end], blocks[at:end] = turn_ids, turn_labels, conversation
        numbers[at:end] = known_numbers(turn_ids, turn_labels)
        positions[at:end] = len(prefix) + np.arange(len(turn_ids))
        used[roomy[0]] += len(turn_ids)
        conversation += 1
    pixels = np.stack([scenes.training_pixels(rng, scene) for scene in drawn])
    return Row(pixels, ids, labels, numbers, blocks, positions)
