# SPDX-License-Identifier: Apache-2.0
"""What a task's ``generation_kwargs`` mean for ``generate``, and where its stop strings end an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from plphp.errors import ConfigError, did_you_mean

LONGEST = 1024
"""New tokens where a task names no limit, as in lmms-eval's models behind an address."""
PASSED = ("max_new_tokens", "min_new_tokens", "num_beams", "length_penalty", "repetition_penalty")
SAMPLING = ("temperature", "top_p", "top_k", "min_p")
"""What ``generate`` takes beside, where it samples."""
NOT_OURS = ("image_aspect_ratio", "visual_cot", "max_agentic_steps")
"""For the first LLaVA's own code, and for lmms-eval itself."""
DELIMITER = "\n\n"
"""What lmms-eval sets between examples. It is put among the stops of every task that names none, where a chat has no
use for it: an answer may hold an empty line. lmms-eval's own models leave it out as well."""


@dataclass(frozen=True)
class Generation:
    """How the answers of a task are generated.

    Parameters
    ----------
    options : dict
        Keyword arguments of ``generate``.
    stops : tuple of str
        Texts at which an answer ends; they are no part of it.
    """

    options: dict[str, Any] = field(default_factory=dict)
    stops: tuple[str, ...] = ()

    def criteria(self, processor: Any, prompt: int) -> dict[str, Any]:
        """The keyword argument by which ``generate`` ends rows at the stops; none where there are no stops.

        Parameters
        ----------
        processor : ProcessorMixin
            Processor of the model.
        prompt : int
            Tokens of the prompt.
        """
        if not self.stops:
            return {}
        return {"stopping_criteria": StoppingCriteriaList([StopsIn(processor, prompt, self.stops)])}

    def cut(self, text: str) -> str:
        """The text up to the first stop, without white space around it."""
        ends = [text.index(stop) for stop in self.stops if stop in text]
        return text[: min(ends, default=len(text))].strip()


class StopsIn(StoppingCriteria):  # type: ignore[misc, unused-ignore]
    """Ends a row as soon as its answer holds a stop string.

    transformers' own ``stop_strings`` look at the end of the prompt as well, where a stop such as ``"\\n"`` may stand.
    """

    def __init__(self, processor: Any, prompt: int, stops: Sequence[str]) -> None:
        self._processor, self._prompt, self._stops = processor, prompt, stops

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        answers = [text_of(self._processor, tokens) for tokens in input_ids[:, self._prompt :]]
        stopped = [any(stop in answer for stop in self._stops) for answer in answers]
        return torch.tensor(stopped, dtype=torch.bool, device=input_ids.device)


def text_of(processor: Any, tokens: Tensor) -> str:
    """The text of an answer, without special tokens."""
    return str(processor.decode(tokens, skip_special_tokens=True))


def read_generation(kwargs: Mapping[str, Any]) -> Generation:
    """Read a task's ``generation_kwargs``.

    Decoding is greedy unless the task names a temperature above 0 or asks for samples.

    Parameters
    ----------
    kwargs : mapping
        As the task or ``--gen_kwargs`` names them.

    Raises
    ------
    ConfigError
        If one of them is unknown, so that answers would be other than the task wants them, or no stop string.
    """
    values = {name: value for name, value in kwargs.items() if value is not None and name not in NOT_OURS}
    until = values.pop("until", ())
    stops = (until,) if isinstance(until, str) else tuple(until)
    if not all(isinstance(stop, str) or stop is None for stop in stops):
        raise ConfigError(f"until must be a text or a list of texts, got {until!r}.")
    for name in values:
        if name not in (*PASSED, *SAMPLING, "do_sample"):
            known = (*PASSED, *SAMPLING, "do_sample", "until")
            raise ConfigError(f"plphp cannot do what generation_kwargs ask for by {name!r}.{did_you_mean(name, known)}")
    temperature = float(values.get("temperature", 0 if not values.get("do_sample") else 1))
    samples = temperature > 0 and bool(values.get("do_sample", True))
    options: dict[str, Any] = {"max_new_tokens": LONGEST, "num_beams": 1, "do_sample": samples}
    options |= {name: values[name] for name in PASSED if name in values}
    if samples:
        options |= {name: values[name] for name in SAMPLING if name in values}
    return Generation(options, tuple(stop for stop in stops if stop and stop != DELIMITER))
