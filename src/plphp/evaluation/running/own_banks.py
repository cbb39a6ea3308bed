# SPDX-License-Identifier: Apache-2.0
"""The query banks of methods that have none: collected once, before anything is scored, and kept with the results."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plphp.engines.hf.session import prune
from plphp.errors import ConfigError, LoadError, NonFiniteAttentionError, PLPHPError, SpanError, UnsupportedModelError
from plphp.evaluation.results.store import read_config
from plphp.evaluation.settings import EvalSettings
from plphp.evaluation.tasks.choices import Split
from plphp.evaluation.tasks.drawn import DrawnTask
from plphp.evaluation.tasks.task import AnyTask, Maker
from plphp.inputs.prompt import on_device
from plphp.methods.registry import chain_of, with_bank
from plphp.policy.bank import QueryBank
from plphp.policy.evidence import OwnBank
from plphp.settings.config import PLPHPConfig

from .conversation import prompt_inputs
from .forcing import generate_greedily
from .skipping import end_unless_of_sample
from .variants import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("plphp")

LONGEST = 128
"""Longest answer that is collected from, in tokens, where the settings name no limit."""
SPARE = 4
"""Prompts of each task that are tried at most, for each that is wanted in all."""
OF_RUN = "collected"
"""What a bank's record says, beside the bank itself: for which run, and from which samples."""


