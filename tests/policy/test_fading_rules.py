# SPDX-License-Identifier: Apache-2.0
"""Rules by which images fade: what each promises, for any scores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plphp.policy.fading_ladders import PLAIN, PRODUCT, LadderFamily
from plphp.policy.fading_rules import FLOOR, RULES, HeldEntries
from plphp.settings.ladder import Ladder
from plphp.settings.vision_budget import RULES as NAMES

INF = float("inf")


@st.composite
def entries(draw: st.DrawFn) -> HeldEntries:
    """Entries of a few images and heads, of which every image and head has some."""
    heads, images = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    counts = draw(st.lists(st.integers(1, 8), min_size=heads * images, max_size=heads * images))
    pair = torch.repeat_interleave(torch.tensor(counts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    pair = pair[torch.randperm(len(pair), generator=generator)]
    score = torch.randint(0, draw(st.integers(1, 50)), (len(pair),), generator=generator).float()
    safeguard = draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    return HeldEntries(score, pair % heads, pair // heads, heads, images, safeguard)


def test_settings_name_the_rules() -> None:
    assert tuple(RULES) == NAMES


@given(entries(), st.sampled_from(NAMES))
def test_every_number_of_places_is_filled(held: HeldEntries, rule: str) -> None:
    """With k places a head, k times the heads are held, or all that a rule ever holds; of equal heads k each."""
    places = RULES[rule].order(held)
    candidates = places[places < INF]
    for k in (1, 2, 5, 20):
        chosen = places < k
        if held.safeguard == 1:
            for head in range(held.heads):
                own = int((candidates[held.head[places < INF] == head] >= 0).sum())
                if rule != "oldest":
                    assert int((chosen & (held.head == head)).sum()) == min(k, own)
        elif rule != "oldest":
            assert int(chosen.sum()) == min(k * held.heads, len(candidates))
    assert bool((places >= 0).all())


@given(entries(), st.integers(1, 30))
def test_ranked_leaves_every_image_its_floor(held: HeldEntries, k: int) -> None:
    places = RULES["ranked"].order(held)
    for image in range(held.images):
        own = held.image == image
        if held.safeguard < 1:
            floor = int(FLOOR * k * held.heads / held.images)
            assert int((own & (places < k)).sum()) >= min(floor, int(own.sum()))
            continue
        for head in range(held.heads):
            of_head = own & (held.head == head)
            assert int((of_head & (places < k)).sum()) >= min(int(FLOOR * k / held.images), int(of_head.sum()))


@given(entries(), st.integers(1, 30))
def test_heads_have_their_safeguard(held: HeldEntries, k: int) -> None:
    for rule in ("ranked", "equal"):
        places = RULES[rule].order(held)
        share = held.safeguard * k * (1 - FLOOR if rule == "ranked" else 1 / held.images)
        for head in range(held.heads):
            own = held.head == head
            assert int((own & (places < k)).sum()) >= min(int(share), int(own.sum())) - (rule == "equal")


@given(entries())
def test_what_is_held_of_an_image_is_its_best(held: HeldEntries) -> None:
    for rule in NAMES:
        places = RULES[rule].order(held)
        for pair in (held.image * held.heads + held.head).unique().tolist():
            own = (held.image * held.heads + held.head) == pair
            order = places[own].argsort()
            score = held.score[own][order]
            finite = places[own][order] < INF
            if rule != "oldest" or pair // held.heads == held.images - 1:
                assert bool((score.diff()[finite[1:]] <= 0).all())


@given(entries(), st.integers(1, 60))
def test_oldest_holds_whole_images_and_newest_one(held: HeldEntries, k: int) -> None:
    chosen = RULES["oldest"].order(held) < k
    there = [bool((chosen & (held.image == image)).any()) for image in range(held.images)]
    assert there == sorted(there)
    for image in range(held.images - 1):
        assert bool(chosen[held.image == image].all()) == there[image]
    newest = RULES["newest"].order(held) < INF
    assert torch.equal(newest, held.image == held.images - 1)


def test_equal_divides_the_places() -> None:
    score = torch.arange(24.0)
    held = HeldEntries(score, torch.zeros(24, dtype=torch.int64), torch.arange(24) // 8, 1, 3, 0.2)
    chosen = RULES["equal"].order(held) < 12
    assert [int(chosen[held.image == image].sum()) for image in range(3)] == [4, 4, 4]


@pytest.mark.parametrize("family", [PRODUCT, PLAIN], ids=["product", "plain"])
def test_levels_are_the_measured_ladders(family: LadderFamily) -> None:
    assert family.cumulative(0) == [0.0] * len(family.rungs)
    assert family.cumulative(family.top) == [1.0] * len(family.rungs)
    for level, name in enumerate(family.ladders, 1):
        ladder = Ladder.parse(name)
        own = dict(zip(family.rungs, family.cumulative(level), strict=True))
        assert {rung: own[rung] for rung in ladder.names} == dict(zip(ladder.names, ladder.cumulative(), strict=True))


@given(st.floats(0, 1), st.sampled_from([PRODUCT, PLAIN]))
def test_between_levels_shares_are_between_theirs(part: float, family: LadderFamily) -> None:
    for level in range(family.top):
        low, high = family.cumulative(level), family.cumulative(level + 1)
        for below, own, above in zip(low, family.cumulative(level + part), high, strict=True):
            assert min(below, above) - 1e-12 <= own <= max(below, above) + 1e-12
        assert family.cumulative(level + part) == sorted(family.cumulative(level + part))
