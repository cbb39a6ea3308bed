# SPDX-License-Identifier: Apache-2.0
"""The model: a small LLaVA (SigLIP tower, Qwen3 with grouped-query attention) built from a config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3Config,
    SiglipVisionConfig,
)
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from plphp.evaluation.tasks.synthetic import scenes

IMAGE_TOKENS = scenes.PATCHES**2


@dataclass(frozen=True)
class Structure:
    """Who sees whom in packed rows (``rows.py``): a causal prefix, then blocks that see the prefix and themselves.

    Attributes
    ----------
    pads
        Additive, shape (rows, 1, 1, prefix): hides the padding of the prefix.
    inner
        Additive, shape (rows, 1, blocks, 1, width, width): what the tokens of a block see of each other.
    """

    pads: Tensor
    inner: Tensor

    @classmethod
    def of(cls, blocks: Tensor, start: int, width: int, dtype: torch.dtype) -> Structure:
        """Read it from the block numbers, int64 (rows, seq), of rows whose blocks begin at ``start``."""
        rows = blocks.shape[0]
        pads = torch.zeros(rows, 1, 1, start, dtype=dtype, device=blocks.device)
        pads = pads.masked_fill(blocks[:, None, None, :start] != 0, HIDDEN)
        text = blocks[:, start:].view(rows, 1, -1, 1, width)
        causal = torch.ones(width, width, dtype=torch.bool, device=blocks.device).tril()
        seen = causal & (text[..., :, None] == text[..., None, :])
        return cls(pads, torch.zeros(seen.shape, dtype=dtype, device=blocks.device).masked_fill(~seen, HIDDEN))


HIDDEN, CLAMP, TINY = -1e4, 60.0, 1e-20
ATTRIBUTE_SCALE, VISION_SCALE = 3.0, 0.3
"""Size of an attribute's vector beside a random unit's, and standard deviation of the projector's output at first."""
PREFIX_PARTS = 3
PATCHES_KNOW, WORDS_KNOW = 1, 2
"""Layers after which patches, and the words of answers, are to know the number that ``training.rows.Row`` gives them:
the next one looks things up."""


