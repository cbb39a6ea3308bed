# SPDX-License-Identifier: Apache-2.0
"""MixKV (arXiv:2510.20707): importance mixed with diversity, the more of it the more alike the keys of a head are.

It goes on top of a host whose importance a[j] ranks entries. With u_j the key of entry j scaled to length 1, m the mean
of the N of them in a KV head, v_j the values, and scaled(x) = x moved to [0, 1] by its least and its largest value and
then multiplied so that its mean is that of a:

    w    = (N |m|^2 - 1) / (N - 1)                             redundancy of the head: the mean likeness of two keys
    s[j] = w scaled(-u_j . m) + (1 - w) (a[j] + scaled(||v_j||))

Each KV head keeps the best of s.

``host`` says where a comes from: ``window``, the paper's SnapKV (``window``, ``kernel`` and ``pool``, see
`plphp.methods.snapkv`), or ``bank``, the largest attention that a query of the query bank ``bank`` gives (ours, see
`plphp.methods.query_bank`).

Default: host window with SnapKV's defaults of plphp, 16 and 5. The authors' code (Apache-2.0) was read for what the
paper leaves open.

Changed for comparison: vision tokens alone are evicted, and scaled over; those inside the window come first. The
redundancy w is that of the prompt itself, within [0, 1]; the authors' code works it out too, and mixes by means that it
keeps of the head over other prompts. Query heads of a KV head are combined with ``gqa_reduction``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from plphp.errors import ConfigError
from plphp.policy.allocation import uniform
from plphp.policy.evidence import Evidence, LayerScores
from plphp.policy.method import Method
from plphp.policy.rankers import by_peak
from plphp.policy.stages import KVStage
from plphp.settings.config import PLPHPConfig
from plphp.settings.options import Option, settings

from . import _window
from ._window import OPTIONS as WINDOW_OPTIONS
from ._window import by_window

if TYPE_CHECKING:
    from torch import Tensor

OPTIONS = {"host": Option("window", choices=("window", "bank")), "bank": Option(""), **WINDOW_OPTIONS}
SMALLEST = 1e-8
"""Added to what is divided by, as in the authors' code."""


def evidence(config: PLPHPConfig) -> Evidence:
    """What the host looks at, with keys and norms of the values."""
    options = settings(OPTIONS, config.options)
    if options["host"] == "bank":
        return Evidence(bank=options["bank"], peak=True, value_norm=True, states="rows")
    return Evidence(rows=options["window"], value_norm=True, states="rows")


def key_likeness(keys: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """How much each key is like the mean of its KV head, and the redundancy w of the heads.

    Parameters
    ----------
    keys : Tensor
        [batch, kv_heads, seq, dim].
    valid : Tensor
        bool [batch, seq]; the entries that count.

    Returns
    -------
    tuple of Tensor
        float32 [batch, kv_heads, seq] and [batch, kv_heads, 1]; the second is in [0, 1].
    """
    import torch

    unit = torch.nn.functional.normalize(keys.float(), dim=-1).where(valid[:, None, :, None], 0)
    number = valid.sum(1)[:, None, None]
    mean = unit.sum(2) / number
    redundancy = (number * mean.square().sum(-1, keepdim=True) - 1) / (number - 1).clamp(min=1)
    return (unit @ mean[..., None])[..., 0], redundancy.clamp(0, 1)


def scaled(values: Tensor, among: Tensor, mean: Tensor) -> Tensor:
    """Values [batch, kv_heads, seq] moved to [0, 1] and multiplied to a ``mean`` [batch, kv_heads, 1].

    Both go by the entries ``among``, bool [batch, 1, seq].
    """
    import torch

    least = values.where(among, torch.inf).amin(-1, keepdim=True)
    most = values.where(among, -torch.inf).amax(-1, keepdim=True)
    share = (values - least) / (most - least + SMALLEST)
    return share * (mean / (_mean(share, among) + SMALLEST))


def score(scores: LayerScores, config: PLPHPConfig) -> Tensor:
    """The score s of the module's docstring."""
    import torch

    by_bank = settings(OPTIONS, config.options)["host"] == "bank"
    importance = by_peak(scores, config) if by_bank else by_window(scores, config)
    in_window = scores.need("queries").cumsum(1) > 0
    among = scores.vision if by_bank else scores.vision & ~in_window
    among = among[:, None]
    likeness, redundancy = key_likeness(scores.need_states().keys, scores.valid)
    mean = _mean(importance, among)
    diversity = scaled(-likeness, among, mean)
    important = importance + scaled(scores.need("value_norm"), among, mean)
    mixed = redundancy * diversity + (1 - redundancy) * important
    # What is not among them has nothing to say, or is in the window and comes first of all.
    return mixed.where(among, 0 if by_bank else torch.inf)


def _mean(values: Tensor, among: Tensor) -> Tensor:
    """Mean over the entries ``among``, bool [batch, 1, seq]; 0 where there is none."""
    return values.where(among, 0).sum(-1, keepdim=True) / among.sum(-1, keepdim=True).clamp(min=1)


def check(config: PLPHPConfig, layers: int) -> None:
    """A bank goes with the host that asks with it, and a window with the other."""
    options = settings(OPTIONS, config.options)
    if options["host"] == "window":
        if options["bank"]:
            raise ConfigError("mixkv asks with a query bank where its host is that: add host=bank, or leave bank out.")
        _window.check(config, layers)
        return
    if not options["bank"]:
        raise ConfigError(
            "mixkv:host=bank needs queries of the model's answers: collect them with `plphp collect` and give their "
            "file, as in 'mixkv:host=bank,bank=bank.safetensors'; the bundled model's is 'bank=bundled'."
        )
    of_window = [name for name in WINDOW_OPTIONS if name in config.options]
    if of_window or config.query_rows is not None:
        names = ", ".join([*of_window, *(["query_rows"] if config.query_rows is not None else [])])
        raise ConfigError(f"mixkv:host=bank asks with the queries of its bank and of no window: leave out {names}.")
    from plphp.policy.bank import check_depth

    check_depth(options["bank"], layers)


METHOD = Method(
    name="mixkv",
    summary="every KV head keeps what its host finds important, mixed with keys unlike the rest where they are alike",
    paper="arXiv:2510.20707",
    kv=KVStage(allocate=uniform, score=score, evidence=evidence),
    options=OPTIONS,
    check=check,
)
