# SPDX-License-Identifier: Apache-2.0
"""Vision-language model types that plphp refuses, with the reason that the error message gives."""

from __future__ import annotations

_CROSS_ATTENTION = (
    "its images are read through cross-attention layers and are not in the self-attention KV cache."
)
_ENCODER_DECODER = (
    "it is an encoder-decoder model: the image stands in the encoder's output, not in a KV cache."
)

UNSUPPORTED: dict[str, str] = {
    "mllama": _CROSS_ATTENTION,
    "idefics": _CROSS_ATTENTION,
    "evolla": _CROSS_ATTENTION,
    "florence2": _ENCODER_DECODER,
    "pix2struct": _ENCODER_DECODER,
    "udop": _ENCODER_DECODER,
    "t5gemma2": _ENCODER_DECODER,
    "vision-encoder-decoder": _ENCODER_DECODER,
}
"""``config.model_type`` -> one sentence that completes "plphp does not prune ... models:"."""