class RunBanks:
    """The banks of a run. Variants that ask for the same share one, whatever they retain.

    Parameters
    ----------
    folder : Path
        Of the run; a bank is kept there as ``query_bank_<prompts>.safetensors``, for its workers and for a later run
        that goes on with it.
    tasks : sequence of AnyTask
        They are asked in turn.
    settings : EvalSettings
    weights_sha256 : str
        Hash of the model's weights.

    Attributes
    ----------
    files : dict of OwnBank to str
        The files of the banks that are there.
    """

    def __init__(self, folder: Path, tasks: Sequence[AnyTask], settings: EvalSettings, weights_sha256: str) -> None:
        self._folder, self._tasks, self._settings = folder, tasks, settings
        self._weights = weights_sha256
        self.files: dict[OwnBank, str] = {}
        self._failed: dict[OwnBank, PLPHPError] = {}

    def named(self, model: PreTrainedModel, processor: Any, variant: Variant) -> Variant:
        """The variant with the bank that it asks for, which is collected if it is not there yet.

        Raises
        ------
        ConfigError, UnsupportedModelError
            If there are too few answers, or the model's queries cannot be turned; the same again in a folder whose
            evaluation could not collect the bank.
        LoadError
            If the folder holds another bank, or an evaluation that has lost its bank.
        """
        wanted = chain_of(variant.config).own_bank
        if wanted is None:
            return variant
        if wanted in self._failed:
            raise self._failed[wanted]
        if wanted not in self.files:
            try:
                self.files[wanted] = str(self._made(model, processor, wanted, variant))
            except (ConfigError, UnsupportedModelError) as error:
                self._failed[wanted] = error
                raise
        return by_file(variant, self.files)

    def records(self) -> dict[str, dict[str, Any]]:
        """What is known of each bank, by the name of its file: the configuration of the run holds it."""
        banks = {Path(file).name: QueryBank.load(file) for file in self.files.values()}
        return {name: dict(bank.record) for name, bank in sorted(banks.items())}

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each file, by its name."""
        files = map(Path, self.files.values())
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    def _made(self, model: PreTrainedModel, processor: Any, wanted: OwnBank, variant: Variant) -> Path:
        file = self._file(wanted)
        about = self._about(wanted)
        if file.exists():
            self._check(file, about)
            return file
        self._refuse_to_add(file, variant)
        bank, samples = self._collected(model, processor, wanted, variant.config)
        self._folder.mkdir(parents=True, exist_ok=True)
        record = {**bank.record, "weights_sha256": self._weights, OF_RUN: {**about, "samples": samples}}
        dataclasses.replace(bank, record=record).save(file)
        return file

    def _file(self, wanted: OwnBank) -> Path:
        return self._folder / f"query_bank_{wanted.prompts}.safetensors"

    def _refuse_to_add(self, file: Path, variant: Variant) -> None:
        """Raise where the folder holds an evaluation already: a bank that is collected now is none of its own."""
        if not (self._folder / "config.json").exists():
            return
        config = read_config(self._folder)
        reason = config.get("refused", {}).get(variant.name)
        if reason is not None and file.name not in config.get("query_banks", {}):
            raise ConfigError(reason)
        raise LoadError(f"{self._folder} holds an evaluation without the query bank {file.name}: name another folder.")

    def _about(self, wanted: OwnBank) -> dict[str, Any]:
        """What has to be the same for a bank to be that of the run, beside the weights."""
        split, seed = unscored(self._settings)
        return {
            "prompts": wanted.prompts,
            "split": split,
            "seed": seed,
            "max_new_tokens": self._settings.max_new_tokens or LONGEST,
            "tasks": [task.name for task in self._tasks],
        }

    def _check(self, file: Path, about: Mapping[str, Any]) -> None:
        try:
            record = QueryBank.load(file).record
        except ConfigError as error:
            raise LoadError(f"The query bank of the run cannot be read. {error}") from error
        collected = record.get(OF_RUN, {})
        if record.get("weights_sha256") != self._weights or any(collected.get(name) != about[name] for name in about):
            raise LoadError(
                f"{file} is a query bank of another evaluation, or of another model: name another folder for this one."
            )

    def _collected(
        self, model: PreTrainedModel, processor: Any, wanted: OwnBank, config: PLPHPConfig
    ) -> tuple[QueryBank, dict[str, list[int]]]:
        """A complete bank, and the numbers of the samples whose answers it is of, by task."""
        samples: dict[str, list[int]] = {}
        answered = collected = 0
        with prune(model, config) as run:
            for task, number, inputs in self._prompts(processor, wanted.prompts):
                if run.bank is not None:
                    break
                try:
                    generate_greedily(model, on_device(model, inputs), self._settings.max_new_tokens or LONGEST)
                except (SpanError, NonFiniteAttentionError) as error:
                    log.warning("%s, sample %d gives nothing to the query bank: %s", task, number, error)
                    continue
                answered += 1
                progress = run.report.collecting
                if progress is not None and progress.collected > collected:  # else the answer counts for nothing
                    samples.setdefault(task, []).append(number)
                    collected = progress.collected
            bank = run.bank
        if bank is None:
            raise ConfigError(
                f"The tasks have too few prompts to collect a query bank of {wanted.prompts} from: {answered} were "
                "answered, and answers of a single token do not count. Ask for fewer (collect=), or for more tasks."
            )
        return bank, samples

    def _prompts(self, processor: Any, count: int) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """Inputs of ``generate`` with the task and the number of the sample, the tasks in turn."""
        most = SPARE * count  # some cannot be read, and some have an answer of one token
        makers = {task.name: _makers(task, self._settings, most) for task in self._tasks}
        for number in range(most):
            for task, of_task in makers.items():
                if number >= len(of_task):
                    continue
                try:
                    inputs = prompt_inputs(processor, of_task[number]())
                except PLPHPError as error:
                    end_unless_of_sample(error, task, number)
                    log.warning("%s, sample %d gives nothing to the query bank: %s", task, number, error)
                    continue
                yield task, number, inputs


def refuse_folders(variants: Iterable[Variant]) -> None:
    """Raise `ConfigError` for a method that names a folder for its bank.

    A bank that is there already would be of samples that nobody knows, and one that is not complete would be filled up
    with answers to the tasks.
    """
    for variant in variants:
        wanted = chain_of(variant.config).own_bank
        if wanted is not None and wanted.folder:
            raise ConfigError(
                f"{variant.name} names the folder {wanted.folder!r} for its query bank, and plphp eval collects a bank "
                "for the run alone and keeps it with the results: leave out folder=, or give the file of a bank "
                "(bank=FILE)."
            )


def by_file(variant: Variant, files: Mapping[OwnBank, str]) -> Variant:
    """The variant with the file of the bank that it asks for, if it asks for any."""
    wanted = chain_of(variant.config).own_bank
    if wanted is None:
        return variant
    return dataclasses.replace(variant, config=with_bank(variant.config, files[wanted]))


def unscored(settings: EvalSettings) -> tuple[Split, int]:
    """Split and seed of samples of the built-in tasks that the run does not score."""
    return ("dev", settings.seed) if settings.split == "test" else ("dev", settings.seed + 1)


def _makers(task: AnyTask, settings: EvalSettings, count: int) -> Sequence[Maker]:
    """Makers of the first samples; data of the user has no others, so that they are scored as well."""
    split, seed = unscored(settings) if isinstance(task, DrawnTask) else (settings.split, settings.seed)
    return task.sample_makers(split, count, seed)
