# SPDX-License-Identifier: Apache-2.0
"""Ladders: that their text reads back the same, what their shares add up to, and what is refused."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plphp import ConfigError
from plphp.settings import ladder as module
from plphp.settings.ladder import LADDERS, Ladder, Share


@st.composite
def ladders(draw: st.DrawFn) -> Ladder:
    """Any ladder of up to six rungs, open or closed."""
    names = draw(st.lists(st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True), min_size=1, max_size=6, unique=True))
    weights = draw(st.lists(st.floats(0.01, 1), min_size=len(names), max_size=len(names)))
    total = sum(weights) / draw(st.floats(0.05, 1))
    rungs = [Share(name, weight / total) for name, weight in zip(names, weights, strict=True)]
    if draw(st.booleans()):
        rungs[-1] = Share(names[-1])
    return Ladder(tuple(rungs))


@given(ladders())
def test_the_text_of_a_ladder_reads_back_the_same(ladder: Ladder) -> None:
    if str(ladder) not in LADDERS:  # a rung alone may have the name of a ladder
        assert Ladder.parse(str(ladder)) == ladder
    assert Ladder.parse(f" {str(ladder).replace(',', ' , ').replace('=', ' = ')} ") == ladder


@given(ladders(), st.floats(0, 1))
def test_cumulative_shares_rise_to_what_is_kept(ladder: Ladder, rate: float) -> None:
    shares = ladder.cumulative()
    assert len(shares) == len(ladder.names)
    assert all(lower < higher for lower, higher in zip([0.0, *shares], shares, strict=False))
    assert shares[-1] == ladder.kept == (1.0 if ladder.open else pytest.approx(sum(r.share for r in ladder.rungs)))
    of_rate = ladder.cumulative(rate)
    assert of_rate[-1] == pytest.approx(rate)
    assert of_rate == pytest.approx([share * rate / ladder.kept for share in shares])
    assert max(of_rate) <= 1


@pytest.mark.parametrize(
    ("name", "kept", "rungs"),
    [
        ("t15", 0.91, ("pr2", "rvq", "pq")),
        ("t10", 0.76, ("pr2", "rvq", "pq")),
        ("t7.5", 0.65, ("pr2", "rvq", "pq")),
        ("t5", 0.44, ("pr2", "rvq", "pq")),
        ("kivi4", 1.0, ("kivi4",)),
        ("c3", 1.0, ("c3",)),
        ("pr2=.2,pq", 1.0, ("pr2", "pq")),
        ("whole=.05,r2", 1.0, ("whole", "r2")),
        ("r4=.5,r2=.5", 1.0, ("r4", "r2")),
    ],
)
def test_what_a_ladder_keeps(name: str, kept: float, rungs: tuple[str, ...]) -> None:
    ladder = Ladder.parse(name)
    assert (ladder.kept, ladder.names) == (kept, rungs)


def test_every_named_ladder_is_a_ladder_and_its_text_is_the_same_one() -> None:
    for name in LADDERS:
        assert Ladder.parse(str(Ladder.parse(name))) == Ladder.parse(name)


def test_shares_that_are_rounded_add_up_to_everything() -> None:
    assert Ladder.parse("r4=.1,r3=.2,r2=.7").kept == 1.0
    assert Ladder(tuple(Share(f"r{n}", 1 / 3) for n in range(3))).kept == 1.0


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["A ladder needs a rung", "t10"]),
        (" ", ["A ladder needs a rung"]),
        ("t7.4", ["Unknown ladder 't7.4'", "Ladders: t15, t10, t7.5, t5,", "rungs: whole,"]),
        ("99.5", ["Unknown ladder '99.5'", "Ladders: "]),
        ("pr2=.2,rvq=.5,pq=.32", ["at most 1 together, got 1.02 in pr2=0.2,rvq=0.5,pq=0.32"]),
        ("pr2=half", ["share of the rung 'pr2'", "got 'half' in 'pr2=half'"]),
        ("pr2=", ["share of the rung 'pr2'", "got ''"]),
        ("pr2=nan", ["share of the rung 'pr2'", "above 0 and at most 1, got nan"]),
        ("pr2=0,pq=.5", ["share of the rung 'pr2'", "above 0", "leave out"]),
        ("pr2=-.1", ["above 0 and at most 1, got -0.1"]),
        ("pr2=1.5", ["above 0 and at most 1, got 1.5"]),
        ("pq=.2,pr2=.1,pq=.3", ["The rung 'pq' stands twice", "add its shares up"]),
        ("pr2,pq=.3", ["The rung 'pr2'", "takes all that is left", "give it a share, as in pr2=.2"]),
        ("pr2,pq", ["The rung 'pr2'", "takes all that is left"]),
        ("pr2=1,pq", ["leaves nothing for its last rung: leave 'pq' out"]),
        ("pr2=.2,,pq", ["Expected rung=share by commas", "got ''"]),
        ("pr2=.2,", ["Expected rung=share by commas", "got ''"]),
        ("=.2", ["Expected rung=share by commas", "got '=.2'"]),
        ("pr2:.2", ["Unknown ladder 'pr2:.2'"]),
    ],
)
def test_what_is_no_ladder(text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        Ladder.parse(text)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("value", [None, 10, 0.5, ["t10"]], ids=repr)
def test_a_ladder_is_text(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"A ladder must be text, such as 't10'"):
        Ladder.parse(value)


@pytest.mark.parametrize("rungs", [["pq"], ("pq",), [Share("pq")]], ids=repr)
def test_the_rungs_of_a_ladder_are_shares(rungs: Any) -> None:
    with pytest.raises(ConfigError, match="must be a tuple of Share"):
        Ladder(rungs)


@pytest.mark.parametrize("share", [True, "0.5", float("inf"), 0], ids=repr)
def test_a_share_is_a_number(share: Any) -> None:
    with pytest.raises(ConfigError, match="must be a number above 0 and at most 1"):
        Share("pq", share)


def test_examples() -> None:
    assert doctest.testmod(module).failed == 0
