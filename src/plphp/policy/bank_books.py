# SPDX-License-Identifier: Apache-2.0
"""Codebooks, and the entries that are sampled for them, in the file of a query bank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from plphp.kernels.books import Books, LayerBooks

from .entry_sampling import EntrySample

SIDES = ("keys", "values")


def book_tensors(books: Mapping[int, LayerBooks]) -> dict[str, Tensor]:
    """The tensors of codebooks by their names in a file, such as ``3.books.keys.fine``."""
    return {
        f"{layer}.books.{side}.{name}": tensor.contiguous()
        for layer, own in books.items()
        for side in SIDES
        for name, tensor in getattr(own, side).tensors().items()
    }


def books_in(tensors: Mapping[str, Tensor], queries: Mapping[int, Tensor]) -> dict[int, LayerBooks] | None:
    """The codebooks of a file; None where it holds none.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        All tensors of the file.
    queries : mapping of int to Tensor
        [q_heads, samples, dim] by layer: each has to have codebooks that fit.

    Raises
    ------
    KeyError, ValueError
        If they are there in part, have wrong shapes, or hold NaN or inf.
    """
    if not any(".books." in name for name in tensors):
        return None
    books = {layer: LayerBooks(*(_books(tensors, f"{layer}.books.{side}") for side in SIDES)) for layer in queries}
    strange = {name for name in tensors if ".books." in name} - set(book_tensors(books))
    if strange:
        raise ValueError(f"{min(strange)} belongs to no layer of the bank")
    for layer, own in books.items():
        _check_fits(layer, own.kv_heads, own.keys.dim, queries[layer])
    return books


def sample_tensors(sample: EntrySample) -> dict[str, Tensor]:
    """The tensors of sampled entries by their names in a file."""
    named = {"sampled.draws": sample.draws, "sampled.prompts": torch.tensor(sample.prompts)}
    for layer, pair in sample.layers.items():
        named.update({f"{layer}.sampled.{side}": part.contiguous() for side, part in zip(SIDES, pair, strict=True)})
    return named


def sample_in(tensors: Mapping[str, Tensor], queries: Mapping[int, Tensor]) -> EntrySample | None:
    """The sampled entries of a file, see `books_in`; None where it holds none.

    Raises
    ------
    KeyError, ValueError
        If they are there in part, have wrong shapes, or hold NaN or inf.
    """
    if not any("sampled." in name for name in tensors):
        return None
    layers = {layer: (tensors[f"{layer}.sampled.keys"], tensors[f"{layer}.sampled.values"]) for layer in queries}
    draws, prompts = tensors["sampled.draws"], tensors["sampled.prompts"]
    if draws.dim() != 1 or not len(draws) or prompts.numel() != 1 or int(prompts) < 1:
        raise ValueError("it holds a sample of no entries")
    sample = EntrySample(draws, layers, int(prompts))
    for layer, pair in layers.items():
        _check_fits(layer, pair[0].shape[0], pair[0].shape[2], queries[layer])
        _check_finite(f"{layer}.sampled", *pair)
    return sample


def _books(tensors: Mapping[str, Tensor], name: str) -> Books:
    books = Books(tensors[f"{name}.fine"], tensors[f"{name}.residual"], tensors.get(f"{name}.coarse"))
    _check_finite(name, *books.tensors().values())
    return books


def _check_finite(name: str, *parts: Tensor) -> None:
    if not all(bool(part.isfinite().all()) for part in parts):
        raise ValueError(f"{name} holds NaN or inf")


def _check_fits(layer: int, kv_heads: int, dim: int, queries: Tensor) -> None:
    """Raise where keys of so many heads and this dimension are not those of the queries of a layer."""
    if not kv_heads or queries.shape[0] % kv_heads or queries.shape[2] != dim:
        raise ValueError(
            f"layer {layer} has {queries.shape[0]} query heads of dimension {queries.shape[2]}, and codebooks of "
            f"{kv_heads} KV heads of dimension {dim}"
        )
