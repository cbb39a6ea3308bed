# SPDX-License-Identifier: Apache-2.0
"""What the commands that measure a model on prompts share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plphp.inputs.prompts_file import Prompt


def fitting_processor(model: str | None, prompts: Sequence[Prompt], tell: Callable[[str], None]) -> Any:
    """Load a model's processor; a prompt that does not fit the model is found here, before the weights are read."""
    from plphp.inputs.loading import load_processor
    from plphp.inputs.prompts_file import prompt_inputs

    tell("loading the processor")
    processor = load_processor(model)
    next(prompt_inputs(processor, prompts[:1]))
    return processor
