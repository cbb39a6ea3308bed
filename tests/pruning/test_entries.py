# SPDX-License-Identifier: Apache-2.0
"""What a layer refuses to place; nothing of it is lost then."""

from __future__ import annotations

import pytest
import torch

from plphp import CacheStateError, UnsupportedFeatureError
from plphp.pruning.entries import LayerEntries
from plphp.pruning.placement import Placement


def entries() -> LayerEntries:
    held = LayerEntries()
    held.append(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4))
    return held


def test_few_bits_are_refused_and_nothing_is_lost() -> None:
    held = entries()
    placement = torch.full((1, 2, 5), Placement.WHOLE, dtype=torch.uint8)
    placement[0, 1, 3] = Placement.FEW_BITS
    with pytest.raises(UnsupportedFeatureError, match="No layer holds entries in few bits yet"):
        held.compact(placement)
    assert (held.prefix, held.tail_length) == (None, 5)


@pytest.mark.parametrize("shape", [(1, 2, 4), (1, 1, 5), (2, 2, 5)])
def test_a_placement_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    held = entries()
    with pytest.raises(CacheStateError, match="covers its tail"):
        held.compact(torch.full(shape, Placement.WHOLE, dtype=torch.uint8))
    assert (held.prefix, held.tail_length) == (None, 5)
