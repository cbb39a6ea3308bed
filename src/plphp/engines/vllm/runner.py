# SPDX-License-Identifier: Apache-2.0
"""The only method of vLLM that is wrapped: the model runner's, which builds the metadata of a pass.

An attention backend gets tensors over a whole pass, and nothing in them says which request a row belongs to. The runner
knows, and the metadata are built in a call of its own: while that call runs, a context variable holds the pass
(`plphp.engines.vllm.step.running`), where the metadata builder of each layer takes it from.
"""

from __future__ import annotations

import functools
from typing import Any

from .state import Pruning
from .step import running, step_of


def attach_to_runner() -> None:
    """Let the model runner announce which requests a pass holds; further calls change nothing."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    build = GPUModelRunner._build_attention_metadata
    if getattr(build, "plphp", False):
        return

    @functools.wraps(build)
    def build_within_step(runner: Any, *args: Any, **kwargs: Any) -> Any:
        pruning, tokens = _pruning(), kwargs.get("num_scheduled_tokens")
        if pruning is None or tokens is None:  # a pass without requests warms up or measures memory
            return build(runner, *args, **kwargs)
        with running(step_of(runner, pruning, tokens)):
            return build(runner, *args, **kwargs)

    build_within_step.plphp = True  # type: ignore[attr-defined]
    GPUModelRunner._build_attention_metadata = build_within_step


def _pruning() -> Pruning | None:
    """The state of the worker in this process, which its KV connector holds."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    connector = get_kv_transfer_group() if has_kv_transfer_group() else None
    return getattr(connector, "pruning", None)
