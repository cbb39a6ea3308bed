# SPDX-License-Identifier: Apache-2.0
"""Tiny models in float64, where float noise and a mistake cannot be confused.

Two routes to the same logits differ by some 1e-14 in float64 where both are right, and by 1e-4 and more where one is
wrong. In float32 the noise is 1e-6 on one machine and 3e-5 on another, so that no fixed bound is both safe and sharp.

Casting a model to float64 is not enough: models work in float32 in places, whatever their dtype (norms, rotary angles,
routers, softmax, the logits that ``generate`` returns), and plphp does so for its scores. There two routes that differ
by 1e-15 are rounded to numbers that differ by 1e-7, and a near tie in a router or between two scores falls either way.
`float64` lifts these places to float64 as well, in the model and in plphp, without a copy of any of their code.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

EXACT = 1e-10
"""Bound on differences in float64: 10,000 times the noise, and a millionth of the smallest mistake."""

REMEDY = 'mark the test with pytest.mark.usefixtures("float64"), or take a bound from what stock transformers shows'

_BITS = (torch.Tensor.view, torch.frombuffer)
"""What takes the bits of memory for numbers: there float32 says what the bits are."""

_depth = 0


class _Lifted(TorchFunctionMode):
    """Every call of torch that asks for float32 gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        if func in _BITS:
            return func(*args, **(kwargs or {}))
        for one in args:
            if one is torch.float32:
                args = tuple(torch.float64 if one is torch.float32 else one for one in args)
                break
        if kwargs is None:
            return func(*args)
        if kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


@contextmanager
def float64() -> Iterator[None]:
    """Within it tiny models are float64, and what asks for float32 gets float64, in threads started here too."""
    global _depth
    run = threading.Thread.run

    def run_lifted(self: threading.Thread) -> None:
        with _Lifted():
            run(self)

    _depth += 1
    threading.Thread.run = run_lifted  # type: ignore[method-assign]  # a mode holds for one thread
    try:
        with _Lifted():
            yield
    finally:
        threading.Thread.run = run  # type: ignore[method-assign]
        _depth -= 1


def working_dtype() -> torch.dtype:
    """The dtype of tiny models whose test names none."""
    return torch.float64 if _depth else torch.float32


def max_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, taken in float64."""
    return (actual.double() - expected.double()).abs().max().item()


def assert_exact(actual: Tensor, expected: Tensor) -> None:
    """Equal within the noise of float64.

    Raises
    ------
    TypeError
        If either is not float64: a bound on another dtype has to come from what stock transformers shows.
    """
    for tensor in (actual, expected):
        if tensor.dtype is not torch.float64:
            raise TypeError(
                f'expected float64, got {tensor.dtype}: mark the test with pytest.mark.usefixtures("float64")'
            )
    assert actual.shape == expected.shape
    assert max_difference(actual, expected) < EXACT
