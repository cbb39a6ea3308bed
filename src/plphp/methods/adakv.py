# SPDX-License-Identifier: Apache-2.0
"""AdaKV (arXiv:2407.11550) over SnapKV: the KV heads of a layer compete for its places.

Of the k places that each of H heads of a layer would have, ``floor(f k)`` are its own, which go to its best entries.
The others, of all heads together, go to the best of what is left in any head, by the score of
`plphp.methods.snapkv`: a head whose attention is spread over many entries keeps more than one that looks at few. A
layer keeps H k entries either way (Algorithm 1 of the paper, `plphp.policy.selection.ragged_counts`).

Defaults: the safeguard f is the config's ``head_safeguard``, 0.2 as in the paper; window, kernel and pool are those of
``snapkv``, so that nothing but the budgets is between the two. The authors' code (MIT) takes a window of 32 and a
max-pooling of width 7.

Changed: as in ``snapkv``. Any method whose scores can be compared between heads takes these budgets with
``heads="ragged"``.
"""

from __future__ import annotations

import dataclasses

from plphp.policy.method import Method

from ._window import OPTIONS, check
from .snapkv import KV

METHOD = Method(
    name="adakv",
    summary="as snapkv, with the KV heads of a layer in competition for its places",
    paper="arXiv:2407.11550",
    kv=dataclasses.replace(KV, heads="ragged"),
    options=OPTIONS,
    check=check,
)
