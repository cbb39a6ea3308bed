# SPDX-License-Identifier: Apache-2.0
"""Whether an operation can use a kernel of its own, in Triton or C++, and whether the kernel does it right here.

Three questions are asked in turn, and the reference in torch does the work where an answer is no:

1. Can the kernel read these states at all (`unsupported_by_triton`, `unsupported_by_cpp`)? Asked at every call, so no
   number of the states is looked at, which on a GPU would wait for it.
2. Does it build and run here, and give what the reference gives (`trouble`)? Kernels are compiled on the user's
   machine, by versions of Triton, g++ and drivers that no test of ours has seen, and a miscompiled kernel gives wrong
   text rather than an error. So a kernel is tried on a small case before it is used, once in a process for each device,
   dtype and width: these decide what is compiled.
3. If not, does the user have to know? What makes an operation slower than it could be is logged, once for each reason;
   that a CPU has no CUDA is no news.
"""

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
"""Dtypes of the kernels, and the largest difference from the reference in float64 that rounding to them explains."""
WIDEST = 256
"""Largest head dimension of the Triton kernels."""
NARROWEST = 32
"""Smallest head dimension of the C++ kernels: what the widest vectors take at once."""
TRITON_ROWS = 128
"""Most query rows [group x query] of a KV head in the Triton kernels of attention."""
NO_CUDA = "it needs a CUDA device"
"""The reason that is not logged."""

Dtypes = tuple[torch.dtype, torch.dtype]
"""The dtype of queries and keys, and the dtype of values."""

Trial = Callable[[torch.device, Dtypes, int, int], float]
"""Runs a kernel and its reference on a device, with keys and values of some dtypes and widths; returns the largest
difference."""

Draw = Callable[..., Tensor]
"""Draws a tensor of normal numbers of a shape."""

Case = Callable[[Draw, Draw, torch.device], tuple[Any, ...]]
"""Makes the arguments of a trial on a device, from a function that draws keys and a function that draws values."""


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
    widest = max(state.shape[-1] for state in states)
    if widest > WIDEST:
        return f"the head dimension is {widest}, and it goes up to {WIDEST}"
    if any(state.requires_grad for state in states):
        return "it has no gradient"
    return None


def unsupported_by_cpp(*states: Tensor) -> str | None:
    """Say why no C++ kernel can read these states of one dtype, [..., dim]; None where one can."""
    if sys.platform != "linux":
        return f"it is for Linux, and this is {sys.platform}"
    if any(state.device.type != "cpu" for state in states):
        return "it is for a CPU"
    reason = _strange_dtype(states, (torch.float32, torch.bfloat16))
    if reason is not None:
        return reason
    narrowest = min(state.shape[-1] for state in states)
    if narrowest < NARROWEST:
        return f"the head dimension is {narrowest}, and it starts at {NARROWEST}"
    if any(state.stride(-1) != 1 for state in states):
        return "the numbers of a head do not lie side by side"
    if any(state.requires_grad for state in states):
        return "it has no gradient"
    if torch.compiler.is_compiling() or any(type(state) is not Tensor for state in states):
        return "only plain tensors have the memory that it reads"
    return None


def too_many_rows(rows: int) -> str | None:
    """Say why the Triton kernels of attention cannot take so many query rows of a KV head; None where they can."""
    return f"a KV head has {rows} query rows, and it takes up to {TRITON_ROWS}" if rows > TRITON_ROWS else None


UNSUPPORTED = {"Triton": unsupported_by_triton, "C++": unsupported_by_cpp}
"""The functions that say why no kernel can read some states, by the language of the kernel."""


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

    Parameters
    ----------
    trial : Trial
        Of the kernel.
    device : torch.device
        Where it would run. A process may have several GPUs, of several kinds.
    dtype : torch.dtype
        Of queries, keys and values.
    dim, value_dim : int
        Widths of keys and of values.
    of_values : torch.dtype, optional
        Of values, where it differs from ``dtype``.

    Returns
    -------
    str or None
        What is wrong, as a clause about "it"; None where nothing is.

    Raises
    ------
    torch.OutOfMemoryError, MemoryError
        If the trial does not fit into memory. That says nothing about the kernel, and is not kept as its result.
    """
    dtypes = dtype, of_values or dtype
    try:
        worst = trial(device, dtypes, dim, value_dim)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except BackendUnavailableError as error:
        return str(error)
    except Exception as error:  # compilers raise what they like
        return f"it fails on this device ({type(error).__name__}: {one_line(error, limit=200)})"
    if worst < max(TOLERANCE[dtype] for dtype in dtypes):  # False for NaN, too
        return None
    return f"it differs from the reference on this device by {worst:.2g}"


def usable(operation: str, language: str, reason: str | None, trial: Trial, keys: Tensor, values: Tensor) -> bool:
    """Whether an operation on keys and values can use its kernel; if not, the reason is logged once.

    Parameters
    ----------
    operation, language : str
        The names under which it is logged.
    reason : str, optional
        Why the kernel cannot read the states, if so: then it is not tried.
    trial : Trial
        Of the kernel.
    keys, values : Tensor
        Their device, dtypes and widths are tried.
    """
    # Results are kept by the arguments as they are written, so a single dtype is never written twice.
    of_values = () if values.dtype == keys.dtype else (values.dtype,)
    reason = reason or trouble(trial, keys.device, keys.dtype, keys.shape[-1], values.shape[-1], *of_values)
    if reason is not None and reason != NO_CUDA:
        _warn_once(operation, language, reason)
    return reason is None


def difference(
    kernel: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    case: Case,
    device: torch.device,
    dtypes: Dtypes,
) -> float:
    """Largest difference of a kernel, on a device and in some dtypes, from the reference in float64 on the CPU.

    There the reference depends on no setting of the process, such as TF32 or autocast, and its own rounding is out of
    the comparison. Both get the same numbers: they are drawn in the kernel's dtypes, and then widened. NaN where either
    result has a NaN, or where both are infinite.
    """

    def draws(cast: Callable[[Tensor], Tensor]) -> tuple[Draw, Draw]:
        """Functions that draw keys and values, the same at every call of this one, and cast them."""
        generator = torch.Generator().manual_seed(0)

        def draw(dtype: torch.dtype, *shape: int) -> Tensor:
            return cast(torch.randn(shape, generator=generator, device="cpu").to(dtype))

        of_keys, of_values = dtypes
        return partial(draw, of_keys), partial(draw, of_values)

    with as_written(device):
        actual = kernel(*case(*draws(lambda state: state.to(device)), device))
    with as_written(torch.device("cpu")):
        expected = reference(*case(*draws(lambda state: state.double()), torch.device("cpu")))
    return (actual.double().cpu() - expected.double()).abs().max().item()


def _strange_dtype(states: Sequence[Tensor], known: Container[torch.dtype]) -> str | None:
    """Say what is wrong with the dtypes of states: they have to be one known dtype."""
    first = states[0].dtype
    if first not in known:
        return f"it does not know the dtype {first}"
    if any(state.dtype != first for state in states):
        return f"the states have different dtypes: {', '.join(str(state.dtype) for state in states)}"
    return None


@cache
def _warn_once(operation: str, language: str, reason: str) -> None:
    """Warn the first time that this function is called with these arguments: operations run for each layer and step."""
    log.warning("%s does without its %s kernel: %s.", operation, language, reason)


@cache
def _has_triton() -> bool:
    """Whether triton is installed. It is imported where a kernel is tried, not before."""
    return find_spec("triton") is not None
