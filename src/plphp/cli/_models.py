# SPDX-License-Identifier: Apache-2.0
"""Load a model for a command: what can be wrong with prompts comes before its weights, which may take minutes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ._app import note_on_bundled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from plphp.inputs.prompts_file import Prompt


def processor_for_prompts(model: str | None, prompts: Sequence[Prompt], show: Callable[[str], None]) -> Any:
    """Load a model's processor, and make the inputs of the first prompt with it: a prompt may not fit the model."""
    from plphp.inputs.loading import load_processor
    from plphp.inputs.prompts_file import prompt_inputs

    show("loading the processor")
    processor = load_processor(model)
    next(prompt_inputs(processor, prompts[:1]))
    return processor


def weights_of(model: str | None, dtype: str, device: str | None, *, quiet: bool) -> PreTrainedModel:
    """Load a model without its processor, with a note on the bundled model and the bars of transformers and the hub."""
    from plphp.inputs.loading import load_weights

    note_on_bundled(model, quiet=quiet)
    with _loading_bars(quiet):
        return load_weights(model, dtype, device)


@contextlib.contextmanager
def _loading_bars(quiet: bool) -> Iterator[None]:
    """Let transformers and the hub show their own bars in a terminal: of a download they say more than a spinner."""
    from transformers.utils import logging

    if quiet or not sys.stderr.isatty():
        yield
        return
    logging.enable_progress_bar()
    try:
        yield
    finally:
        logging.disable_progress_bar()
