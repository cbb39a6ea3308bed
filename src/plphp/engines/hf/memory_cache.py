# SPDX-License-Identifier: Apache-2.0
"""A cache that remembers images within a budget: which it holds, and how they fade."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from plphp.errors import CacheStateError, ConfigError, UnsupportedFeatureError
from plphp.families.spans import VisionSpans
from plphp.policy.chain import Chain
from plphp.pruning.asked_images import LOOKED, AskedImages
from plphp.pruning.dropping import forget, insert, settle
from plphp.pruning.fading import Fading, fade, vision_nbytes
from plphp.pruning.host_images import HostImages, WholeLayer
from plphp.pruning.image_bytes import ImageBytes
from plphp.pruning.image_memory import image_memories
from plphp.pruning.image_report import ImageMemory
from plphp.pruning.image_table import ImageTable
from plphp.pruning.noting import note_placed
from plphp.pruning.placement import LayerPlacement
from plphp.pruning.scoring import Attended
from plphp.pruning.tail_tokens import TailTokens

from .attachment import Attachment
from .layer import PrunedLayer
from .packed_cache import PackedCache
from .restoring import compute, earlier_layer, recognised, refuse_restoring


class MemoryCache(PackedCache):
    """A cache whose images fade when they take more than a budget.

    Attributes
    ----------
    fading : Fading or None
        The budget, and how images fade; None without one. Then nothing is noted of images.
    looking : bool
        Whether decoding steps show which images an answer turns to, see `AskedImages`: the first do, but for those that
        are replayed from a CUDA graph.
    """

    chain: Chain

    def __init__(self, attachment: Attachment) -> None:
        super().__init__(attachment)
        self.fading: Fading | None = None
        self._images = ImageTable()
        self._on_host = HostImages()
        self._fades_later = False
        self._width = 0  # bytes of a token held whole, when images faded last
        self._asked: AskedImages | None = None
        self.looking = False

    def begin_answer(self) -> None:
        """Before a turn is read: the first steps of its answer are to show which images it turns to."""
        self._asked, self.looking = None, self.fading is not None
        self._images.note_attention([[0.0] * len(row) for row in self._images.rows])

    def look_at_images(self, attended: Attended) -> None:
        """Take in a layer that has attended in one of the first decoding steps of an answer."""
        if self.reading is not None or attended.query.shape[2] != 1 or not any(self._images.rows):
            return
        if not len(self.history.valid):  # beams are in the making: their rows are none of the conversation
            self._asked, self.looking = None, False
            return
        if self._asked is None:
            self._asked = AskedImages(self._images)
        if attended.entries.ledger is not None:
            self._asked.note(attended)
        if attended.layer == self._last and self._asked.steps == LOOKED:
            self.end_look()

    @torch.no_grad()
    def end_look(self) -> None:
        """Note which images the answer turns to."""
        started = time.perf_counter()
        if self._asked is not None and self._asked.steps > 1:
            self._images.note_attention(self._asked.figures(self.history.valid))
        self._asked, self.looking = None, False
        self.pruning_seconds += time.perf_counter() - started

    def note_answer(self, output: Any) -> None:
        """Note the tokens that ``generate`` returned, and end what a short answer has left open."""
        self.end_look()
        super().note_answer(output)

    def before_placed(self, tokens: TailTokens, part: LayerPlacement, spans: VisionSpans) -> None:
        """Copy images to host memory before a layer is placed, where they are to wait there."""
        if self.fading is not None and self.fading.on_host:
            number = part.scores.layer
            self._on_host.note(number, self._pruned[number], tokens, part.scores.vision, spans.start)

    def note_placed(self, tokens: TailTokens, part: LayerPlacement, spans: VisionSpans) -> None:
        """Note of which tokens the entries of a layer are that has just been placed."""
        if self.fading is not None:
            note_placed(self._pruned[part.scores.layer], tokens, part, spans.start)

    def end_prompt(self, spans: VisionSpans) -> None:
        """Note the images of a prompt that all layers have read, and let images fade."""
        if self.fading is not None:
            rotary = None if self._turn is None else self._turn.placed
            self._images.note(spans, len(self.history.prompts), rotary)
            if not self._fades_later:
                self._fade(self.fading)

    def after_pass(self) -> None:
        """Let images fade where a pass outside of autocast has left what is held whole in a wider dtype."""
        if self.fading is not None and self._width and self._width != self._token_nbytes():
            with torch.no_grad(), self._ended_by_errors():
                self._fade(self.fading)

    def _fade(self, fading: Fading) -> None:
        fade(self._pruned, self._images, fading)
        self._width = self._token_nbytes()

    def _token_nbytes(self) -> int:
        return sum(layer.entry_nbytes for layer in self._pruned.values())

    @contextmanager
    def fading_later(self) -> Iterator[None]:
        """Let images fade at the end of the context, and not at the end of the prompts that are read in it."""
        self._fades_later = True
        try:
            yield
        finally:
            self._fades_later = False
        if self.fading is not None:
            with torch.no_grad(), self._ended_by_errors():
                self._fade(self.fading)

    @property
    def images(self) -> list[ImageMemory]:
        """What is held of each image of the conversation.

        Raises
        ------
        UnsupportedFeatureError
            If the cache has no ``vision_budget``: then it does not know of which image an entry is.
        """
        self._need_budget("say what it holds of its images")
        return image_memories(self._pruned, self._images)

    @property
    def image_bytes(self) -> ImageBytes:
        """What the images take."""
        if self.fading is None or not any(self._images.rows):
            return ImageBytes()
        held = sum(vision_nbytes(layer, self._images) for layer in self._pruned.values())
        return ImageBytes(held, self.fading.budget_of(self._pruned), self._on_host.nbytes)

    @property
    def images_on_host(self) -> bool:
        """Whether whole images wait in host memory, so that `restore` needs no features."""
        return self.fading is not None and self.fading.on_host

    def forget(self, image: int) -> None:
        """Free all entries of an image, in all layers. Its tokens still count as seen; the text around it stays.

        Parameters
        ----------
        image : int
            Its number in `images`.

        Raises
        ------
        ConfigError
            If there is no such image.
        UnsupportedFeatureError
            If the cache has no ``vision_budget``: one that never binds will do.
        CacheStateError
            If a prompt has been planned and not been read.
        """
        self._need_budget("forget an image")
        row, place = self._image_at(image)
        started = time.perf_counter()
        with torch.no_grad(), self._ended_by_errors():
            forget(self._pruned, self._images, self._need_fading(), row, place)
            self._fade(self._need_fading())  # rows that shared entries have their own now
        self.pruning_seconds += time.perf_counter() - started

    def restore(self, image: int, **features: Any) -> None:
        """Compute an image again, so that all of it is held whole; then the budget is applied, with it as the newest.

        Its tokens pass the model once more at their positions, behind what is held now of the tokens before them. With
        nothing faded but this image, and a method that keeps all, the cache is as it was when the image had been read.
        While it runs, what is held of those tokens is there twice. With ``tier_device="cpu"`` the image comes from host
        memory as it was read, and needs no features; what is given of them is only compared. From then on it fades as
        the newest of the others.

        Parameters
        ----------
        image : int
            Its number in `images`; of an image in tiles that of any tile. Those whose features are one tensor all
            come back, but from host memory that tile alone.
        **features
            What the processor returned for this image, such as ``pixel_values``, or for several among which it is:
            it is recognised by a fingerprint.

        Raises
        ------
        HistoryError
            If the features are of other images.
        ConfigError
            If there is no such image, or there are no features of images.
        UnsupportedFeatureError
            If the cache has no ``vision_budget``, or the image cannot be computed again as it was: behind methods that
            act before the KV cache, and in models whose layers have windows or a state, or whose images attend to what
            follows them; and after an answer with beams.
        CacheStateError
            If a prompt has been planned and not been read.
        """
        self._need_budget("restore an image")
        self._refuse_spent("restore an image")
        row, place = self._image_at(image)
        started, fading = time.perf_counter(), self._need_fading()
        with torch.no_grad():
            if fading.on_host and features:
                recognised(self.attachment.model, self.history, self._images, row, place, features)
            whole = self._from_host(row, place) if fading.on_host else self._computed(row, place, features)
        with torch.no_grad(), self._ended_by_errors():
            for of_image, layers in whole.items():
                forget(self._pruned, self._images, fading, row, of_image)
                for number, states in layers.items():
                    insert(self._pruned[number], row, states)
                self._images.mark_restored(row, of_image)
            self._fade(fading)
            for layer in self._pruned.values():
                if layer.ledger is not None:
                    settle(layer, self._images, row, list(whole))
        self.pruning_seconds += time.perf_counter() - started

    def _from_host(self, row: int, place: int) -> dict[int, dict[int, WholeLayer]]:
        """An image as it waits in host memory, by its place in the row and by layer."""
        image = self._images.rows[row][place]
        states = {number: self._on_host.image(row, number, image) for number in self._pruned}
        return {place: {number: own for number, own in states.items() if own is not None}}

    def _computed(self, row: int, place: int, features: Mapping[str, Any]) -> dict[int, dict[int, WholeLayer]]:
        """An image computed again, with its tiles, by their places in the row and by layer."""
        model, fading, images = self.attachment.model, self._need_fading(), self._images
        refuse_restoring(model, self, [link.method for link in self.chain.changes_prefill])
        found = recognised(model, self.history, images, row, place, features)
        alone, again = copy.copy(images), self._blank()
        alone.select([row])
        for number, layer in self._pruned.items():
            again.put_layer(number, earlier_layer(number, layer, alone, fading, row, found.sent.first))
        compute(model, again, self.history, images.rows[row][place], found)
        tails = {number: layer.tail() for number, layer in again._pruned.items()}
        return {
            own: {number: WholeLayer.of_span(tail, found.sent.first, position) for number, tail in tails.items()}
            for own in found.places
            for position in (images.rows[row][own].positions,)
        }

    def _blank(self) -> MemoryCache:
        """A cache of the same model that has read nothing and prunes nothing."""
        raise NotImplementedError

    def put_layer(self, number: int, layer: PrunedLayer) -> None:
        """Put a layer in the place of another."""
        self.layers[number] = self._pruned[number] = layer

    def memory_values(self) -> dict[str, Any]:
        """What a report says of the memory of images, beside the images."""
        ledgers = [layer.ledger for layer in self._pruned.values() if layer.ledger is not None]
        if self.fading is None or not ledgers:
            return {}
        return {
            "budget_bytes": self.fading.budget_of(self._pruned),
            "ledger_bytes": sum(ledger.nbytes for ledger in ledgers),
            "host_bytes": self._on_host.nbytes,
        }

    def _image_at(self, image: int) -> tuple[int, int]:
        """The row of an image, and its place in it."""
        self.check_alive()
        if self.reading is not None:
            raise CacheStateError("A prompt has been planned and not been read to its end: read it first.")
        numbered = self._images.numbered()
        if isinstance(image, bool) or not isinstance(image, int) or not 0 <= image < len(numbered):
            last = f"the images 0 to {len(numbered) - 1}" if numbered else "no images"
            raise ConfigError(f"The cache has read {last}, got image {image!r}: see cache.images.")
        return numbered[image]

    def _need_fading(self) -> Fading:
        assert self.fading is not None
        return self.fading

    def _need_budget(self, what: str) -> None:
        """Raise without a budget."""
        if self.fading is None:
            raise UnsupportedFeatureError(
                f"A PrunedCache can {what} where it has a vision_budget, and this one has none: it does not know of "
                "which image an entry is. Give one in its config, such as vision_budget=1GB."
            )

    def reset(self) -> None:
        """Forget everything; the next prompt has to be planned again."""
        super().reset()
        self._images, self._on_host, self._width = ImageTable(), HostImages(), 0

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (numbers, or a bool mask)."""
        super().batch_select_indices(indices)
        self._select_images(indices.nonzero()[:, 0].tolist() if indices.dtype is torch.bool else indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        rows = range(len(self._images.rows))
        self._select_images([row for row in rows for _ in range(repeats)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows, as beam search does."""
        super().reorder_cache(beam_idx)
        self._select_images(beam_idx.tolist())

    def _select_images(self, rows: Sequence[int]) -> None:
        if self.fading is not None:
            self._images.select(rows)
            self._on_host.select(rows)
