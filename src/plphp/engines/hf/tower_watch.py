# SPDX-License-Identifier: Apache-2.0
"""The vision tower's attention while a cache reads a prompt, for methods that choose by it before the text model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plphp.errors import SpanError, UnsupportedFeatureError
from plphp.policy.chain import Chain
from plphp.policy.image_tokens import TowerEvidence

from .tower_record import TowerRecord
from .tower_recording import recorded_tower
from .tower_scores import token_scores


class TowerWatch:
    """What a vision tower says of one prompt.

    Parameters
    ----------
    model : PreTrainedModel
        The model.
    asked : TowerEvidence
        What the method wants to know.
    inputs : mapping
        The prompt as it was planned: the whole conversation, with the features of new images alone.
    past_length : int
        Tokens that the cache holds already.
    """

    def __init__(
        self, model: PreTrainedModel, asked: TowerEvidence, inputs: Mapping[str, Any], past_length: int
    ) -> None:
        self._model, self._asked, self._inputs, self._past = model, asked, inputs, past_length
        self._record: TowerRecord | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, chain: Chain, inputs: Mapping[str, Any], past_length: int) -> TowerWatch | None:
        """The same for a chain of methods; None where no method asks."""
        return None if chain.tower is None else cls(model, chain.tower, inputs, past_length)

    @contextmanager
    def open(self) -> Iterator[None]:
        """While open, the tower is recorded."""
        try:
            with recorded_tower(self._model, self._asked.layers) as self._record:
                yield
        finally:
            self._record = None  # what runs later is not of this record

    def __deepcopy__(self, memo: dict[int, Any]) -> TowerWatch:
        # A copied cache belongs to the same model, and reads the same prompt.
        return TowerWatch(self._model, self._asked, self._inputs, self._past)

    def scores(self) -> list[Tensor]:
        """The attention that the patches behind each token get, image by image in the order of the batch.

        Returns
        -------
        list of Tensor
            float32 [layers, tokens]; inf for a token that no patch stands behind.

        Raises
        ------
        UnsupportedFeatureError
            If the tower was not recorded, or read other images than the prompt has.
        """
        if self._record is None or not self._record.passes:
            raise UnsupportedFeatureError(
                "The method reads the attention inside of the vision tower, which runs before the cache is asked: call "
                "model.generate, or run the model inside of `with cache.tower_recorded():`."
            )
        passes = self._record.passes
        of_layers = []
        for number in range(len(passes[0].received)):
            patches = [run.received[number] if run.class_rows is None else run.class_rows[number] for run in passes]
            try:
                rows = token_scores(self._model, self._inputs, patches, past_length=self._past)
            except SpanError as error:
                raise UnsupportedFeatureError(
                    "The vision tower read other images than those of the prompt: this version of transformers lets it "
                    "read each image once for every beam and every returned sequence. Decode with num_beams=1 and "
                    "num_return_sequences=1, or take a method that does not read the tower, such as 'divprune'."
                ) from error
            of_layers.append([image for row in rows for image in row])
        return [torch.stack(image) for image in zip(*of_layers, strict=True)]
