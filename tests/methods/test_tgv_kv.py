# SPDX-License-Identifier: Apache-2.0
"""TGV-KV keeps what its paper says, recomputed one number at a time from a stock model's eager attention."""

from __future__ import annotations

import pytest
import torch
from test_methods import FAMILIES, Reading, assert_best, half_up, reading, run

from plphp import ConfigError, PLPHPConfig
from plphp.families.spans import VisionSpans, query_mask
from plphp.methods.registry import resolve
from plphp.methods.tgv_kv import METHOD
from plphp.policy.evidence import LayerScores

pytestmark = pytest.mark.usefixtures("float64")


def text_rows(found: Reading) -> list[int]:
    return [row for row in range(found.images[0][-1] + 1, found.length) if row not in found.vision]


def of_all_heads(found: Reading, layer: int, row: int) -> list[float]:
    heads = [found.of_head(layer, head, row) for head in range(found.kv_heads)]
    return [sum(column) / len(heads) for column in zip(*heads, strict=True)]


def capped(weights: list[float], mean: float) -> list[float]:
    """Rates in proportion to weights, cut at 1 until nothing is left to share out: one layer after the other."""
    rates = [0.0] * len(weights)
    full: set[int] = set()
    while True:
        rest = mean * len(weights) - len(full)
        total = sum(weight for layer, weight in enumerate(weights) if layer not in full)
        rates = [1.0 if layer in full else rest * weight / total for layer, weight in enumerate(weights)]
        above = {layer for layer, rate in enumerate(rates) if rate > 1}
        if not above:
            return rates
        full |= above


@pytest.mark.parametrize("rate", [0.3, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_keeps_what_the_paper_says(family: str, rate: float) -> None:
    found = reading(family)
    rows = text_rows(found)
    assert min(rows) < max(found.vision) < max(rows)  # text between the images counts
    assert min(found.vision) >= 4
    _, layers = run(found, f"tgv_kv:retention_rate={rate}")
    masses = []
    for layer in layers:
        attention = {row: of_all_heads(found, layer.layer, row) for row in rows}
        masses.append(sum(attention[row][j] for row in rows for j in found.vision))
        weights = {
            t: sum(attention[q][t] for q in rows if q >= t) / (len(rows) - number) for number, t in enumerate(rows)
        }
        score = {j: sum(weights[t] * attention[t][j] for t in rows) for j in found.vision}
        heads = layer.rows[0].kept_positions
        assert all(kept == heads[0] for kept in heads)
        assert_best(heads[0], score, half_up(layer.rows[0].rate * len(found.vision)))
    assert [layer.rows[0].rate for layer in layers] == pytest.approx(capped(masses, rate))
    assert len({layer.rows[0].rate for layer in layers}) > 1


def test_sinks_and_the_last_token_are_kept_first() -> None:
    """An image that begins the conversation and one that ends the prompt; the second row has padding before it."""
    segment = torch.tensor([[0, 0, 0, 0, 0, 0, -1, 1, 1, 1], [-1, -1, 0, 0, -1, 0, 0, 0, 1, 1]])
    valid = torch.ones_like(segment, dtype=torch.bool)
    valid[1, :2] = False
    attention = torch.rand(2, 4, 10, generator=torch.Generator().manual_seed(0)).double()
    attention[1, :, :2] = torch.nan
    scores = LayerScores(
        attention,
        segment,
        valid,
        0,
        2,
        weighted_attention=attention,
        token_number=valid.cumsum(1) - 1,
    )
    assert METHOD.kv is not None
    score = METHOD.kv.score(scores, PLPHPConfig(method="tgv_kv"))
    for row, protected in enumerate([{0, 1, 2, 3, 9}, {2, 3, 4, 5, 9}]):
        others = sorted(set(valid[row].nonzero()[:, 0].tolist()) - protected)
        assert score[row][:, sorted(protected)].min() > score[row][:, others].max()
        expected = attention[row].mean(0)[others]
        assert torch.equal(score[row, 0, others].argsort(), expected.argsort())
    later = LayerScores(
        attention, segment, valid, 0, 2, weighted_attention=attention, token_number=valid.cumsum(1) + 20
    )
    assert METHOD.kv.score(later, PLPHPConfig(method="tgv_kv"))[0, 0, :4].max() < 1  # no start of a conversation


def test_heads_that_keep_the_same_do_not_compete() -> None:
    with pytest.raises(ConfigError, match="'tgv_kv' has no scores by which KV heads could compete"):
        resolve(PLPHPConfig(method="tgv_kv", heads="ragged"))


def test_text_after_the_first_image_of_a_turn() -> None:
    """With padding, without images, with an image at the end, and numbers that go on from an earlier turn."""
    segment = torch.tensor(
        [
            [-1, -1, 0, -1, 0, -1, 1, -1],
            [-1, -1, -1, -1, -1, -1, -1, -1],
            [-1, -1, 0, 0, 0, 0, 0, 0],
            [-1, -1, 3, -1, 4, 4, -1, -1],
        ]
    )
    valid = torch.ones_like(segment, dtype=torch.bool)
    valid[1, :3] = False
    spans = VisionSpans(segment, valid, 0, ((None,),) * 4)
    expected = [[5, 7], [3, 4, 5, 6, 7], [7], [3, 6, 7]]
    mask = query_mask(spans, "text_after_first")
    assert [row.nonzero()[:, 0].tolist() for row in mask] == expected
