# SPDX-License-Identifier: Apache-2.0
"""A later turn of a chat behind the tokens that were read and generated, so that a cache goes on from them.

An answer that is tokenized again may become other tokens than were generated, and a cache holds those. So the text of
the newest answer is not tokenized: what a chat template writes behind it is, and the images of the earlier turns are
not asked for again.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plphp.errors import UnsupportedFeatureError

from .chat import KINDS, Messages, normalized, parts_of
from .prompt import Media, build_inputs, check_slots, filled, processed, readers_of, rendered, with_system

CONTEXT = "a"
"""Stands before the text of a turn while it is tokenized, as some tokenizers begin a text otherwise than they go on."""
TokenInputs = dict[str, Tensor]
"""By name, the inputs with a number per token: ``input_ids``, ``attention_mask`` and types of tokens, [1, seq] each."""


@dataclass(frozen=True)
class TurnInputs:
    """A turn of a chat as a model reads it.

    Parameters
    ----------
    whole : dict
        Inputs of ``generate``: all tokens of the chat, and the features of the images that are new in this turn.
    new : dict
        The same of what is new alone.
    """

    whole: dict[str, Any]
    new: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Tokens of the chat up to the answer."""
        return int(self.whole["input_ids"].shape[1])


def first_turn(processor: Any, chat: Messages, *, frames: int = 8) -> TurnInputs:
    """Make the inputs of a chat of which nothing was read.

    Raises
    ------
    PLPHPError
        See `plphp.inputs.prompt.build_inputs`.
    """
    inputs = build_inputs(processor, messages=chat, frames=frames, text_alone=True)
    return TurnInputs(inputs, inputs)


def later_turn(
    processor: Any, chat: Messages, answered: int, before: TokenInputs, *, leftover: str = "", frames: int = 8
) -> TurnInputs:
    """Make the inputs of a chat that goes on behind an answer.

    Parameters
    ----------
    processor : ProcessorMixin
        Processor of the model.
    chat : sequence of mapping
        The whole chat, see `plphp.inputs.chat.normalized`; entries of earlier images need no source.
    answered : int
        Index of the message that is the newest answer. Its text is not looked at.
    before : dict
        The tokens up to the end of that answer, see `TokenInputs`.
    leftover : str
        Text of the answer that stands in no token of ``before``.
    frames : int
        Frames to take at most of a video that is read from a file.

    Raises
    ------
    UnsupportedFeatureError
        If the chat template does not write the answer once.
    PLPHPError
        See `plphp.inputs.prompt.build_inputs`.
    """
    messages = normalized(chat)
    readers = readers_of(frames, False)
    media: Media = {kind: filled(messages[answered + 1 :], kind, [], readers[kind]) for kind in KINDS}
    for kind in KINDS:
        for _, part in parts_of(messages, kind):
            part.pop(kind, None)
    mark = f"answer{secrets.token_hex(8)}"
    messages[answered] = {"role": "assistant", "content": [{"type": "text", "text": mark}]}
    pieces = rendered(processor, with_system(messages, None)).split(mark)
    if len(pieces) != 2:
        raise UnsupportedFeatureError(
            f"The chat template of {type(processor).__name__} writes an answer of the history {len(pieces) - 1} times, "
            "so that this chat cannot go on from what was generated: read it whole, with a new cache."
        )
    text = f"{leftover}{pieces[1]}"
    check_slots(processor, text, media, text_alone=True)
    new = _behind(processor, text, media)
    return TurnInputs({**new, **joined(before, token_inputs(new))}, new)


def token_inputs(inputs: Mapping[str, Any]) -> TokenInputs:
    """The inputs that have a number per token."""
    shape = inputs["input_ids"].shape
    return {
        name: value
        for name, value in inputs.items()
        if name.endswith(("_ids", "_mask")) and isinstance(value, Tensor) and value.shape == shape
    }


def joined(before: TokenInputs, new: TokenInputs) -> TokenInputs:
    """Put tokens behind tokens; types that one side does not have are 0 there, which is text."""
    lengths = before["input_ids"].shape[1], new["input_ids"].shape[1]
    result = {}
    for name, like in {**before, **new}.items():
        missing = 1 if name == "attention_mask" else 0
        sides = zip((before, new), lengths, strict=True)
        result[name] = torch.cat([side.get(name, like.new_full((1, count), missing)) for side, count in sides], 1)
    return result


def with_answer(tokens: TokenInputs, answer: list[int]) -> TokenInputs:
    """Put the tokens of an answer behind those of its prompt."""
    ids = torch.tensor([answer], dtype=torch.long)
    return joined(tokens, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _behind(processor: Any, text: str, media: Media) -> dict[str, Any]:
    """What a processor makes of a text that goes on from another."""
    context = processor.tokenizer(CONTEXT, add_special_tokens=False)["input_ids"]
    inputs = processed(processor, [f"{CONTEXT}{text}"], [media], begins=False)
    count = len(context)
    if inputs["input_ids"][0, :count].tolist() != context:  # a token spans both: the text is read by itself
        return processed(processor, [text], [media], begins=False)
    return {**inputs, **{name: value[:, count:] for name, value in token_inputs(inputs).items()}}
