# SPDX-License-Identifier: Apache-2.0
"""Tiny models of every family: real classes, random weights, inputs as the processors return them."""

from .batches import PER_TOKEN, collate, drop_empty
from .family import TinyFamily
from .images import PINPOINTS
from .stock import ANY, NEWEST
from .table import REFUSED, TIERS, TINY, tiers_model, tiny_model
from .tokens import BOS, EOS, IMAGE, PAD, SPECIAL, TEXT_IDS, VIDEO, VOCAB
from .weights import randomize

__all__ = [
    "ANY",
    "BOS",
    "EOS",
    "IMAGE",
    "NEWEST",
    "PAD",
    "PER_TOKEN",
    "PINPOINTS",
    "REFUSED",
    "SPECIAL",
    "TEXT_IDS",
    "TIERS",
    "TINY",
    "VIDEO",
    "VOCAB",
    "TinyFamily",
    "collate",
    "drop_empty",
    "randomize",
    "tiers_model",
    "tiny_model",
]
