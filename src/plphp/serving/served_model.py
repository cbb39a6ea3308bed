# SPDX-License-Identifier: Apache-2.0
"""A model that answers chats one after another, each with a pruned KV cache: of its own, or of its conversation."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from plphp.engines.hf.session import Session, apply, remove
from plphp.errors import ConfigError, UnsupportedFeatureError
from plphp.inputs.later_turn import TurnInputs, first_turn
from plphp.inputs.prompt import count_vision_tokens, media_inputs, on_device
from plphp.pruning.report import PruneReport
from plphp.settings.config import PLPHPConfig

from .answer_text import AnswerText
from .chat_messages import decoded_chat
from .chat_request import ChatRequest
from .conversation import Conversation
from .options import Limits
from .refusals import RequestError

logger = logging.getLogger("plphp")


@dataclass(frozen=True)
class Prompt:
    """A chat as the model reads it.

    Parameters
    ----------
    turn : TurnInputs
        Inputs of ``generate``, on the CPU.
    vision_tokens : int
        Tokens that stand for images, among those that are read now.
    held : int
        Tokens that a conversation's cache holds of it.
    max_new_tokens, min_new_tokens : int
        Tokens of the answer, at most and at least.
    """

    turn: TurnInputs
    vision_tokens: int
    held: int
    max_new_tokens: int
    min_new_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return self.turn.tokens


@dataclass(frozen=True)
class Answer:
    """What became of a prompt.

    Parameters
    ----------
    tokens : int
        Tokens that were written, with the one that ends the answer.
    finish_reason : {"stop", "length"}
        Whether the answer came to its end.
    report : PruneReport
        What was kept.
    conversation : str, optional
        Name of the conversation that goes on from it.
    """

    tokens: int
    finish_reason: str
    report: PruneReport
    conversation: str | None = None


class ServedModel:
    """A model with the settings of a server; `close` gives it back as it was.

    Parameters
    ----------
    model : PreTrainedModel
        A supported vision-language model.
    processor : ProcessorMixin
        Its processor.
    config : PLPHPConfig
        How every request is pruned.
    decode : {"eager", "auto", "graph"}
        How decoding steps run, see `plphp.prune`.
    limits : Limits
        What requests may ask for; without ``max_model_len`` the model says it.

    Raises
    ------
    PLPHPError
        If the model cannot be pruned in this way, or knows fewer positions than ``max_model_len``.
    """

    def __init__(
        self, model: PreTrainedModel, processor: Any, config: PLPHPConfig, decode: str, limits: Limits
    ) -> None:
        positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limits.max_model_len is not None and positions is not None and limits.max_model_len > positions:
            raise ConfigError(f"--max-model-len is {limits.max_model_len}, and the model knows {positions} positions.")
        self.limits = replace(limits, max_model_len=limits.max_model_len or positions)
        self._model, self._processor = model, processor
        end = model.generation_config.eos_token_id
        self._ends = set([] if end is None else torch.as_tensor(end).flatten().tolist())
        self._session: Session = apply(model, config, decode=decode)

    def close(self) -> None:
        """End the session on the model."""
        remove(self._model)

    def try_out(self) -> None:
        """Answer a small picture in a token: whatever the model cannot do is refused before any client comes.

        Raises
        ------
        PLPHPError
            If the model cannot be pruned in this way.
        """
        inputs = media_inputs(self._processor, [Image.new("RGB", (64, 64), "gray")])
        self._generate(inputs, max_new_tokens=1, do_sample=False)

    def conversation(self) -> Conversation:
        """Begin a conversation."""
        return Conversation(self._model, self._processor)

    def prepare(self, request: ChatRequest, conversation: Conversation | None = None) -> Prompt:
        """Decode the images of a request, and make its prompt.

        Parameters
        ----------
        request : ChatRequest
            The request.
        conversation : Conversation, optional
            What it goes on with; what that has read is neither decoded nor read again.

        Raises
        ------
        RequestError
            If the prompt and its answer are too long.
        PLPHPError
            If an image is broken, the model does not take the chat, or it does not go on from the conversation.
        """
        if conversation is None:
            turn = first_turn(self._processor, decoded_chat(request.messages, self.limits))
        else:
            turn = conversation.prepare(request.messages, self.limits)
        tokens = turn.tokens
        longest = request.max_new_tokens or self.limits.max_new_tokens
        if self.limits.max_model_len is not None:
            room = self.limits.max_model_len - tokens
            if room < (request.max_new_tokens or 1):
                answer = f" and an answer of {request.max_new_tokens}" if request.max_new_tokens else ""
                raise RequestError(
                    f"A prompt of {tokens} tokens{answer} is more than the {self.limits.max_model_len} tokens of this "
                    "server: send fewer or smaller images, or ask for a shorter answer.",
                    param="messages",
                    code="context_length_exceeded",
                )
            longest = min(longest, room)
        vision = count_vision_tokens(self._model.config, turn.new)
        held = 0 if conversation is None else conversation.held
        return Prompt(turn, vision, held, longest, min(request.min_new_tokens, longest))

    def answer(
        self,
        prompt: Prompt,
        request: ChatRequest,
        tell: Callable[[str], None],
        left: threading.Event,
        conversation: Conversation | None = None,
    ) -> Answer:
        """Answer a prompt.

        Parameters
        ----------
        prompt : Prompt
            From `prepare`.
        request : ChatRequest
            The request it was made of.
        tell : callable
            Gets the text piece by piece.
        left : Event
            Ends the answer at the next token: nobody waits for it any more.
        conversation : Conversation, optional
            As in `prepare`; it keeps the turn, unless the client has left.
        """
        said: list[str] = []

        def tell_and_note(piece: str) -> None:
            said.append(piece)
            tell(piece)

        text = AnswerText(self._decoded, request.stop)
        follower = _Follower(text, prompt.tokens, tell_and_note, left)
        if request.options["do_sample"]:
            torch.manual_seed(secrets.randbits(63) if request.seed is None else request.seed)
        shortest = {"min_new_tokens": prompt.min_new_tokens} if prompt.min_new_tokens else {}
        options = {
            "max_new_tokens": prompt.max_new_tokens,
            "stopping_criteria": StoppingCriteriaList([follower]),
            **shortest,
            **request.options,
        }
        if conversation is None:
            self._generate(prompt.turn.whole, **options)
        else:
            conversation.generate(prompt.turn, num_beams=1, **options)
        tell_and_note(text.finish())
        ended = text.stopped or (bool(text.tokens) and text.tokens[-1] in self._ends)
        report = self._session.report
        goes_on = conversation is not None and not left.is_set() and _kept(conversation, prompt, text, "".join(said))
        name = conversation.name if conversation is not None and goes_on else None
        return Answer(len(text.tokens), "stop" if ended else "length", report, name)

    def _generate(self, inputs: dict[str, Any], **options: Any) -> None:
        with torch.no_grad():
            self._model.generate(**on_device(self._model, inputs), num_beams=1, **options)

    def _decoded(self, tokens: list[int]) -> str:
        return str(self._processor.decode(tokens, skip_special_tokens=True))


def _kept(conversation: Conversation, prompt: Prompt, text: AnswerText, said: str) -> bool:
    """Let a conversation keep its turn; return whether it could."""
    try:
        conversation.keep(prompt.turn, text.tokens, said, cut=text.stopped)
    except UnsupportedFeatureError as error:
        logger.warning("A conversation ends with its answer: %s", error)
        return False
    return True


class _Follower(StoppingCriteria):
    """Hears of every token that ``generate`` has chosen, and says whether it goes on."""

    def __init__(self, text: AnswerText, start: int, tell: Callable[[str], None], left: threading.Event) -> None:
        self._text, self._seen, self._tell, self._left = text, start, tell, left

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        for token in input_ids[0, self._seen :].tolist():
            if piece := self._text.add(token):
                self._tell(piece)
        self._seen = input_ids.shape[1]
        done = self._text.stopped or self._left.is_set()
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool, device=input_ids.device)
