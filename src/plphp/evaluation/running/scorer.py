# SPDX-License-Identifier: Apache-2.0
"""Score the samples of a run block by block, each in the mode of its task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from plphp.evaluation.settings import EvalSettings
from plphp.evaluation.tasks.task import AnyTask, Sample
from plphp.inputs.loading import load_model
from plphp.policy.evidence import OwnBank

from .answering import decode_sample, generate_samples
from .blocks import Blocks
from .own_banks import by_file
from .scoring import LABEL_FREE_TOKENS, Outcome, label_free, verify
from .skipping import records_of
from .task_choice import TURNS, makers_of, mode_of, resolve_tasks
from .turns import verify_turns
from .variants import Variant, make_variants

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Outcomes = dict[str, Outcome]
"""By the name of the variant."""
Record = tuple[str, dict[str, Any]]
"""Name of a task with the record of a sample, as `records_of` makes it."""


@dataclass(frozen=True)
class Scorer:
    """What scores samples: a model, and the variants that are compared on it.

    Parameters
    ----------
    model : PreTrainedModel
    processor : ProcessorMixin
    settings : EvalSettings
    variants : sequence of Variant
        The first is ``full``.
    """

    model: PreTrainedModel
    processor: Any
    settings: EvalSettings
    variants: Sequence[Variant]

    def records(self, blocks: Blocks) -> Iterator[Record]:
        """Score the samples of blocks, and yield a record for each."""
        for task in resolve_tasks(self.settings):
            makers = makers_of(task, self.settings)
            for block in blocks.get(task.name, []):
                numbered = [(number, makers[number]) for number in block]
                for record in records_of(task.name, numbered, partial(self._score, task)):
                    yield task.name, record

    def _score(self, task: AnyTask, samples: Sequence[Sample]) -> list[Outcomes]:
        mode = mode_of(task, self.settings.mode)
        if mode == "generate":
            return self._generate(task, samples)
        modes = {"verify": self._verify, "label-free": self._label_free, "decode": self._decode, TURNS: self._turns}
        score = modes[mode]
        return [score(task, sample) for sample in samples]

    def _generate(self, task: AnyTask, samples: Sequence[Sample]) -> list[Outcomes]:
        limit = self.settings.max_new_tokens
        return generate_samples(self.model, self.processor, samples, self.variants, task.metric, max_new_tokens=limit)

    def _verify(self, task: AnyTask, sample: Sample) -> Outcomes:
        return verify(self.model, self.processor, sample, self.variants, rows=self.settings.rows)

    def _turns(self, task: AnyTask, sample: Sample) -> Outcomes:
        return verify_turns(self.model, self.processor, sample, self.variants)

    def _label_free(self, task: AnyTask, sample: Sample) -> Outcomes:
        rows, limit = self.settings.rows, self.settings.max_new_tokens or LABEL_FREE_TOKENS
        return label_free(self.model, self.processor, sample, self.variants, rows=rows, max_new_tokens=limit)

    def _decode(self, task: AnyTask, sample: Sample) -> Outcomes:
        rows, limit = self.settings.rows, self.settings.max_new_tokens
        return decode_sample(
            self.model, self.processor, sample, self.variants, task.metric, rows=rows, max_new_tokens=limit
        )


def records_of_worker(
    settings: EvalSettings, names: Sequence[str], banks: Mapping[OwnBank, str], blocks: Blocks
) -> Iterator[Record]:
    """Score blocks in a process of its own, which loads the model itself.

    Parameters
    ----------
    settings : EvalSettings
    names : sequence of str
        Names of the variants that the model can do.
    banks : mapping of OwnBank to str
        Files of the query banks that were collected for the run.
    blocks : dict
        The process's share.
    """
    model, processor = load_model(settings.model, settings.dtype, settings.device)
    made = make_variants(settings.methods, settings.retention)
    variants = [by_file(variant, banks) for variant in made if variant.name in names]
    return Scorer(model, processor, settings, variants).records(blocks)
