# SPDX-License-Identifier: Apache-2.0
"""Keep everything: the same cache and attention function with nothing evicted."""

from plphp.allocation import keep_all
from plphp.selection import per_head

from .base import Method

METHOD = Method(
    name="none",
    summary="keep every vision token",
    paper="control",
    allocate=keep_all,
    rank=per_head,
)
