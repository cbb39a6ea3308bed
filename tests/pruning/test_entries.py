# SPDX-License-Identifier: Apache-2.0
"""What a layer refuses to place; nothing of it is lost then."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from plphp import CacheStateError
from plphp.kernels.coder import Coder
from plphp.kernels.rungs import RUNGS
from plphp.pruning.entries import LayerEntries
from plphp.pruning.placement import Placement


def entries() -> LayerEntries:
    held = LayerEntries()
    held.append(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4))
    return held


def test_few_bits_are_refused_and_nothing_is_lost() -> None:
    held = entries()
    placement = torch.full((1, 2, 5), Placement.WHOLE, dtype=torch.uint8)
    placement[0, 1, 3] = 1
    with pytest.raises(CacheStateError, match="asks for few bits, and no coder came with it"):
        held.compact(placement)
    assert (held.prefix, held.tail_length) == (None, 5)


def test_no_codes_are_made_of_what_may_still_be_dropped() -> None:
    held, placement = entries(), torch.full((1, 2, 5), Placement.WHOLE, dtype=torch.uint8)
    with pytest.raises(CacheStateError, match="not final holds entries whole, and it came with a coder"):
        held.compact(placement, final=False, coder=Coder((RUNGS["r2"],)), vision=torch.ones(1, 5, dtype=torch.bool))
    assert (held.prefix, held.tail_length, held.provisional_nbytes) == (None, 5, 0)


@pytest.mark.parametrize("shape", [(1, 2, 4), (1, 1, 5), (2, 2, 5)])
def test_a_placement_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    held = entries()
    with pytest.raises(CacheStateError, match="covers its tail"):
        held.compact(torch.full(shape, Placement.WHOLE, dtype=torch.uint8))
    assert (held.prefix, held.tail_length) == (None, 5)


def whole_where(*tokens: tuple[int, int]) -> torch.Tensor:
    """A placement of 5 tokens in 2 heads that keeps some (head, token)."""
    placement = torch.full((1, 2, 5), Placement.DROPPED, dtype=torch.uint8)
    for head, token in tokens:
        placement[0, head, token] = Placement.WHOLE
    return placement


def test_a_placement_that_is_not_final_frees_what_it_drops_and_is_narrowed() -> None:
    held = entries()
    keys, values = (states.clone() for states in held.tail())
    held.compact(whole_where((0, 0), (0, 2), (0, 4), (1, 1), (1, 4)), final=False)
    assert (held.length, held.prefix_length, held.tail_length, held.batch_size) == (5, 0, 5, 1)
    assert (held.prefix, held.keys, held.values) == (None, None, None)
    assert held.nbytes == 5 * 2 * 4 * 4
    held.compact(whole_where((0, 0), (0, 2), (1, 1)), final=False)
    assert held.nbytes == 3 * 2 * 4 * 4
    held.compact(whole_where((0, 2), (1, 1)))
    assert (held.length, held.prefix_length, held.tail_length) == (5, 5, 0)
    assert held.prefix is not None
    assert held.prefix.counts == ((1, 1),)
    assert torch.equal(held.prefix.keys, torch.stack([keys[0, 0, 2], keys[0, 1, 1]]))
    assert torch.equal(held.prefix.values, torch.stack([values[0, 0, 2], values[0, 1, 1]]))
    assert held.nbytes == 2 * 2 * 4 * 4


def test_what_was_dropped_cannot_be_kept_later() -> None:
    held = entries()
    held.compact(whole_where((0, 0), (1, 1)), final=False)
    with pytest.raises(CacheStateError, match="is to keep 2 entries that were dropped"):
        held.compact(whole_where((0, 0), (0, 1), (1, 0)))
    with pytest.raises(CacheStateError, match="covers its tail"):
        held.compact(torch.full((1, 2, 2), Placement.WHOLE, dtype=torch.uint8))
    assert (held.prefix, held.prefix_length, held.nbytes) == (None, 0, 2 * 2 * 4 * 4)
    held.compact(whole_where((0, 0), (1, 1)))
    assert held.prefix is not None
    assert held.prefix.counts == ((1, 1),)


def test_entries_of_earlier_prompts_stay_in_front() -> None:
    held = entries()
    held.compact(whole_where((0, 3), (1, 0), (1, 1)))
    earlier = held.prefix
    assert earlier is not None
    held.append(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4))
    keys = held.tail()[0].clone()
    held.compact(whole_where((0, 1), (0, 3), (1, 4)), final=False)
    assert held.prefix is earlier
    assert held.prefix_length == 5
    held.compact(whole_where((0, 3), (1, 4)))
    assert held.prefix.counts == ((2, 3),)
    expected = [earlier.keys[0], keys[0, 0, 3], *earlier.keys[1:], keys[0, 1, 4]]
    assert torch.equal(held.prefix.keys, torch.stack(expected))
    assert (held.length, held.prefix_length) == (10, 10)


@pytest.mark.parametrize("use", [
    lambda held: held.append(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4)),
    lambda held: held.tail(),
    lambda held: held.reserve(3),
    lambda held: held.remove_last(1),
    lambda held: held.select_rows(torch.tensor([0, 0])),
])  # fmt: skip
def test_nothing_uses_a_layer_that_waits_for_its_final_placement(use: Callable[[LayerEntries], object]) -> None:
    held = entries()
    held.compact(whole_where((0, 0), (1, 1)), final=False)
    with pytest.raises(CacheStateError, match="waits for its final placement"):
        use(held)
    held.forget()
    held.append(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4))
    assert held.length == 1
