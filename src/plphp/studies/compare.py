# SPDX-License-Identifier: Apache-2.0
"""Unpruned beside pruned: the same prompt and settings, in turns, so that load on the machine hits both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from plphp.engines.hf.cache import PrunedCache
from plphp.engines.hf.cache_argument import NAMES, passed
from plphp.engines.hf.layer import layer_nbytes
from plphp.errors import ConfigError
from plphp.methods.registry import chain_of
from plphp.pruning.report import PruneReport
from plphp.settings.checks import check_int
from plphp.settings.config import PLPHPConfig, checked

OWN_ARGUMENTS = (*NAMES, "logits_processor", "streamer", "return_dict_in_generate")
"""Arguments of ``generate`` that are not for the caller of `compare` to set."""


@dataclass(frozen=True)
class Run:
    """Answers to a prompt, unpruned or pruned, with what they took.

    Parameters
    ----------
    texts : list of str
        The answer of each row, without special tokens.
    tokens : list of list of int
        Generated tokens of each row.
    kv_bytes : int
        Bytes of the entries of the KV cache right after the prompt was read.
    prefill_seconds : float
        Median time to the first token.
    seconds_per_token : float, optional
        Median time of a decode step, prefill excluded; None where the answer is a single token.
    """

    texts: list[str]
    tokens: list[list[int]]
    kv_bytes: int
    prefill_seconds: float
    seconds_per_token: float | None


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured.

    Parameters
    ----------
    unpruned, pruned : Run
        The answers without and with pruning.
    report : PruneReport
        What the pruned run kept, right after the prompt was read: both caches held the same tokens then, however
        long the answers are.
    """

    unpruned: Run
    pruned: Run
    report: PruneReport

    @property
    def same_tokens(self) -> bool:
        """Whether both runs generated the same tokens."""
        return self.unpruned.tokens == self.pruned.tokens

    @property
    def kv_reduction(self) -> float:
        """Fraction of the prompt's KV bytes that is gone, as in the report."""
        return self.report.kv_reduction

    @property
    def speedup(self) -> float | None:
        """Unpruned over pruned decode time per token; None where there was no decode step."""
        if self.unpruned.seconds_per_token is None or self.pruned.seconds_per_token is None:
            return None
        return self.unpruned.seconds_per_token / self.pruned.seconds_per_token


def compare(
    model: PreTrainedModel,
    processor: Any,
    inputs: Mapping[str, Any],
    config: PLPHPConfig | None = None,
    *,
    rounds: int = 3,
    seed: int = 0,
    decode: str = "eager",
    progress: Callable[[str], None] = lambda step: None,
    **generation: Any,
) -> Comparison:
    """Answer a prompt unpruned and pruned, in turns, and measure both.

    Parameters
    ----------
    model : PreTrainedModel
        A supported model, in evaluation mode, outside any plphp session.
    processor : ProcessorMixin
        Processor of the model, which decodes the answers.
    inputs : mapping
        Inputs of ``generate``, see `plphp.inputs.prompt.build_inputs`.
    config : PLPHPConfig, optional
        Settings of the pruned run; default: every vision entry in 3 bits, ``quantized:tiers=c3``.
    rounds : int
        How often each of the two runs; times are medians over the steps of all rounds.
    seed : int
        Seed of the sampling, the same for both runs; the random state of the caller is left alone.
    decode : {"eager", "auto", "graph"}
        How the pruned run decodes, see `plphp.prune`.
    progress : callable
        Called with what is going on, in a few words.
    **generation
        Further arguments of ``generate``, the same for both runs.

    Returns
    -------
    Comparison

    Raises
    ------
    ConfigError
        If ``rounds`` or ``seed`` cannot be, or ``generation`` holds something that the comparison sets itself.
    UnsupportedFeatureError
        If the method has yet to collect its query bank.
    """
    _check(config, rounds, seed, generation)
    unpruned, pruned = Meter(model.device), Meter(model.device)
    for number in range(1, rounds + 1):
        progress(f"round {number} of {rounds}, unpruned")
        plain = DynamicCache(config=model.config.get_text_config(decoder=True))
        unpruned.run(model, inputs, plain, seed, generation)
        progress(f"round {number} of {rounds}, pruned")
        cache = PrunedCache.for_inputs(model, inputs, config, decode=decode)
        pruned.run(model, inputs, cache, seed, generation)
        del cache, plain  # the next round starts from a model without plphp, and memory holds a single cache
    assert pruned.report is not None
    return Comparison(unpruned.result(processor), pruned.result(processor), pruned.report)


def _check(config: PLPHPConfig | None, rounds: int, seed: int, generation: Mapping[str, Any]) -> None:
    check_int("rounds", rounds, minimum=1)
    check_int("seed", seed, minimum=0)
    taken = sorted(set(generation) & set(OWN_ARGUMENTS))
    if taken:
        raise ConfigError(f"compare sets {', '.join(taken)} itself: leave it out.")
    chain_of(checked(config)).refuse_uncollected("A comparison")


class Meter(LogitsProcessor):
    """Sees every step of ``generate``: notes the time, and after the prompt what the cache holds.

    A logits processor, as ``generate`` calls it right after each pass of the model and with any kind of cache.

    Parameters
    ----------
    device : torch.device
        The model's, whose work has to end before a time is noted.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tokens: list[list[int]] = []
        self.kv_bytes = 0
        self.report: PruneReport | None = None
        self.prefills: list[float] = []
        self.steps: list[float] = []
        self._cache: Any = None
        self._last = 0.0
        self._in_prompt = False

    def run(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Any],
        cache: Any,
        seed: int,
        generation: dict[str, Any],
    ) -> None:
        """Answer a prompt with a cache; the answer of the first run is kept, and the times of all."""
        inputs = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            self._cache, self._in_prompt, self._last = cache, True, self._now()
            generate: Any = model.generate
            output = generate(**inputs, **generation, **passed(cache), logits_processor=LogitsProcessorList([self]))
        self._cache = None
        if not self.tokens:
            self.tokens = output[:, inputs["input_ids"].shape[1] :].tolist()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        now = self._now()
        (self.prefills if self._in_prompt else self.steps).append(now - self._last)
        if self._in_prompt:
            self._in_prompt = False
            self._look_at_cache()
            now = self._now()  # the look at the cache belongs to no step
        self._last = now
        return scores

    def _look_at_cache(self) -> None:
        if isinstance(self._cache, PrunedCache):
            self.report = self._cache.report()
            self.kv_bytes = self.report.entry_bytes
        else:
            self.kv_bytes = kv_bytes(self._cache)

    def result(self, processor: Any) -> Run:
        """The answer and what it took."""
        return Run(
            texts=[text.strip() for text in processor.batch_decode(self.tokens, skip_special_tokens=True)],
            tokens=self.tokens,
            kv_bytes=self.kv_bytes,
            prefill_seconds=statistics.median(self.prefills),
            seconds_per_token=statistics.median(self.steps) if self.steps else None,
        )

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # what was launched so far belongs to the step
        return time.perf_counter()


def kv_bytes(cache: Any) -> int:
    """Bytes of the live tensors of a `PrunedCache` or of transformers' ``DynamicCache``."""
    return sum(layer_nbytes(layer) for layer in cache.layers)
