# SPDX-License-Identifier: Apache-2.0
"""A tiny model with its inputs, of a first turn and of a second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from precision import float64, working_dtype

from .batches import PER_TOKEN, cast, collate, drop_empty, join
from .images import Encode
from .stock import USUAL, Stock
from .tokens import (
    BOS,
    EOS,
    IMAGE,
    PAD,
    SPECIAL,
    START,
    VIDEO,
    VIDEO_END,
    VIDEO_START,
    Tokens,
    random_text,
    seeded,
    shifted,
)
from .weights import randomize


@dataclass(frozen=True)
class TinyFamily:
    """How to build a tiny model, how to make inputs for it, and what stock ``generate`` does with it.

    Parameters
    ----------
    family : str
        Name of the plphp family that the model belongs to.
    model_class : str
        Name of the model class in ``transformers``.
    config : callable
        Returns a fresh configuration.
    images, videos : callable
        Make the images (videos) of a row. ``videos`` is None where the class knows images only.
    token_types : str, optional
        Name under which the processor returns token types (0 text, 1 image, 2 video), or None.
    prefix_types : bool
        Whether the token types are 0 all over the prompt: PaliGemma marks the answer only.
    image_axis : int
        Axis of ``pixel_values`` along which the images of a row lie.
    stock : Stock
        What stock ``generate`` does right with the model. Left padding is exact for all of them.
    """

    family: str
    model_class: str
    config: Callable[[], Any]
    images: Encode
    videos: Encode | None = None
    token_types: str | None = None
    prefix_types: bool = False
    image_axis: int = 0
    stock: Stock = USUAL

    def build(self, seed: int = 0, dtype: torch.dtype | None = None) -> Any:
        """Return the model in eval mode, with weights that make attention and greedy outputs vary.

        Parameters
        ----------
        seed : int
            Of the weights.
        dtype : torch.dtype, optional
            Default: float64 inside of `precision.float64`, float32 elsewhere.

        Raises
        ------
        TypeError
            If a test in float64 names a dtype.
        """
        dtype = dtype or working_dtype()
        if dtype is not torch.float64 and working_dtype() is torch.float64:
            raise TypeError(f"expected float64 inside of precision.float64, got {dtype}: mark the test own_dtype")
        # Rotary frequencies are worked out here, and a model is shared: float64 is float64 whoever builds it first.
        with float64() if dtype is torch.float64 else nullcontext():
            with torch.random.fork_rng(devices=[]):
                # for what randomize leaves: vectors, among them newline tokens and decay rates
                torch.manual_seed(shifted(seed))
                model = getattr(transformers, self.model_class)(self.config())
            randomize(model, seed)
        model.generation_config.pad_token_id = PAD
        model.generation_config.eos_token_id = None
        # a generated placeholder would be taken for an image by the next turn
        model.generation_config.suppress_tokens = [PAD, BOS, EOS, *SPECIAL]
        for weight in model.parameters():  # buffers stay: from_pretrained keeps rotary frequencies in float32
            weight.data = weight.data.to(dtype)
        if dtype is torch.float64:
            model.double()
            # torch's grouped product, the default of routed experts, takes no float64
            model.set_experts_implementation("eager")
        return model.eval()

    def rows(
        self,
        model: Any,
        images_per_row: Sequence[int] = (1,),
        text: tuple[int, int] = (5, 7),
        seed: int = 0,
        video: bool = False,
    ) -> list[dict[str, Any]]:
        """Return the rows that ``inputs`` collates, each as a batch of one without padding."""
        return [drop_empty(row) for row in self._rows(model, images_per_row, text, seed, video)]

    def inputs(
        self,
        model: Any,
        images_per_row: Sequence[int] = (1,),
        text: tuple[int, int] = (5, 7),
        seed: int = 0,
        video: bool = False,
    ) -> dict[str, Any]:
        """Return inputs of ``generate``, left-padded; every image is random noise of its own.

        Parameters
        ----------
        model : PreTrainedModel
            What ``build`` returned.
        images_per_row : sequence of int
            Images (videos where ``video``) of each row; 0 is allowed.
        text : tuple of int
            Text tokens before and after the images. Row r has 2 r more before them, so that rows are padded.
        seed : int
            Of the noise and the text.
        video : bool
            Videos in the place of images.

        Raises
        ------
        ValueError
            If the class knows images only.
        """
        return drop_empty(collate(self._rows(model, images_per_row, text, seed, video)))

    def _rows(
        self, model: Any, images_per_row: Sequence[int], text: tuple[int, int], seed: int, video: bool
    ) -> list[dict[str, Any]]:
        generator = seeded(seed)
        encode = self.videos if video else self.images
        if encode is None:
            raise ValueError(f"{self.model_class} takes no videos")
        rows, first = [], 0
        for index, count in enumerate(images_per_row):
            pieces, tensors = encode(model.config, count, first, generator)
            first += count
            tokens = [BOS, *random_text(text[0] + 2 * index, generator)]
            for position, piece in enumerate(pieces):
                tokens += [*(random_text(2, generator) if position else []), *piece]
            tokens += random_text(text[1], generator)
            rows.append({**self.tokenized(tokens), **cast(tensors, model.dtype)})
        return rows

    def second_turn(
        self,
        model: Any,
        first_inputs: dict[str, Any],
        first_output_ids: torch.Tensor,
        with_image: bool = False,
        seed: int = 1,
    ) -> dict[str, Any]:
        """Return inputs of a second ``generate`` that goes on with the cache of the first.

        Parameters
        ----------
        model : PreTrainedModel
            What ``build`` returned.
        first_inputs : dict
            What ``inputs`` returned for the first turn.
        first_output_ids : Tensor
            What ``generate`` returned for the first turn, prompt and answer.
        with_image : bool
            Whether each row shows a new image.
        seed : int
            Of the noise and the text.

        Returns
        -------
        dict
            To be passed with ``past_key_values``. Tokens, mask and token types are those of the whole
            conversation, the image tensors those of the new images. With m-RoPE new images need
            ``position_ids`` too: ``generate`` makes wrong ones (5.17) or stops (5.23).
        """
        turn = collate(self.new_parts(model, len(first_output_ids), with_image, seed))
        inputs = {name: value for name, value in turn.items() if name not in PER_TOKEN}
        inputs["input_ids"] = torch.cat([first_output_ids, turn["input_ids"]], dim=1)
        answer = first_output_ids.shape[1] - first_inputs["input_ids"].shape[1]
        for name in PER_TOKEN[1:]:
            if name in first_inputs:
                middle = first_inputs[name].new_full((len(first_output_ids), answer), name == "attention_mask")
                inputs[name] = torch.cat([first_inputs[name], middle, turn[name]], dim=1)
        if with_image and self.token_types == "mm_token_type_ids" and "image_grid_thw" in inputs:
            inputs["position_ids"] = _mrope_positions(model, first_inputs, inputs)
        return drop_empty(inputs)

    def whole(
        self,
        model: Any,
        first_rows: Sequence[dict[str, Any]],
        first_output_ids: torch.Tensor,
        with_image: bool = False,
        seed: int = 1,
    ) -> list[dict[str, Any]]:
        """Return the conversation of ``second_turn`` as whole prompts, a prompt for each row.

        Parameters
        ----------
        first_rows : sequence of dict
            What ``rows`` returned for the first turn.
        """
        new_parts = self.new_parts(model, len(first_rows), with_image, seed)
        answer = first_output_ids.shape[1] - max(row["input_ids"].shape[1] for row in first_rows)
        rows = []
        for row, new, output in zip(first_rows, new_parts, first_output_ids, strict=True):
            ids = [row["input_ids"][0], output[output.shape[0] - answer :], new["input_ids"][0]]
            joined: dict[str, Any] = self.tokenized(torch.cat(ids).tolist())
            for name in (new.keys() | row.keys()) - set(PER_TOKEN):
                parts = [part[name] for part in (row, new) if name in part]
                flat = [part.flatten(0, self.image_axis) for part in parts]
                joined[name] = join(flat).unflatten(0, (1,) * self.image_axis + (-1,))
            rows.append(drop_empty(joined))
        return rows

    def new_parts(self, model: Any, rows: int, with_image: bool, seed: int) -> list[dict[str, Any]]:
        """Return what a second turn adds to each row."""
        generator = seeded(seed)
        parts = []
        for _ in range(rows):
            pieces, tensors = self.images(model.config, int(with_image), 0, generator)
            tokens = [
                *random_text(3, generator),
                *(token for piece in pieces for token in piece),
                *random_text(6, generator),
            ]
            parts.append({**self.tokenized(tokens), **cast(tensors, model.dtype)})
        return parts

    def tokenized(self, tokens: Tokens) -> dict[str, torch.Tensor]:
        """Return what the processor makes of the tokens of a row: ids, mask and token types."""
        input_ids = torch.tensor([tokens])
        row = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if self.token_types is not None:
            in_video = (input_ids == VIDEO_START).cumsum(-1) > (input_ids == VIDEO_END).cumsum(-1)
            types = (input_ids == IMAGE).long() + (input_ids == VIDEO).long() * 2
            types = torch.where((types == 1) & in_video, 2, types)
            row[self.token_types] = torch.zeros_like(types) if self.prefix_types else types
        return row


def _mrope_positions(model: Any, first: dict[str, Any], second: dict[str, Any]) -> torch.Tensor:
    """Return positions (4, batch, seq) of the whole conversation: text, then frame, row and column."""
    old = first.get("image_grid_thw", torch.zeros(0, 3).long())
    counts = (first["input_ids"] == START).sum(1).tolist() if len(old) else [0] * len(second["input_ids"])
    new = second["image_grid_thw"].split(1)
    grids = torch.cat([part for parts in zip(old.split(counts), new, strict=True) for part in parts])
    mask = second["attention_mask"]
    positions, _ = model.model.get_rope_index(
        second["input_ids"],
        second["mm_token_type_ids"],
        image_grid_thw=grids,
        video_grid_thw=first.get("video_grid_thw"),
        attention_mask=mask,
    )
    return torch.cat([(mask.cumsum(-1) - 1).clamp(min=0)[None], positions])
