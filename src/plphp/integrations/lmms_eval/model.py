# SPDX-License-Identifier: Apache-2.0
"""The model class that lmms-eval drives: chats in, answers of the pruned model out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.utils import Collator
from tqdm import tqdm

from plphp.engines.hf.answer_lengths import answer_lengths
from plphp.engines.hf.session import apply, remove
from plphp.errors import UnsupportedFeatureError
from plphp.inputs.loading import load_model
from plphp.inputs.prompt import build_batch, on_device

from .arguments import check_known, read_count, read_settings, unquoted
from .document import Document, downsampled, named_after
from .generation import Generation, read_generation, text_of
from .totals import Totals

ARGUMENTS = ("pretrained", "config", "config_file", "dtype", "device", "batch_size", "frames", "downsample")


class PrunedModel(lmms):  # type: ignore[misc, unused-ignore]
    """A vision-language model, pruned by plphp, for ``lmms-eval --model plphp``.

    Parameters
    ----------
    pretrained : str, optional
        A hub id or a folder; default: the model that ships with plphp.
    config : str, optional
        Settings of pruning as `plphp.PLPHPConfig.parse` reads them, in single quotes where they hold a comma:
        ``config='query_bank:bank=bundled,retention_rate=0.2'``; ``config=none`` keeps the whole cache. Default: the
        settings of ``plphp generate``.
    config_file : str, optional
        A preset file in the place of ``config``.
    dtype, device : str, optional
        See `plphp.inputs.loading.load_model`.
    batch_size : int or str
        Documents that are answered together; lmms-eval's own option sets it.
    frames : int or str
        Frames to take at most of a video.
    downsample : int or str
        Both sides of every image are divided by it: what pruning is compared with.

    Raises
    ------
    ConfigError, LoadError, UnsupportedModelError
        If an argument is unknown or wrong, or there is no such model.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        config: object = None,
        config_file: object = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: object = 1,
        frames: object = 8,
        downsample: object = 1,
        **unknown: object,
    ) -> None:
        super().__init__()
        check_known(unknown, ARGUMENTS)
        self.batch_size, self.frames = read_count("batch_size", batch_size), read_count("frames", frames)
        self.downsample = read_count("downsample", downsample)
        settings = read_settings(config, config_file, bundled=pretrained is None)
        source = None if pretrained is None else unquoted(str(pretrained))
        self.model, self.processor = load_model(source, dtype, device or _own_device())
        self.session = apply(self.model, settings)

    @property
    def device(self) -> torch.device:
        """Where the model is; lmms-eval gathers numbers of several processes there."""
        device: torch.device = self.model.device
        return device

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answer documents in batches; the answers come in the order of the requests."""
        order = Collator(
            [request.args for request in requests],
            lambda arguments: (-len(arguments[0]), arguments[0]),
            group_fn=lambda arguments: arguments[2],
            grouping=True,
        )
        totals, results = Totals(), []
        with tqdm(total=len(requests), desc="plphp", disable=self.rank != 0) as bar:
            for batch in order.get_batched(n=self.batch_size, batch_fn=None):
                results += self._answer([self._document(arguments) for arguments in batch], batch[0][2], totals)
                bar.update(len(batch))
        totals.log()
        originals: list[GenerationResult] = order.get_original(results)
        return originals

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Answer documents that a task asks about in rounds, each round from what the model has said so far."""
        totals, results = Totals(), []
        for request in tqdm(requests, desc="plphp", disable=self.rank != 0):
            said: list[str] = []
            document: Document | None = self._document(request.args)
            number, notes = 0, None
            while document is not None:
                [answer] = self._answer([document], request.args[2], totals)
                number += 1
                document, said, notes = self._next_round(request.args, number, [*said, answer.text], notes)
            results.append(said)
        totals.log()
        return results

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Refuse tasks that compare likelihoods.

        Raises
        ------
        UnsupportedFeatureError
            Always: the tokens of a given answer are scored in the pass that reads the prompt, before the KV cache is
            pruned, so that such methods would have the score of the full cache.
        """
        raise UnsupportedFeatureError(
            "plphp answers generate_until tasks alone. A likelihood task scores given answers in the pass that reads "
            "the prompt, before its KV cache is pruned: the result would be that of the full cache. Take the "
            "generative form of the task."
        )

    def clean(self) -> None:
        """Give the model's memory back, which the session would hold."""
        remove(self.model)
        del self.session
        super().clean()

    def _document(self, arguments: Sequence[Any]) -> Document:
        _, to_messages, _, number, task, split = arguments
        return Document(f"{task}, document {number}", to_messages(self.task_dict[task][split][number]))

    def _next_round(
        self, arguments: Sequence[Any], number: int, said: list[str], notes: Any
    ) -> tuple[Document | None, list[str], Any]:
        """What a task asks in a round, None where it has ended; what was said, as the task has it; the task's notes."""
        _, to_messages, _, document, task, split = arguments
        payload = to_messages(
            self.task_dict[task][split][document],
            round_idx=number,
            previous_output=list(said),
            previous_round_info=notes,
        )
        if not isinstance(payload, tuple):  # a task that has messages for a single round
            return None, said, notes
        messages, ended, said_by_task, notes = payload
        asked = None if ended else Document(f"{task}, document {document}, round {number + 1}", messages)
        return asked, said if said_by_task is None else list(said_by_task), notes

    def _answer(
        self, documents: Sequence[Document], kwargs: Mapping[str, Any], totals: Totals
    ) -> list[GenerationResult]:
        """Answer documents, those together that have the same kinds of media, as processors ask for."""
        generation = read_generation(kwargs)
        by_media: dict[tuple[bool, ...], list[int]] = {}
        for number, document in enumerate(documents):
            by_media.setdefault(document.media, []).append(number)
        results: dict[int, GenerationResult] = {}
        for numbers in by_media.values():
            answers = self._generate([documents[number] for number in numbers], generation)
            totals.add(self.session.report, sum(answer.token_counts.output_tokens for answer in answers))
            results |= dict(zip(numbers, answers, strict=True))
        return [results[number] for number in range(len(documents))]

    def _generate(self, documents: Sequence[Document], generation: Generation) -> list[GenerationResult]:
        with named_after(documents):
            chats = [downsampled(document.chat, self.downsample) for document in documents]
            inputs = on_device(self.model, build_batch(self.processor, chats, frames=self.frames))
            prompt = inputs["input_ids"].shape[1]
            with torch.inference_mode():
                output = self.model.generate(
                    **inputs, **generation.options, **generation.criteria(self.processor, prompt)
                )
        answers = output[:, prompt:]
        lengths = answer_lengths(answers, self.model.generation_config)
        return [
            GenerationResult(generation.cut(text_of(self.processor, tokens)), TokenCounts(output_tokens=length))
            for tokens, length in zip(answers, lengths, strict=True)
        ]


def _own_device() -> str | None:
    """The device of this process among those that a launcher has started; None for plphp's default."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ and torch.cuda.is_available() else None
