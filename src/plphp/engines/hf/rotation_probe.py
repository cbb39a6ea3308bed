# SPDX-License-Identifier: Apache-2.0
"""How a model rotates its queries by their position: candidates are compared with what it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plphp.errors import UnsupportedModelError
from plphp.io.quoting import one_line
from plphp.policy.rotation import Rotation
from plphp.policy.rotation_finding import POSITIONS, explaining_rotations, growing_kind

from .attachment import Attachment, Lease
from .cache_argument import passed
from .guarded import GuardedCache


def rotations_of(attachment: Attachment) -> Mapping[int, Rotation]:
    """The rotations of an attached model, looked for once.

    Raises
    ------
    UnsupportedModelError
        See `find_rotations`.
    """
    if attachment.rotations is None:
        attachment.rotations = find_rotations(attachment.model)
    return attachment.rotations


def find_rotations(model: PreTrainedModel) -> dict[int, Rotation]:
    """Find the rotation of every full-attention layer.

    A prompt of one token attends to itself alone, so that its queries are the same at every position but for the
    rotation. The frequencies that the model holds are tried, in both layouts; what explains the queries is taken.

    Parameters
    ----------
    model : PreTrainedModel
        A supported vision-language model.

    Returns
    -------
    dict of int to Rotation
        By decoder layer.

    Raises
    ------
    UnsupportedModelError
        If nothing explains the queries of a layer, or the frequencies grow with the prompt.
    """
    _refuse_growing(model)
    decoder: Any = model.get_decoder()
    known = {
        tuple(buffer.tolist()): buffer.detach().float().cpu()
        for name, buffer in decoder.named_buffers()
        if name.endswith("inv_freq") and buffer.ndim == 1
    }
    candidates = [Rotation(frequencies, interleaved) for frequencies in known.values() for interleaved in (False, True)]
    queries = {position: _queries(model, decoder, position) for position in (0, *POSITIONS)}
    seen = {layer: {position: of_layers[layer] for position, of_layers in queries.items()} for layer in queries[0]}
    return explaining_rotations(seen, candidates, f"this {model.config.model_type!r} model")


class _NewestQueries(GuardedCache):
    """A cache that notes the query of the newest token in every layer, and evicts nothing.

    Attributes
    ----------
    queries : dict of int to Tensor
        float32 [q_heads, dim] by decoder layer.
    """

    def __init__(self, attachment: Attachment) -> None:
        super().__init__(attachment)
        self.queries: dict[int, Tensor] = {}

    def after_attention(self, layer_idx: int, query: Tensor, scaling: float) -> None:
        """Note the query of a layer."""
        self._guard.pending = None
        self.queries[layer_idx] = query[0, :, -1].float().cpu()

    def hidden(self, layer_idx: int) -> Tensor | None:
        """None: no token leaves."""
        return None


@torch.no_grad()
def _queries(model: PreTrainedModel, decoder: Any, position: int) -> dict[int, Tensor]:
    """By layer, the queries [q_heads, dim] of a prompt of one token at a position."""
    lease = Lease.of(model)
    try:
        cache = _NewestQueries(lease.attachment)
        # Padding tokens have empty embeddings in some models.
        token = model.get_input_embeddings().weight.norm(dim=-1).argmax()
        position_ids = torch.tensor([[position]], device=model.device)
        decoder(input_ids=token.view(1, 1), position_ids=position_ids, **passed(cache), use_cache=True)
        return cache.queries
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"The text model of this {model.config.model_type!r} model cannot read a single token at a position of "
            f"its own: {one_line(error)}"
        ) from error
    finally:
        lease.end()


def _refuse_growing(model: PreTrainedModel) -> None:
    kind = growing_kind(getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {})
    if kind is not None:
        raise UnsupportedModelError(
            f"The rotary embedding of this {model.config.model_type!r} model is of the kind {kind!r}, whose "
            "frequencies depend on the length of the prompt: its queries cannot be foretold."
        )
