# SPDX-License-Identifier: Apache-2.0
"""Whether an operation can use a kernel of its own, in Triton or C++, and whether the kernel does it right here."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Container, Sequence
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from plphp.errors import BackendUnavailableError
from plphp.io.quoting import one_line

from .precision import as_written

log = logging.getLogger("plphp")

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Dtypes of the kernels, and the largest difference from the reference that is due to them."""
WIDEST = 256
"""Largest head dimension of the Triton kernels."""
NARROWEST = 32
"""Smallest head dimension of the C++ kernels: what the widest vectors take at once."""
NO_CUDA = "it needs a CUDA device"

Dtypes = tuple[torch.dtype, torch.dtype]
"""That of queries and keys, and that of values."""

Trial = Callable[[torch.device, Dtypes, int, int], float]
"""Runs a kernel and its reference on a device at some dtypes and the widths of keys and values: the largest
difference."""

Draw = Callable[..., Tensor]
"""Draws normal numbers of a shape."""

Case = Callable[[Draw, Draw, torch.device], tuple[Any, ...]]
"""Makes the arguments of a trial on a device, with what draws keys and what draws values."""


def unsupported_by_triton(*states: Tensor) -> str | None:
    """Say why no Triton kernel can read these states of one dtype, [..., dim]; None where one can."""
    first = states[0]
    if first.device.type != "cuda":
        return NO_CUDA
    if not _has_triton():
        return "triton is not installed"
    reason = _strange_dtype(states, TOLERANCE)
    if reason is not None:
        return reason
    if torch.version.hip is not None or torch.cuda.get_device_capability(first.device) < (8, 0):
        return "it is for NVIDIA GPUs of compute capability 8.0 and later"
    widest = max(one.shape[-1] for one in states)
    if widest > WIDEST:
        return f"the head dimension is {widest}, and it goes up to {WIDEST}"
    if any(one.requires_grad for one in states):
        return "it has no gradient"
    return None


def unsupported_by_cpp(*states: Tensor) -> str | None:
    """Say why no C++ kernel can read these states of one dtype, [..., dim]; None where one can."""
    if sys.platform != "linux":
        return f"it is for Linux, and this is {sys.platform}"
    if any(one.device.type != "cpu" for one in states):
        return "it is for a CPU"
    reason = _strange_dtype(states, (torch.float32, torch.bfloat16))
    if reason is not None:
        return reason
    narrowest = min(one.shape[-1] for one in states)
    if narrowest < NARROWEST:
        return f"the head dimension is {narrowest}, and it starts at {NARROWEST}"
    if any(one.stride(-1) != 1 for one in states):
        return "the numbers of a head do not lie side by side"
    if any(one.requires_grad for one in states):
        return "it has no gradient"
    if torch.compiler.is_compiling() or any(type(one) is not Tensor for one in states):
        return "only plain tensors have the memory that it reads"
    return None


UNSUPPORTED = {"Triton": unsupported_by_triton, "C++": unsupported_by_cpp}
"""What says why no kernel of a language can read states, by the language."""


@cache
def trouble(
    trial: Trial,
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    value_dim: int,
    of_values: torch.dtype | None = None,
) -> str | None:
    """Try a kernel against its reference, once for each device, dtype and width; say what is wrong with it.

    Values have the dtype ``of_values``, if it is another one than that of queries and keys.
    """
    dtypes = dtype, of_values or dtype
    try:
        worst = trial(device, dtypes, dim, value_dim)
    except (torch.OutOfMemoryError, MemoryError):  # says nothing about the kernel, and is not kept as its result
        raise
    except BackendUnavailableError as error:
        return str(error)
    except Exception as error:  # compilers raise what they like
        return f"it fails on this device ({type(error).__name__}: {one_line(error, limit=200)})"
    if worst < max(TOLERANCE[one] for one in dtypes):
        return None
    return f"it differs from the reference on this device by {worst:.2g}"


def usable(operation: str, language: str, reason: str | None, trial: Trial, keys: Tensor, values: Tensor) -> bool:
    """Whether an operation on keys and values can use its kernel; why not, a given ``reason`` first, is logged once."""
    other = () if values.dtype == keys.dtype else (values.dtype,)
    reason = reason or trouble(trial, keys.device, keys.dtype, keys.shape[-1], values.shape[-1], *other)
    if reason is not None and reason != NO_CUDA:
        _tell_once(operation, language, reason)
    return reason is None


def difference(
    kernel: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    case: Case,
    device: torch.device,
    dtypes: Dtypes,
) -> float:
    """Largest difference of a kernel, on a device and in some dtypes, from the reference in float64 on the CPU.

    There the reference depends on no setting of the process. NaN where one of them has one.
    """

    def draws(cast: Callable[[Tensor], Tensor]) -> tuple[Draw, Draw]:
        generator = torch.Generator().manual_seed(0)

        def draw(dtype: torch.dtype, *shape: int) -> Tensor:
            return cast(torch.randn(shape, generator=generator, device="cpu").to(dtype))

        of_keys, of_values = dtypes
        return partial(draw, of_keys), partial(draw, of_values)

    with as_written(device):
        found = kernel(*case(*draws(lambda one: one.to(device)), device))
    with as_written(torch.device("cpu")):
        expected = reference(*case(*draws(lambda one: one.double()), torch.device("cpu")))
    return (found.double().cpu() - expected.double()).abs().max().item()


def _strange_dtype(states: Sequence[Tensor], known: Container[torch.dtype]) -> str | None:
    """Say what is wrong with the dtypes of states."""
    first = states[0].dtype
    if first not in known:
        return f"it does not know the dtype {first}"
    if any(one.dtype != first for one in states):
        return f"the states have different dtypes: {', '.join(str(one.dtype) for one in states)}"
    return None


@cache
def _tell_once(operation: str, language: str, reason: str) -> None:
    log.warning("%s does without its %s kernel: %s.", operation, language, reason)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
