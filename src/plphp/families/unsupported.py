# SPDX-License-Identifier: Apache-2.0
"""Vision-language models that plphp refuses, with the reason that the error message gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


_CROSS_ATTENTION = "its images are read through cross-attention layers and are not in the self-attention KV cache."
_ENCODER_DECODER = "it is an encoder-decoder model: the image stands in the encoder's output, not in a KV cache."
_LATENT = "its layers cache one compressed latent for all heads (MLA), so there are no KV heads to prune one by one."
_INDEXED = "its sparse attention picks entries of the KV cache by an index of its own, which eviction would shift."
_SHARED = "its last layers read the keys and values of earlier layers, which would be pruned before they are read."
_SOFTCAP = "its text model soft-caps the attention (attn_logit_softcapping), which plphp's attention does not."

UNSUPPORTED: dict[str, str] = {
    "mllama": _CROSS_ATTENTION,
    "idefics": _CROSS_ATTENTION,
    "evolla": _CROSS_ATTENTION,
    "blip": _CROSS_ATTENTION,
    "florence2": _ENCODER_DECODER,
    "pix2struct": _ENCODER_DECODER,
    "pp_formulanet": _ENCODER_DECODER,
    "t5gemma2": _ENCODER_DECODER,
    "udop": _ENCODER_DECODER,
    "vision-encoder-decoder": _ENCODER_DECODER,
    "kimi_k25": _LATENT,
    "dots3_note": _LATENT,
    "mistral_large4": _LATENT,
    "glm5_next": _INDEXED,
    "minimax_m3_vl": _INDEXED,
    "qwen4_exp": _INDEXED,
    "gemma3n": _SHARED,
    "diffusion_gemma": "it writes blocks of tokens by diffusion: there is no prefill after which to prune.",
    "git": "its image stands before the prompt and has no tokens in input_ids.",
}
"""``config.model_type`` -> a sentence that completes "plphp does not prune ... models:"."""


def reason_against(config: PretrainedConfig) -> str | None:
    """Return why a model cannot be pruned rightly, or None.

    Beside ``UNSUPPORTED`` this looks at the text model: a class of a supported family may be built on a text model
    whose layers do not cache keys and values of their own.
    """
    model_type = getattr(config, "model_type", "")
    if model_type in UNSUPPORTED:
        return UNSUPPORTED[model_type]
    text = config.get_text_config(decoder=True)
    if getattr(text, "num_kv_shared_layers", 0):
        return _SHARED
    if getattr(text, "attn_logit_softcapping", None):
        return _SOFTCAP
    if getattr(text, "index_topk", None):
        return _INDEXED
    if getattr(text, "kv_lora_rank", None):
        return _LATENT
    return None
