# SPDX-License-Identifier: Apache-2.0
"""A question answered with the full cache and by several methods, each with what it kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from transformers import PreTrainedModel

from plphp.engines.hf.cache import PrunedCache
from plphp.errors import ConfigError, PLPHPError
from plphp.inputs.prompt import build_inputs
from plphp.methods.registry import chain_of
from plphp.pruning.report import PruneReport
from plphp.settings.config import PLPHPConfig

from .compare import Meter


@dataclass(frozen=True)
class Setting:
    """A way to answer.

    Parameters
    ----------
    label : str
        Name of the method.
    retention : float, optional
        The fraction of the vision tokens that it is asked to keep; None where its own settings say how much.
    config : PLPHPConfig
        Settings of its cache.
    """

    label: str
    retention: float | None
    config: PLPHPConfig

    @property
    def name(self) -> str:
        """The label with the retention."""
        return self.label if self.retention is None else f"{self.label}@{self.retention:g}"


FULL = Setting("full", None, PLPHPConfig(method="none"))
"""The full cache, with which all answers are compared."""


@dataclass(frozen=True)
class Question:
    """A question about images.

    Parameters
    ----------
    text : str
        The question.
    images : sequence of Image
        All stand before the question.
    references : tuple of str
        Answers that are right; empty where none is known.
    """

    text: str
    images: Sequence[Image.Image]
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """An answer with what the cache kept for it.

    Parameters
    ----------
    text : str
        The answer without special tokens; "" where there is none.
    report : PruneReport, optional
        What was kept, right after the prompt was read; None where the method refused the prompt.
    refusal : str
        Why it refused; "" where it did not.
    """

    text: str
    report: PruneReport | None
    refusal: str = ""

    def says(self, text: str) -> bool:
        """Whether it is the same text, whatever the white space."""
        return self.report is not None and self.text.split() == text.split()


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question with the answers of all settings.

    Parameters
    ----------
    question : Question
    answers : list of Answer
        By setting, that of the full cache first.
    """

    question: Question
    answers: list[Answer]

    def same(self, answer: Answer) -> bool:
        """Whether an answer is that of the full cache."""
        return answer.says(self.answers[0].text)

    def right(self, answer: Answer) -> bool | None:
        """Whether an answer is a right one; None where no right answer is known."""
        return any(map(answer.says, self.question.references)) if self.question.references else None


def check_settings(settings: Sequence[Setting]) -> None:
    """Raise PLPHPError where a setting cannot be compared, before a model is loaded.

    Raises
    ------
    ConfigError
        If the first is not the full cache.
    UnsupportedFeatureError
        If a method has yet to collect its query bank, so that its answers are not pruned.
    """
    if not settings or settings[0].config != FULL.config:
        raise ConfigError("The first setting must be the full cache, plphp.studies.question_runs.FULL.")
    for setting in settings:
        chain_of(setting.config).refuse_uncollected("A comparison")


def answer_by_each(
    model: PreTrainedModel,
    processor: Any,
    question: Question,
    settings: Sequence[Setting],
    *,
    max_new_tokens: int = 128,
    progress: Callable[[str], None] = lambda step: None,
) -> AnsweredQuestion:
    """Answer a question with each of some settings, greedily.

    Parameters
    ----------
    model : PreTrainedModel
        A supported model, in evaluation mode, outside any plphp session.
    processor : ProcessorMixin
        Processor of the model.
    question : Question
        The question with its images.
    settings : sequence of Setting
        The full cache first, see `FULL`.
    max_new_tokens : int
        Longest answer.
    progress : callable
        Called with the name of each setting before it answers.

    Returns
    -------
    AnsweredQuestion
        A method that refuses this model or prompt has the reason in the place of an answer.

    Raises
    ------
    PLPHPError
        Of the kinds that `check_settings` and `build_inputs` raise, or if the full cache cannot answer.
    """
    check_settings(settings)
    inputs = build_inputs(processor, question.text, images=question.images)
    answers: list[Answer] = []
    for setting in settings:
        progress(setting.name)
        try:
            answers.append(_answer(model, processor, inputs, setting.config, max_new_tokens))
        except PLPHPError as error:
            if not answers:
                raise
            answers.append(Answer("", None, str(error)))
    return AnsweredQuestion(question, answers)


def _answer(
    model: PreTrainedModel, processor: Any, inputs: dict[str, Any], config: PLPHPConfig, max_new_tokens: int
) -> Answer:
    meter = Meter(model.device)
    cache = PrunedCache.for_inputs(model, inputs, config)
    meter.run(model, inputs, cache, 0, {"max_new_tokens": max_new_tokens, "do_sample": False})
    return Answer(meter.result(processor).texts[0], meter.report)
