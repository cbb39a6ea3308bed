# SPDX-License-Identifier: Apache-2.0
"""AdaKV's budgets over SnapKV, from Algorithm 1 of the paper one entry at a time."""

from __future__ import annotations

import dataclasses

import pytest
from test_methods import FAMILIES, Reading, half_up, reading, run, window_score

from plphp import ConfigError, PLPHPConfig
from plphp.methods.registry import resolve
from plphp.pruning.prompt_report import RowReport

pytestmark = pytest.mark.usefixtures("float64")

WINDOW, KERNEL = 4, 5


def kept_of(found: Reading, row: RowReport, head: int) -> set[int]:
    gone = set(found.vision) - set(row.kept_positions[head]) | set(row.evicted_text[head])
    return set(range(found.length)) - gone


def algorithm_1(scores: list[dict[int, float]], places: int, safeguard: float) -> list[set[int]]:
    """What each head keeps of ``places`` a head."""
    safe = int(safeguard * places)
    kept, rest = [], []
    for head, score in enumerate(scores):
        order = sorted(score, key=lambda position: -score[position])
        kept.append(set(order[:safe]))
        rest += [(score[position], head, position) for position in order[safe:]]
    for _, head, position in sorted(rest, reverse=True)[: len(scores) * (places - safe)]:
        kept[head].add(position)
    return kept


@pytest.mark.parametrize("safeguard", [None, 0.0, 0.9])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_compete_for_the_places_of_their_layer(family: str, safeguard: float | None) -> None:
    found = reading(family)
    setting = "" if safeguard is None else f"head_safeguard={safeguard},"
    _, layers = run(found, f"adakv:{setting}window={WINDOW},kernel={KERNEL},retention_rate=0.3")
    places = found.length - len(found.vision) + half_up(0.3 * len(found.vision)) - WINDOW
    sizes = set()
    for layer in layers:
        (row,) = layer.rows
        scores = [window_score(found, layer.layer, head, WINDOW, KERNEL, "avg") for head in range(found.kv_heads)]
        expected = algorithm_1(scores, places, 0.2 if safeguard is None else safeguard)
        window = set(range(found.length - WINDOW, found.length))
        for head, kept in enumerate(expected):
            assert kept_of(found, row, head) == kept | window
        sizes |= {len(kept) for kept in expected}
        assert sum(map(len, expected)) == places * found.kv_heads
    assert len(sizes) > 1


def test_it_is_snapkv_with_ragged_heads() -> None:
    found = reading("llava")
    options = f"window={WINDOW},retention_rate=0.3"
    ours, ragged, equal = (
        run(found, line)[1] for line in (f"adakv:{options}", f"snapkv:{options},heads=ragged", f"snapkv:{options}")
    )
    assert ours == ragged != equal
    assert run(found, f"adakv:{options},heads=equal")[1] == equal


@pytest.mark.parametrize("line", ["adakv", "snapkv", "query_bank:candidates=prompt"])
def test_a_quota_of_each_image_is_refused_where_text_competes(line: str) -> None:
    """Whatever the method: text has no image whose quota it could count for, and would all be evicted."""
    with pytest.raises(ConfigError, match="text has no image whose quota it could count for"):
        resolve(dataclasses.replace(PLPHPConfig.parse(line), image_quota="per_image"))
