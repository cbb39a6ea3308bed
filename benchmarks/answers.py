# SPDX-License-Identifier: Apache-2.0
"""Answers of the bundled model with any cache: the same samples, ordinary ``generate``, scores with paired intervals.

It imports no part of plphp that prunes, so that it also works with a transformers that plphp does not support.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from plphp.evaluation.results.intervals import Resampled, averaged, resample
from plphp.evaluation.running.conversation import Conversation, encode, end_tokens
from plphp.evaluation.tasks.built_in import Task, find_tasks
from plphp.evaluation.tasks.metrics import get_metric
from plphp.evaluation.tasks.task import Sample

MARGIN = 16
"""New tokens allowed beyond 1.5 times the length of the reference, as in `plphp eval`."""


@dataclass(frozen=True)
class Held:
    """What a cache holds right after the prompt.

    Parameters
    ----------
    whole : int
        Bytes of all live tensors of the cache.
    part : int
        Those of them that a script names, such as the vision tokens'.
    """

    whole: int
    part: int


@dataclass(frozen=True)
class Question:
    """A sample in tokens, with the turn that is to be answered.

    Parameters
    ----------
    prompt : dict
        Inputs of the model for the first prompt.
    history : Tensor
        int64 [1, history]; what follows it before the answer: nothing in a first turn.
    limit : int
        Longest answer.
    turn : int
        Number of the turn.
    vision : int
        Vision tokens of the prompt.
    """

    prompt: dict[str, Any]
    history: Tensor
    limit: int
    turn: int
    vision: int

    @property
    def tokens(self) -> int:
        """Tokens of the first prompt."""
        return int(self.prompt["input_ids"].shape[1])


Answer = Callable[[Question], tuple[Sequence[int], Held]]
"""Answers a question: the new tokens, and what was held of the prompt."""


def chosen_samples(count: int, tasks: Sequence[str]) -> Iterator[tuple[Task, Sample]]:
    """So many samples of the test split of some tasks; by default of every task that counts in the mean."""
    for task in find_tasks(tasks or ["all"]):
        if task.scored:
            for sample in task.samples("test", count):
                yield task, sample


def questions(model: Any, processor: Any, sample: Sample) -> list[Question]:
    """The turns of a sample that are scored."""
    conversation: Conversation = encode(processor, sample, end_tokens(model, processor))
    vision = int((conversation.inputs["input_ids"] == model.config.image_token_id).sum())
    return [
        Question(
            conversation.inputs,
            conversation.draft[None, : answer.start],
            int(1.5 * len(answer.tokens)) + MARGIN,
            turn,
            vision,
        )
        for turn, answer in enumerate(conversation.answers)
        if answer.scored
    ]


class Look(LogitsProcessor):
    """Calls a function at the first step of ``generate``: right after the prompt was read."""

    def __init__(self, what: Callable[[], Held]) -> None:
        self.what = what
        self.seen: Held | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.seen is None:
            self.seen = self.what()
        return scores


@torch.inference_mode()
def generated(
    model: Any, question: Question, cache: Mapping[str, Any], held: Callable[[], Held]
) -> tuple[list[int], Held]:
    """Answer a question with the model's own ``generate``.

    Parameters
    ----------
    model : PreTrainedModel
    question : Question
    cache : mapping
        The keyword argument that hands an empty cache to the model.
    held : callable
        Says what the cache holds.
    """
    prompt: dict[str, Any] = question.prompt
    look = Look(held)
    if question.history.shape[1]:  # generate finds the prompt in the cache, and reads only the history
        model(**prompt, **cache, use_cache=True)
        look.seen = held()
        ids = torch.cat([prompt["input_ids"], question.history], 1)
        prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": question.limit}
    tokens = model.generate(**prompt, **cache, **options, logits_processor=LogitsProcessorList([look]))
    assert look.seen is not None
    return tokens[0, prompt["input_ids"].shape[1] :].tolist(), look.seen


def graded(processor: Any, task: Task, sample: Sample, asked: Iterable[Question], answer: Answer) -> tuple[float, Held]:
    """Score of a sample, and what was held of its prompt."""
    metric = get_metric(task.metric)
    scores, seen = [], []
    for question in asked:
        tokens, held = answer(question)
        text = str(processor.decode(tokens, skip_special_tokens=True)).strip()
        scores.append(metric.score(text, sample.accepted_answers(question.turn)))
        seen.append(held)
    return metric.over_turns(scores), seen[0]


class Scores:
    """Scores and bytes of several variants on the same samples.

    Parameters
    ----------
    variants : sequence of str
        The first is what the others are compared with.
    part : str
        What `Held.part` is, a word for names of figures.
    """

    def __init__(self, variants: Sequence[str], part: str) -> None:
        self.variants, self.part = list(variants), part
        self.samples: list[tuple[Task, dict[str, tuple[float, Held]]]] = []
        self.failed: dict[str, str] = {}
        self.failures = dict.fromkeys(variants, 0)
        self.seconds = dict.fromkeys(variants, 0.0)

    def add(self, task: Task, answered: Mapping[str, Callable[[], tuple[float, Held]]]) -> None:
        """Let every variant answer a sample; a variant that fails is left out of the figures, with its first error."""
        outcomes = {}
        for name in self.variants:
            started = time.perf_counter()
            try:
                outcomes[name] = answered[name]()
            except Exception as error:  # whatever a library raises here belongs into the results
                self.failures[name] += 1
                self.failed.setdefault(name, told(error))
            self.seconds[name] += time.perf_counter() - started
        self.samples.append((task, outcomes))

    def results(self) -> dict[str, Any]:
        """For each variant, its score and its difference from the first with 95 % intervals, and what it holds.

        Bytes are means over samples; shares are means of those over the bytes that the first holds of the same prompt.
        """
        names = [name for name in self.variants if not self.failures[name]]
        tasks = {task.name: task for task, _ in self.samples}
        drawn = {}
        for name in tasks:
            of_task = [outcomes for task, outcomes in self.samples if task.name == name]
            drawn[name] = resample([[outcomes[variant][0] for variant in names] for outcomes in of_task], name)
        groups = {}
        for group in dict.fromkeys(task.group for task in tasks.values()):
            groups[group] = averaged([drawn[name] for name, task in tasks.items() if task.group == group])
        overall = averaged(list(drawn.values()))
        rows = [
            {
                "variant": name,
                **_figures(overall, number),
                "groups": {group: _figures(of_group, number) for group, of_group in groups.items()},
                **self._bytes(name),
                "seconds": self.seconds[name],
            }
            for number, name in enumerate(names)
        ]
        failed = {
            name: {"prompts": self.failures[name], "of": len(self.samples), "error": error}
            for name, error in self.failed.items()
        }
        return {"samples": len(self.samples), "results": rows, "failed": failed}

    def _bytes(self, name: str) -> dict[str, float]:
        own = [outcomes[name][1] for _, outcomes in self.samples]
        full = [outcomes[self.variants[0]][1] for _, outcomes in self.samples]
        pairs = list(zip(own, full, strict=True))
        return {
            "bytes": round(statistics.fmean(held.whole for held in own)),
            f"{self.part}_bytes": round(statistics.fmean(held.part for held in own)),
            "share": statistics.fmean(held.whole / whole.whole for held, whole in pairs),
            f"{self.part}_share": statistics.fmean(held.part / whole.part for held, whole in pairs),
        }


def told(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _figures(drawn: Resampled, number: int) -> dict[str, Any]:
    return {"score": drawn.interval(number).to_dict(), "difference": drawn.interval(number, 0).to_dict()}


def cells(row: Mapping[str, Any], part: str) -> tuple[str, ...]:
    """A row of `Scores` as text: score, difference in points with its interval, shares of the bytes."""
    score, change = row["score"]["mean"], row["difference"]
    points = f"{100 * change['mean']:+.1f} ({100 * change['low']:+.1f}, {100 * change['high']:+.1f})"
    return f"{100 * score:.1f}", points, f"{100 * row['share']:.1f}", f"{100 * row[f'{part}_share']:.1f}"


def headings(part: str) -> tuple[str, ...]:
    """Of a table of `cells`."""
    return "variant", "score", "difference", "held %", f"{part} %"
