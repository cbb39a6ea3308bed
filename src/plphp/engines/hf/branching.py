# SPDX-License-Identifier: Apache-2.0
"""One prompt, read once, as a cache with one row for each of several configs.

The prompt is read whole and scored for every distinct question (`plphp.engines.hf.branch_reading`); then each config
says what it keeps, and all of that becomes the rows of one cache (`plphp.engines.hf.branch_rows`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plphp.errors import ConfigError, UnsupportedFeatureError
from plphp.methods.registry import chain_of
from plphp.policy.chain import Chain
from plphp.settings.config import PLPHPConfig, checked

from .attachment import Lease
from .branch_reading import plan_whole, read_and_score, readings_of
from .branch_rows import decided_rows, kept_shares, merged_rows, prefilled_row, scored_alike
from .cache import NOTHING_EVICTED, PrunedCache
from .refusals import refuse_stages


@dataclass(frozen=True)
class Branches:
    """What `branch` returns; lists have one entry per config.

    Parameters
    ----------
    configs : tuple of PLPHPConfig
        The settings, in the order in which they were passed.
    cache : PrunedCache
        Row i holds the prompt pruned by ``configs[i]``, for ``model(input_ids=..., **passed(cache))`` with as
        many rows. Its own config prunes nothing; its report has the rows as they are.
    logits : Tensor
        [configs, vocab]; the logits of the next token after the prompt. They differ only for methods that act
        inside prefill.
    vision_kept : list of float
        Vision entries kept, as a fraction of all, over the full-attention layers and their KV heads.
    kept : list of float
        Vision and text entries kept, as a fraction of all, over the same layers and heads.
    layer_kept : list of dict of int to float
        By decoder layer, the vision entries kept as a fraction of all.
    """

    configs: tuple[PLPHPConfig, ...]
    cache: PrunedCache
    logits: Tensor
    vision_kept: list[float]
    kept: list[float]
    layer_kept: list[dict[int, float]]


@torch.no_grad()
def branch(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    configs: Sequence[PLPHPConfig],
    *,
    answer_ids: Tensor | None = None,
) -> Branches:
    """Read one prompt once, and prune it by several configs side by side.

    Scores, rates and kept entries are those that `plphp.prune` finds for each config. Methods that act inside prefill
    read the prompt once more each.

    Parameters
    ----------
    model : PreTrainedModel
        A supported vision-language model, in evaluation mode.
    inputs : mapping
        What is passed to ``model(...)``, with one row and no padding.
    configs : sequence of PLPHPConfig
        At least one.
    answer_ids : Tensor, optional
        int64 [answer]; the answer that the method ``oracle`` ranks by. It is read after the prompt, all but its last
        token, and forgotten again.

    Returns
    -------
    Branches
        While its cache is alive the model's text layers use plphp's attention function. A model with m-RoPE places
        what comes next by the prompt that it read last: go on with the cache before it reads another prompt.

    Raises
    ------
    SpanError
        If the prompt has several rows, padding or no vision token.
    ConfigError, UnsupportedModelError, UnsupportedFeatureError

    Examples
    --------
    >>> configs = [PLPHPConfig(method=name, retention_rate=0.25) for name in ("plphp", "random")]
    >>> branches = plphp.branch(model, inputs, configs)  # doctest: +SKIP
    >>> draft = torch.tensor(answer)[None].expand(len(configs), -1)  # doctest: +SKIP
    >>> logits = model(input_ids=draft, **passed(branches.cache)).logits  # doctest: +SKIP
    """
    configs = tuple(checked(config) for config in configs)
    if not configs:
        raise ConfigError("branch needs at least one config, got none.")
    lease = Lease.of(model)
    try:
        return _branch(model, lease, dict(inputs), configs, answer_ids)
    except BaseException:
        # The traceback holds this frame, so the model would stay attached as long as the error is kept.
        lease.end()
        raise


def _refuse_budget(chain: Chain) -> None:
    """Raise for a config whose images are to fade over the turns of a conversation."""
    if chain.kv.config.vision_budget is not None:
        raise UnsupportedFeatureError(
            f"plphp.branch reads one prompt, and vision_budget={chain.kv.config.vision_budget} is for conversations, "
            "whose images fade: leave it out, or use a PrunedCache."
        )


def _branch(
    model: PreTrainedModel,
    lease: Lease,
    inputs: dict[str, Any],
    configs: tuple[PLPHPConfig, ...],
    answer_ids: Tensor | None,
) -> Branches:
    reader = PrunedCache(lease.attachment, NOTHING_EVICTED)
    spans = plan_whole(reader, inputs)
    chains = [chain_of(config, len(reader.layers)) for config in configs]
    for chain in chains:
        chain.refuse_uncollected("plphp.branch")
        _refuse_budget(chain)
        refuse_stages(chain, model)
    readings = readings_of(reader, spans, chains, answer_ids)
    logits = read_and_score(reader, spans, readings, inputs, answer_ids)

    groups = scored_alike(readings, configs)
    decided = [decided_rows(reading, [chains[i] for i in numbers], spans, model.device) for reading, numbers in groups]
    # Inside prefill the later layers see fewer tokens than those of the shared pass: such a config reads by itself.
    inside_prefill = [number for number, reading in enumerate(readings) if reading is None]
    prefilled = [prefilled_row(lease.attachment, inputs, configs[number]) for number in inside_prefill]

    # Rows come group by group and are put back into the order of the configs.
    as_merged = [*(number for _, numbers in groups for number in numbers), *inside_prefill]
    order = [as_merged.index(number) for number in range(len(configs))]
    cache = merged_rows(reader, decided, [layers for layers, _ in prefilled], order)
    cache._lease = lease  # from here on the model is attached as long as the cache is alive
    own_logits = dict(zip(inside_prefill, [own for _, own in prefilled], strict=True))
    layer_kept, kept = kept_shares(cache, int(spans.vision.sum()), spans.end)
    return Branches(
        configs,
        cache,
        torch.cat([own_logits.get(number, logits) for number in range(len(configs))]),
        [sum(row.values()) / len(row) for row in layer_kept],
        kept,
        layer_kept,
    )
