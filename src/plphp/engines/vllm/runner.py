# SPDX-License-Identifier: Apache-2.0
"""The only methods of vLLM that are wrapped: two of the model runner's.

An attention backend gets tensors over a whole pass, and nothing in them says which request a row belongs to. The runner
knows, and the metadata are built in a call of its own: while that call runs, a context variable holds the pass
(`plphp.engines.vllm.step.running`), where the metadata builder of each layer takes it from.

A bank that the server collects by itself needs the model, which no KV connector gets to see: the runner has it, and
makes the KV cache last of all before the first request.
"""

from __future__ import annotations

import functools
from typing import Any

from plphp.policy.bank_folder import BankModel
from plphp.policy.chain import Chain
from plphp.pruning.own_bank import BankCollection

from .checkpoint import files_hash, weight_files
from .own_bank import OwnBankCollector
from .rotations import find_rotations
from .state import Pruning
from .step import running, step_of


def attach_to_runner() -> None:
    """Let the model runner announce its model and which requests a pass holds; further calls change nothing."""
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

    initialize = GPUModelRunner.initialize_kv_cache

    @functools.wraps(initialize)
    def initialize_own_bank(runner: Any, *args: Any, **kwargs: Any) -> Any:
        result = initialize(runner, *args, **kwargs)
        pruning = _pruning()
        if pruning is not None and pruning.own_bank is None:
            pruning.own_bank = own_bank_of(runner, pruning.setup.chain)
        return result

    build_within_step.plphp = True  # type: ignore[attr-defined]
    GPUModelRunner._build_attention_metadata = build_within_step
    GPUModelRunner.initialize_kv_cache = initialize_own_bank


def own_bank_of(runner: Any, chain: Chain) -> OwnBankCollector | None:
    """The collector of the bank that a chain asks the engine to collect, None if it asks for none.

    Parameters
    ----------
    runner : vllm.v1.worker.gpu_model_runner.GPUModelRunner
        Holds the model.
    chain : Chain
        What is done at each stage.

    Raises
    ------
    ConfigError
        If the bank that is kept in the folder cannot be used.
    UnsupportedFeatureError, UnsupportedModelError
        If it is not known from which files the model was loaded, or how it rotates its queries.
    """
    wanted = chain.own_bank
    if wanted is None:
        return None
    config = runner.model_config
    text = config.hf_text_config
    digest = files_hash(weight_files(runner)) if wanted.folder else ""
    model = BankModel(config.hf_config.model_type, text.num_hidden_layers, digest)
    rotations = find_rotations(runner)
    return OwnBankCollector(BankCollection(wanted, model), rotations, text.num_attention_heads, config.get_head_size())


def _pruning() -> Pruning | None:
    """The state of the worker in this process, which its KV connector holds."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    connector = get_kv_transfer_group() if has_kv_transfer_group() else None
    return getattr(connector, "pruning", None)