def _exponentials(logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return exp(logits) and its sum over the last axis, kept, in float32.

    The maximum is not subtracted: that costs two passes over the largest tensors of the model, and the logits of one
    this small stay far from the clamp.
    """
    powers = logits.float().clamp(max=CLAMP).exp()
    return powers.to(dtype), powers.sum(-1, keepdim=True)


def _structured_attention(module, query, key, value, attention_mask=None, scaling=None, structure=None, **kwargs):
    """Attention of packed rows as matrix products over what is visible at all.

    On a CPU in bf16 the backward of matrix products is several times faster than SDPA's, and a dense mask over whole
    rows would spend half of the time on pairs that are hidden.
    """
    rows, q_heads, seq, dim = query.shape
    kv_heads, start = key.shape[1], structure.pads.shape[-1]
    groups = q_heads // kv_heads
    query = (query * scaling).view(rows, kv_heads, groups, seq, dim)
    done = []
    cuts = [start * i // PREFIX_PARTS for i in range(PREFIX_PARTS + 1)]
    for begin, end in pairwise(cuts):
        later = torch.full((end - begin, end), HIDDEN, dtype=query.dtype, device=query.device).triu(begin + 1)
        mask = structure.pads[..., :end] + later
        logits = query[:, :, :, begin:end].flatten(2, 3) @ key[:, :, :end].mT
        logits = logits.view(rows, kv_heads, groups, end - begin, end) + mask[:, :, None]
        powers, total = _exponentials(logits, value.dtype)
        part = (powers.flatten(2, 3) @ value[:, :, :end]).view(rows, kv_heads, groups, end - begin, dim)
        # Padding sees nothing.
        done.append(part / total.clamp(min=TINY))
    blocks, width = structure.inner.shape[2], structure.inner.shape[-1]
    text = query[:, :, :, start:].unflatten(3, (blocks, width)).transpose(2, 3)
    outer, outer_total = _exponentials(text.flatten(2, 4) @ key[:, :, :start].mT + structure.pads, value.dtype)
    inner = text.flatten(3, 4) @ key[:, :, start:].unflatten(2, (blocks, width)).mT
    inner, inner_total = _exponentials(inner.unflatten(3, (groups, width)) + structure.inner, value.dtype)
    own = inner.flatten(3, 4) @ value[:, :, start:].unflatten(2, (blocks, width))
    shape = rows, kv_heads, blocks, groups, width
    mixed = (outer @ value[:, :, :start]).view(*shape, dim) + own.view(*shape, dim)
    mixed = mixed / (outer_total.view(*shape, 1) + inner_total).clamp(min=TINY)
    done.append(mixed.transpose(2, 3).flatten(3, 4))
    out = torch.cat(done, 3).to(query.dtype).reshape(rows, q_heads, seq, dim)
    return out.transpose(1, 2).contiguous(), None


ATTENTION = "plphp_training"
IMPLEMENTATIONS = {"text_config": ATTENTION, "vision_config": "sdpa", "": "sdpa"}
AttentionInterface.register(ATTENTION, _structured_attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)


def build(
    vocab_size: int, image_token_id: int, end_id: int, pad_id: int, *, seed: int = 0, small: bool = False
) -> LlavaForConditionalGeneration:
    """Build the untrained model.

    Parameters
    ----------
    vocab_size, image_token_id, end_id, pad_id
        From the tokenizer.
    seed
        Of the initial weights.
    small
        A toy of the same shape, for tests.
    """
    torch.manual_seed(seed)
    vision = SiglipVisionConfig(
        hidden_size=48 if small else 192,
        intermediate_size=64 if small else 512,
        num_hidden_layers=1 if small else 4,
        num_attention_heads=2 if small else 6,
        image_size=scenes.SIDE,
        patch_size=scenes.PATCH,
        vision_use_head=False,
    )
    text = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=64 if small else 256,
        intermediate_size=96 if small else 768,
        num_hidden_layers=2 if small else 8,
        num_attention_heads=4 if small else 8,
        num_key_value_heads=2 if small else 4,
        head_dim=16 if small else 32,
        max_position_embeddings=4096,
        # At the default base of 10,000 most pairs of so small a head turn too far from a question to its image.
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=pad_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image_token_id,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
        eos_token_id=end_id,
        pad_token_id=pad_id,
    )
    model = LlavaForConditionalGeneration._from_config(
        config, attn_implementation={"text_config": ATTENTION, "vision_config": "sdpa", "": "sdpa"}
    )
    model.tie_weights()
    return model


def vision_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Return the tower's patch features as the model class reads them (before the projector).

    Parameters
    ----------
    model
        The model.
    pixels
        uint8, shape (images, 112, 112, 3).

    Returns
    -------
    Tensor
        Shape (images, 196, dim).
    """
    values = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    tower = model.model.vision_tower
    return tower(pixel_values=values, output_hidden_states=True).hidden_states[-1]


class Encoder(nn.Module):
    """The same features by a direct call of the encoder: it compiles without the hooks of the class."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        tower = model.model.vision_tower
        self.tower = getattr(tower, "vision_model", tower)

    def forward(self, pixels: Tensor) -> Tensor:
        """See ``vision_features``."""
        values = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.tower.encoder(inputs_embeds=self.tower.embeddings(values)).last_hidden_state


class PatchHead(nn.Module):
    """Class, colour, row and column of every patch from the tower's features: the pre-training target."""

    sizes = (len(scenes.OBJECTS), len(scenes.COLOURS) + 1, scenes.MAX_ROWS + 1, scenes.MAX_COLS + 1)

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, sum(self.sizes))

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and the accuracy of the object class on patches that show something.

        Parameters
        ----------
        features
            Shape (images, 196, dim).
        labels
            int64, shape (images, 14, 14, 4), from ``Scene.patch_labels``.
        """
        logits = self.linear(features).float().flatten(0, 1).split(self.sizes, -1)
        target = labels.reshape(-1, 4)
        shown = (target[:, 0] > 0).float()
        weight = 0.1 + 0.9 * shown
        losses = [F.cross_entropy(part, target[:, i], reduction="none") for i, part in enumerate(logits)]
        loss = ((losses[0] + 0.5 * losses[1]) * weight).sum() / weight.sum()
        loss = loss + 0.5 * ((losses[2] + losses[3]) * shown).sum() / shown.sum()
        right = ((logits[0].argmax(-1) == target[:, 0]).float() * shown).sum() / shown.sum()
        return loss, right.detach()


@torch.no_grad()
def start_projector(
    model: LlavaForConditionalGeneration, head: PatchHead, features: Tensor, words: Sequence[int | None]
) -> None:
    """Initialise the projector in the space of the text embeddings, from what the tower has learned to tell apart.

    Each class, colour, row and column of the pre-training target gets a hidden unit, and each unit that has a word
    writes the word's embedding: a patch of a red star starts near " red" plus " star". The other units pass a
    whitening of the tower's output through a random matrix. From a whitening alone the text model learned shapes and
    lost the colours on the way. The raw features are two orders of magnitude larger than the embeddings; training then
    sits on a plateau.

    Parameters
    ----------
    model
        Its projector is changed in place.
    head
        Trained with the tower.
    features
        Sample of the tower's output, shape (n, dim).
    words
        Token of each attribute, in the order of the head's outputs; None where there is no word for it.
    """
    projector = model.model.multi_modal_projector
    embeddings = model.get_input_embeddings().weight
    mean = features.mean(0)
    centred = features - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(features))
    whitening = vectors @ torch.diag((values + 0.01 * values.mean()).rsqrt()) @ vectors.T
    out_dim, in_dim = projector.linear_1.weight.shape
    attributes = head.linear.weight / (centred @ head.linear.weight.T).std(0)[:, None]
    others = max(in_dim, out_dim - len(attributes))
    rotation = torch.linalg.qr(torch.randn(others, in_dim))[0].to(mean.device) * (others / in_dim) ** 0.5
    first = torch.cat([attributes, rotation @ whitening])[:out_dim]
    projector.linear_1.weight.copy_(first)
    projector.linear_1.bias.copy_(-first @ mean)
    second = torch.randn(out_dim, out_dim).to(mean.device)
    for unit, word in enumerate(words[:out_dim]):
        if word is not None:
            second[:, unit] = embeddings[word]
        second[:, unit] *= ATTRIBUTE_SCALE * out_dim**0.5 / second[:, unit].norm()
    projector.linear_2.weight.copy_(second)
    projector.linear_2.bias.zero_()
    hidden = projector.act(projector.linear_1(features))
    projector.linear_2.weight.mul_(VISION_SCALE / projector.linear_2(hidden).std())
    projector.linear_2.bias.copy_(-projector.linear_2(hidden).mean(0))


class AnswerLoss(nn.Module):
    """Training forward over packed rows (``rows.py``), with the modules and weights of the model class."""

    def __init__(self, model: LlavaForConditionalGeneration, numbers: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.numbers = list(numbers)

    def forward(
        self,
        features: Tensor,
        ids: Tensor,
        labels: Tensor,
        numbers: Tensor,
        positions: Tensor,
        structure: Structure,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean loss over answer tokens, the share of them that are right, and the loss of the numbering.

        The numbering is a help: with several images, every patch says after a layer which image it is of, and every
        word of an answer after another which image was asked about or found (in one image, which line or row). A thing
        that was found can be said to be in that image, and a place can be looked up in the image that was asked about,
        only if both sides know; without this loss they hardly learn to.

        Parameters
        ----------
        features
            Tower output, shape (images, 196, dim); the images of a row follow one another.
        ids, labels, numbers, positions
            int64, shape (rows, seq); see ``training.rows.Row``.
        structure
            Who sees whom. No label stands before the last position of the prefix.
        """
        embeds = self.model.get_input_embeddings()(ids)
        images = self.model.model.multi_modal_projector(features)
        is_image = (ids == self.model.config.image_token_id).unsqueeze(-1)
        embeds = embeds.to(images.dtype).masked_scatter(is_image, images)
        decoder = self.model.model.language_model
        turned = decoder.rotary_emb(embeds, positions)
        hidden, numbering = embeds, embeds.new_zeros(())
        start = structure.pads.shape[-1]
        for number, layer in enumerate(decoder.layers, start=1):
            hidden = layer(hidden, position_embeddings=turned, position_ids=positions, structure=structure)
            if number == PATCHES_KNOW:
                numbering = numbering + self._numbering(decoder.norm(hidden[:, :start]), numbers[:, :start])
            if number == WORDS_KNOW:
                numbering = numbering + self._numbering(decoder.norm(hidden[:, start:]), numbers[:, start:])
        hidden = decoder.norm(hidden)
        text_start = start - 1
        hidden = hidden[:, text_start:]
        logits = self.model.lm_head(hidden).float()
        target = labels[:, text_start:]
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)
        with torch.no_grad():
            scored = target >= 0
            right = ((logits.argmax(-1) == target) & scored).sum() / scored.sum()
        return loss, right, numbering

    def _numbering(self, hidden: Tensor, target: Tensor) -> Tensor:
        known = self.model.get_input_embeddings().weight[self.numbers]
        logits = (hidden @ known.to(hidden.dtype).T).float()
        total = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum")
        return total / (target >= 0).sum().clamp(min=1)
