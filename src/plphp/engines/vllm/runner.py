# SPDX-License-Identifier: Apache-2.0
"""The one place where a method of vLLM is wrapped: the model runner, before it builds the metadata of a pass.

Nothing else that an attention backend is given says which request a row of a pass belongs to.
"""

from __future__ import annotations

import functools
from typing import Any

from .state import Pruning
from .step import running, step_of


def attach_to_runner() -> None:
    """Let the model runner say which requests a pass holds; more than once is as good as once."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    build = GPUModelRunner._build_attention_metadata
    if getattr(build, "plphp", False):
        return

    @functools.wraps(build)
    def build_and_tell(runner: Any, *args: Any, **kwargs: Any) -> Any:
        pruning, tokens = _pruning(), kwargs.get("num_scheduled_tokens")
        if pruning is None or tokens is None:  # a pass without requests warms up or takes measure
            return build(runner, *args, **kwargs)
        with running(step_of(runner, pruning, tokens)):
            return build(runner, *args, **kwargs)

    build_and_tell.plphp = True  # type: ignore[attr-defined]
    GPUModelRunner._build_attention_metadata = build_and_tell


def _pruning() -> Pruning | None:
    """The state of this process' worker."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    connector = get_kv_transfer_group() if has_kv_transfer_group() else None
    return getattr(connector, "pruning", None)
