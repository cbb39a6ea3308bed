# SPDX-License-Identifier: Apache-2.0
"""From a sample to tokens: the first prompt, what follows it word for word, and which of its tokens are answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from plphp.errors import ConfigError, PLPHPError, UnsupportedFeatureError
from plphp.inputs.prompt import build_batch, build_inputs
from plphp.io.quoting import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from plphp.evaluation.tasks.task import Sample


@dataclass(frozen=True)
class AnswerSpan:
    """The reference answer of a turn within the draft.

    Parameters
    ----------
    start : int
        Position of its first token in the draft.
    tokens : tuple of int
        Its tokens, the end token included.
    scored : bool
        Whether the turn is scored.
    """

    start: int
    tokens: tuple[int, ...]
    scored: bool


@dataclass(frozen=True)
class Conversation:
    """A sample in tokens.

    Parameters
    ----------
    inputs : dict
        Inputs of the model for the prompt of the first turn, as `plphp.inputs.prompt.build_inputs` makes them.
    draft : Tensor
        int64 [draft]; what follows the prompt where every answer is the reference: answer, the template's own
        tokens, next question, answer, and so on, up to the last token whose successor is scored.
    answers : tuple of AnswerSpan
        An answer for each turn.
    ends : tuple of int
        Tokens that end an answer; greedy decoding stops at any of them.
    """

    inputs: dict[str, Any]
    draft: Tensor
    answers: tuple[AnswerSpan, ...]
    ends: tuple[int, ...]

    @property
    def scored(self) -> tuple[AnswerSpan, ...]:
        """The answers of the scored turns."""
        return tuple(answer for answer in self.answers if answer.scored)


def end_tokens(model: PreTrainedModel, processor: Any) -> tuple[int, ...]:
    """Token ids at which greedy decoding of a model stops; the first one is the usual end of its answers.

    Raises
    ------
    ConfigError
        If neither the model nor its tokenizer names an end token.
    """
    generation = getattr(model, "generation_config", None)
    for ends in (getattr(generation, "eos_token_id", None), processor.tokenizer.eos_token_id):
        if ends is not None:
            return tuple(ends) if isinstance(ends, (list, tuple)) else (int(ends),)
    raise ConfigError(f"{type(model).__name__} names no end token (eos_token_id), so no answer of it ever ends.")


def prompt_inputs(processor: Any, sample: Sample, turns: int = 1) -> dict[str, Any]:
    """Inputs of ``generate`` for the question of turn number ``turns``, with all images that have come by then; the
    answers before it are the references."""
    messages = _messages(sample)[: 2 * turns - 1]
    images = [image for turn in range(turns) for image in sample.images_with(turn)]
    with _refusals(processor):
        return build_inputs(processor, messages=messages, images=images, system=sample.system)


def batch_inputs(processor: Any, samples: Sequence[Sample]) -> dict[str, Any]:
    """Inputs of ``generate`` for the first questions of several samples, padded on the left."""
    with _refusals(processor):
        return build_batch(processor, [[*_system(sample), *_first_turn(sample)] for sample in samples])


def _first_turn(sample: Sample) -> list[dict[str, Any]]:
    """The first question behind the images of a sample, each in its entry."""
    images = [{"type": "image", "image": image} for image in sample.images]
    return [{"role": "user", "content": [*images, {"type": "text", "text": sample.turns[0].question}]}]


@contextmanager
def _refusals(processor: Any) -> Iterator[None]:
    """Raise what a processor has against an image or a text, such as its size, as a ConfigError."""
    try:
        yield
    except PLPHPError:
        raise
    except ValueError as error:
        raise ConfigError(f"{type(processor).__name__} refuses this sample: {one_line(error)}") from error


def encode(processor: Any, sample: Sample, ends: tuple[int, ...]) -> Conversation:
    """Turn a sample into tokens with the processor's chat template.

    Parameters
    ----------
    processor : ProcessorMixin
        The model's processor, with a chat template.
    sample : Sample
        Images and turns. An image that comes with a later turn is as long in the draft as its slot in the text: such a
        draft says what the answers are, and cannot be read.
    ends : tuple of int
        See `end_tokens`.

    Returns
    -------
    Conversation

    Raises
    ------
    ConfigError
        If there is no turn, an answer is missing, or the template changes an answer.
    UnsupportedFeatureError
        If the processor has no chat template, or the template writes other text before an answer of the history
        than before an answer that is to be generated.
    """
    check_sample(sample)
    tokens = _tokenized(processor.tokenizer, _pieces(processor, sample))
    draft: list[int] = []
    answers: list[AnswerSpan] = []
    for turn, answer, rest in zip(sample.turns, tokens[1::2], tokens[2::2], strict=True):
        end = rest[0] if rest and rest[0] in ends else ends[0]
        answers.append(AnswerSpan(len(draft), (*answer, end), turn.scored))
        draft += [*answer, *rest]
    last = [answer for answer in answers if answer.scored][-1]
    # What follows the last scored token is never asked for.
    draft = draft[: last.start + len(last.tokens) - 1]
    return Conversation(prompt_inputs(processor, sample), torch.tensor(draft, dtype=torch.int64), tuple(answers), ends)


def check_sample(sample: Sample) -> None:
    """Raise `ConfigError` unless a sample has a scored turn, and an answer for every turn."""
    if not any(turn.scored for turn in sample.turns):
        raise ConfigError(f"The sample {sample.id!r} has no turn that is scored.")
    for turn in sample.turns:
        if not turn.answer.strip():
            raise ConfigError(
                f"The question {turn.question!r} of the sample {sample.id!r} has no answer: give one, or use the "
                "label-free measures, which need none."
            )


def _messages(sample: Sample) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(sample.turns):
        slots = [{"type": "image"} for _ in sample.images_with(number)]
        messages.append({"role": "user", "content": [*slots, {"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer.strip()}]})
    return messages


def _system(sample: Sample) -> list[dict[str, Any]]:
    if sample.system is None:
        return []
    return [{"role": "system", "content": [{"type": "text", "text": sample.system}]}]


def _pieces(processor: Any, sample: Sample) -> list[str]:
    """The conversation's text, cut: prompt, then for each turn its answer and what stands before the next answer."""
    messages = _messages(sample)
    head = _system(sample)
    whole = _rendered(processor, [*head, *messages], reply=False)
    cuts = []
    for number, turn in enumerate(sample.turns):
        prompt = _rendered(processor, [*head, *messages[: 2 * number + 1]], reply=True)
        start = whole.find(turn.answer.strip(), len(prompt))
        if not whole.startswith(prompt) or start < 0 or whole[len(prompt) : start].strip():
            raise UnsupportedFeatureError(
                f"The chat template of {type(processor).__name__} writes other text around an answer of the history "
                f"than around an answer that is to be generated (answer {turn.answer!r}): its tokens cannot be found. "
                "Use --mode generate with samples of one turn."
            )
        cuts += [len(prompt), start + len(turn.answer.strip())]
    return [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


def _rendered(processor: Any, messages: list[dict[str, Any]], *, reply: bool) -> str:
    if getattr(processor, "chat_template", None) is None:
        raise UnsupportedFeatureError(f"{type(processor).__name__} has no chat template to make a conversation with.")
    try:
        text: str = processor.apply_chat_template(messages, add_generation_prompt=reply)
    except Exception as error:  # templates raise what they like
        raise ConfigError(f"The model's chat template refuses this conversation: {one_line(error)}") from error
    return text


def _tokenized(tokenizer: Any, pieces: Sequence[str]) -> list[list[int]]:
    """Tokens of each piece of a text, as they are in the whole where no token spans two of them."""
    before: list[int] = []
    tokens = []
    for piece, text in zip(pieces, accumulate(pieces), strict=True):
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        # A token that spans two pieces cannot be shared out: there the piece is read by itself.
        spans_two = whole[: len(before)] != before
        new = tokenizer(piece, add_special_tokens=False)["input_ids"] if spans_two else whole[len(before) :]
        before = [*before, *new]
        tokens.append(list(new))
    return tokens
