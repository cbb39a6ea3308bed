# SPDX-License-Identifier: Apache-2.0
"""The vision tokens that leave a prompt before decoder layers get it: before the text model, and inside prefill.

A layer gets a `Packing` of the tokens of the pass. Each drop narrows that of the layers before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from torch import Tensor

from plphp.errors import ConfigError, UnsupportedModelError
from plphp.families.spans import Grid, VisionSpans, query_mask
from plphp.policy.chain import Chain
from plphp.policy.evidence import LayerScores
from plphp.policy.image_tokens import ImageTokens

from .leaving_checks import check_chosen, check_grid, check_layer, check_mask, check_rate
from .left_tokens import LeftTokens
from .packing import Packing

TowerScores = Callable[[], Sequence[Tensor]]
"""Gives the attention inside of the vision tower by images, in the order of the batch: float32 [layers, tokens]."""


class Leaving:
    """The tokens that each decoder layer gets of one prompt, which comes in one piece.

    Parameters
    ----------
    spans : VisionSpans
        Where its vision tokens are.
    chain : Chain
        What is done at each stage.
    pruned_layers : sequence of int
        The decoder layers whose attention is known: those with full attention.
    layers : int
        Decoder layers of the model.

    Raises
    ------
    ConfigError
        If tokens are to leave before a layer that there is not.
    UnsupportedModelError
        If no layer before has full attention, by which they could be ranked.
    """

    def __init__(self, spans: VisionSpans, chain: Chain, pruned_layers: Sequence[int], layers: int) -> None:
        self.spans, self.chain, self._layers = spans, chain, layers
        self._packings: dict[int, Packing] = {}
        self._shares: dict[int, list[float]] = {}  # by layers before which tokens leave, of the rows
        self._not_finite: set[int] = set()
        self._unranked: set[int] = set()
        self._times = 1  # rows that each row of the prompt stands for
        self.computed: dict[int, int] = {}
        """By decoder layer, the tokens that it has computed, over the rows."""
        self.entered = chain.encoder is None
        """Whether the encoder stage has chosen."""
        self._drops = self._checked(pruned_layers)

    @classmethod
    def of(cls, spans: VisionSpans, chain: Chain, pruned_layers: Sequence[int], layers: int) -> Leaving | None:
        """The same; None where the chain acts on the KV cache alone."""
        return cls(spans, chain, pruned_layers, layers) if chain.acts_early else None

    @property
    def asked_layers(self) -> set[int]:
        """The layers whose scores decide what leaves before later ones."""
        return set(self._drops)

    def packing_at(self, layer: int) -> Packing | None:
        """The tokens that a layer gets; None where it gets them all."""
        return self._packings.get(max((before for before in self._packings if before <= layer), default=-1))

    def share_at(self, layer: int, row: int) -> float:
        """Which share of a row's vision tokens a layer gets, as the methods were asked for."""
        share = 1.0
        if self.chain.encoder is not None and row not in self._not_finite:
            share = self.chain.encoder.stage.rate(self.chain.encoder.config)
        return share * self._shares_at(layer)[row]

    def enter(self, states: Tensor, tower: TowerScores | None = None) -> Tensor:
        """Let tokens leave before the text model.

        Parameters
        ----------
        states : Tensor
            [batch, tokens, dim]; what the first layer would be given.
        tower : callable, optional
            The attention inside of the vision tower, where the method asks for it.

        Returns
        -------
        Tensor
            The same, with the features of merged tokens in their places; not packed yet.
        """
        self.entered = True
        link = self.chain.encoder
        if link is None:
            return states
        stay = self.spans.valid[:, self.spans.start :].clone()
        of_tower = self._of_tower(tower() if tower is not None and link.stage.tower(link.config) is not None else ())
        merged = states
        for row, number, index in self._images():
            image = self._image(states[row], row, number, index, of_tower.get((row, number)))
            # What is not finite cannot be told apart. The row stays whole, and the KV stage names it.
            if not bool(image.features.isfinite().all()):
                self._not_finite.add(row)
                continue
            chosen = link.stage.choose(image, link.config)
            check_chosen(link.method, chosen, image)
            kept = chosen.stay.cpu()
            stay[row, index[~kept]] = False
            if chosen.features is not None:
                merged = merged.clone() if merged is states else merged
                merged[row, index[kept].to(states.device)] = chosen.features.to(states)
        stay |= self._last_tokens()
        self._packings[0] = Packing.of(stay)
        return merged

    def after(self, layer: int, scores: LayerScores, unranked: Sequence[int]) -> None:
        """Let tokens leave inside prefill, once a layer is scored by which they are ranked.

        Parameters
        ----------
        layer : int
            Number of the layer.
        scores : LayerScores
            Its scores, of the tokens that it has.
        unranked : sequence of int
            Rows that cannot be ranked; from now on nothing of them leaves.
        """
        link = self.chain.prefill
        if link is None:
            return
        self._unranked |= set(unranked)
        base = self.packing_at(layer)
        # An answer may stand before the prompt in the tail: the tokens of this pass are its last.
        own = self.spans.end - self.spans.start if base is None else base.packed
        last = self._last_tokens() if base is None else base.take(self._last_tokens(), fill=False)
        came = self._came()
        for first, share in self._drops.get(layer, {}).items():
            there = scores.vision.sum(1).tolist()
            rates = [min(1.0, share * all_of / left) if left else 1.0 for all_of, left in zip(came, there, strict=True)]
            kept = link.stage.kept_tokens(scores, rates, link.config)
            check_mask(link.method, kept, tuple(scores.segment.shape))
            stay = ~scores.vision | kept
            stay[sorted(self._unranked)] = True
            before = self._shares_at(first)
            self._shares[first] = [before[row] if row in self._unranked else share for row in range(len(before))]
            if bool((stay | ~scores.valid).all()):  # few tokens, and a rate that is hardly below the last
                continue
            scores = replace(scores, segment=scores.segment.masked_fill(~stay, -1), valid=scores.valid & stay)
            stay = scores.valid[:, -own:].cpu() | last
            self._packings[first] = Packing.of(stay) if base is None else base.narrowed(stay)

    def note_computed(self, layer: int) -> None:
        """Count the tokens that a layer computes, without what only fills rows up."""
        packing = self.packing_at(layer)
        stay = self.spans.valid[:, self.spans.start :] if packing is None else packing.stay
        self.computed[layer] = int(stay.sum())

    def noted(self) -> LeftTokens:
        """What is kept for a report."""
        methods = {name: link.method for name, link in self.chain.stages.items()}
        return LeftTokens(methods, self._packings, self.computed)

    def repeat(self, times: int) -> None:
        """Repeat every row, as ``generate`` does for beams and for several returned sequences."""
        self._times *= times
        self.spans = self.spans.repeated(times)
        for rows in (self._not_finite, self._unranked):
            first = [row * times for row in rows]
            rows.clear()
            rows.update(row + copy for row in first for copy in range(times))
        self._packings = {layer: packing.repeated(times) for layer, packing in self._packings.items()}
        self._shares = {
            layer: [share for share in shares for _ in range(times)] for layer, shares in self._shares.items()
        }

    def _checked(self, pruned_layers: Sequence[int]) -> dict[int, dict[int, float]]:
        """By the layers whose scores decide, the layers before which tokens leave, with their rates."""
        drops: dict[int, dict[int, float]] = {}
        encoder = self.chain.encoder
        if encoder is not None:
            check_rate(encoder.method, encoder.stage.rate(encoder.config))
            if encoder.stage.needs_grid(encoder.config):
                for row, number, index in self._images():
                    check_grid(encoder.method, self._grid(row, number), len(index), row, number)
        link = self.chain.prefill
        if link is None:
            return drops
        rates = link.stage.rates(link.config, self._layers)
        for first, rate in rates.items():
            check_layer(link.method, first, self._layers)
            check_rate(link.method, rate)
        ordered = sorted(rates.items())
        if any(later > earlier for (_, earlier), (_, later) in pairwise(ordered)):
            raise ConfigError(f"The method {link.method!r} lets tokens come back, with the rates {rates} by layers.")
        for first, rate in ordered:
            if first == self._layers:
                continue
            asked = max((layer for layer in pruned_layers if layer < first), default=None)
            if asked is None:
                raise UnsupportedModelError(
                    f"{link.method} ranks the tokens that leave before layer {first} by a layer with full attention, "
                    f"and the first of this model is layer {min(pruned_layers)}: let them leave later."
                )
            drops.setdefault(asked, {})[first] = rate
        return drops

    def _images(self) -> list[tuple[int, int, Tensor]]:
        """Row, number and places in the pass of each image."""
        new = self.spans.segment[:, self.spans.start :]
        return [
            (row, number, (segment == number).nonzero()[:, 0])
            for row, segment in enumerate(new)
            for number in segment[segment >= 0].unique().tolist()
        ]

    def _of_tower(self, scores: Sequence[Tensor]) -> dict[tuple[int, int], Tensor]:
        """Scores of the tower by row and number of the image; the tower has seen no repeated row."""
        images = [(row, number) for row, number, _ in self._images() if row % self._times == 0]
        by_image = dict(zip(images, scores, strict=bool(scores)))
        return {(row + copy, number): own for (row, number), own in by_image.items() for copy in range(self._times)}

    def _image(self, states: Tensor, row: int, number: int, index: Tensor, tower: Tensor | None) -> ImageTokens:
        new = slice(self.spans.start, None)
        text = (self.spans.valid[row, new] & ~self.spans.vision[row, new]).to(states.device)
        return ImageTokens(states[index.to(states.device)], states[text], self._grid(row, number), row, number, tower)

    def _grid(self, row: int, number: int) -> Grid:
        grids = self.spans.grids[row]
        return grids[number] if number < len(grids) else None

    def _shares_at(self, layer: int) -> list[float]:
        """Which share of the vision tokens of each row the prefill stage leaves to a layer."""
        last = max((before for before in self._shares if before <= layer), default=-1)
        return self._shares.get(last, [1.0] * len(self.spans.valid))

    def _came(self) -> list[int]:
        """Vision tokens of each row that came to the text model."""
        vision = self.spans.vision[:, self.spans.start :]
        entered = self._packings.get(0)
        counts: list[int] = (vision if entered is None else vision & entered.stay).sum(1).tolist()
        return counts

    def _last_tokens(self) -> Tensor:
        """bool [batch, tokens of the pass]; the answer goes on from them, whatever they are."""
        return query_mask(self.spans, 1)[:, self.spans.start :]
