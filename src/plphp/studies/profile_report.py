# SPDX-License-Identifier: Apache-2.0
"""What `plphp.profile` measured, and whether attention to the image falls and rises again with depth."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plphp.errors import ConfigError
from plphp.io.json_files import Kind, from_json, to_json

KIND = Kind("profile", "`plphp profile`", 1)
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Quantiles over the prompts that a summary holds."""
MIN_PROMPTS = 8
"""Prompts below which nothing is said about re-attention: the layers are picked on the same prompts."""
MIN_SHARE_OF_RANGE = 0.25
"""Share of the range of the mean scores that the fall and the rise of re-attention have at least."""
MIN_SHARE_OF_PROMPTS = 0.9
"""Share of the prompts that show both, at least."""


@dataclass(frozen=True)
class ProfiledPrompt:
    """Scores of a prompt.

    Parameters
    ----------
    tokens, vision_tokens : int
        Tokens of the prompt without padding, and how many of them are vision tokens.
    scores : tuple
        Attention of each query head to all vision tokens, in [0, 1], ``[query_rows][layer][head]``.
    """

    tokens: int
    vision_tokens: int
    scores: tuple[tuple[tuple[float, ...], ...], ...]


@dataclass(frozen=True)
class ReAttention:
    """The deepest valley of the mean vision attention score over the layers, and whether it is more than noise.

    The valley is the layer with the largest ``min(fall, rise)`` of the mean over the prompts. Re-attention *appears*
    if the fall and the rise each are (1) at least a quarter of the range of the mean over all layers, (2) at least
    their own standard deviation over the prompts, and if (3) at least 90 % of the prompts show both.

    Parameters
    ----------
    query_rows : int or "text"
        Query rows whose attention it is.
    layer : int
        Layer of the minimum.
    depth : float
        Depth of that layer, from 0 (first layer) to 1 (last layer).
    score : float
        Mean vision attention score in that layer.
    before, after : int
        Layers of the maxima before and after the minimum; its own layer where there is none.
    fall, rise : float
        Differences of the mean scores to these maxima.
    fall_spread, rise_spread : float
        Standard deviations of these differences over the prompts (of the sample).
    range : float
        Largest minus smallest mean score of any layer.
    prompts, prompts_with_both : int
        All prompts, and those whose scores fall and rise between these layers.
    appears : bool, optional
        None with less than 8 prompts.
    """

    query_rows: int | str
    layer: int
    depth: float
    score: float
    before: int
    after: int
    fall: float
    rise: float
    fall_spread: float
    rise_spread: float
    range: float
    prompts: int
    prompts_with_both: int
    appears: bool | None

    def __str__(self) -> str:
        rows = "text" if self.query_rows == "text" else f"last {self.query_rows}"
        verdict = {
            True: "re-attention appears",
            False: "re-attention does not appear",
            None: f"too few prompts to say whether re-attention appears ({MIN_PROMPTS} are needed)",
        }[self.appears]
        if self.fall == self.rise == 0:
            return f"query rows {rows}: no layer lies below a layer before it and a layer after it: {verdict}"
        relative = f"{self.rise / self.rise_spread:.1f} times its spread" if self.rise_spread else "no spread"
        return (
            f"query rows {rows}: falls by {self.fall:.3f} from layer {self.before} to a minimum of {self.score:.3f} "
            f"in layer {self.layer} ({self.depth:.0%} of the depth), then rises by {self.rise:.3f} to layer "
            f"{self.after} ({relative} over the prompts; range over all layers {self.range:.3f}; both in "
            f"{self.prompts_with_both} of {self.prompts} prompts): {verdict}"
        )


@dataclass(frozen=True)
class AttentionProfile:
    """Vision attention scores over a set of prompts; made by `plphp.profile`.

    Parameters
    ----------
    query_rows : tuple of int or "text"
        The choices of query rows.
    layers : tuple of int
        Numbers of the decoder layers that can be pruned.
    prompts : tuple of ProfiledPrompt
        Scores of each prompt; there is a prompt or more.
    provenance : dict
        Model, versions, hardware and date.
    """

    query_rows: tuple[int | str, ...]
    layers: tuple[int, ...]
    prompts: tuple[ProfiledPrompt, ...]
    provenance: dict[str, Any]

    def head_scores(self, query_rows: int | str) -> np.ndarray:
        """Scores of a choice of query rows, float64 [prompt, layer, q_heads]; NaN beyond the heads that a layer has.

        Raises
        ------
        ConfigError
            If these query rows were not measured.
        """
        if query_rows not in self.query_rows:
            raise ConfigError(f"The profile has the query rows {self.query_rows}, not {query_rows!r}.")
        choice = self.query_rows.index(query_rows)
        heads = max(len(layer) for layer in self.prompts[0].scores[choice])
        scores = np.full((len(self.prompts), len(self.layers), heads), np.nan)
        for number, prompt in enumerate(self.prompts):
            for index, layer in enumerate(prompt.scores[choice]):
                scores[number, index, : len(layer)] = layer
        return scores

    def layer_scores(self, query_rows: int | str) -> np.ndarray:
        """The vision attention score gamma of a choice, float64 [prompt, layer]: the mean over the heads."""
        gamma: np.ndarray = np.nanmean(self.head_scores(query_rows), axis=2)
        return gamma

    def re_attention(self, query_rows: int | str) -> ReAttention:
        """Find the deepest valley over the layers, see `ReAttention`."""
        scores = self.layer_scores(query_rows)
        mean, last = scores.mean(0), len(self.layers) - 1
        # For each layer, the layers with the highest mean up to it and from it on; `at` is the bottom of the valley.
        before = [int(mean[: at + 1].argmax()) for at in range(last + 1)]
        after = [at + int(mean[at:].argmax()) for at in range(last + 1)]
        at = max(range(last + 1), key=lambda at: min(mean[before[at]], mean[after[at]]) - mean[at])
        falls, rises = scores[:, before[at]] - scores[:, at], scores[:, after[at]] - scores[:, at]
        both, extent = int(((falls > 0) & (rises > 0)).sum()), float(mean.max() - mean.min())
        measured = [(float(d.mean()), float(d.std(ddof=1)) if len(d) > 1 else 0.0) for d in (falls, rises)]
        large = all(size > 0 and size >= max(MIN_SHARE_OF_RANGE * extent, spread) for size, spread in measured)
        (fall, fall_spread), (rise, rise_spread) = measured
        return ReAttention(
            query_rows=query_rows,
            layer=self.layers[at],
            depth=at / last if last else 0.0,
            score=float(mean[at]),
            before=self.layers[before[at]],
            after=self.layers[after[at]],
            fall=fall,
            rise=rise,
            fall_spread=fall_spread,
            rise_spread=rise_spread,
            range=extent,
            prompts=len(scores),
            prompts_with_both=both,
            appears=(large and both >= MIN_SHARE_OF_PROMPTS * len(scores)) if len(scores) >= MIN_PROMPTS else None,
        )

    def summary(self, query_rows: int | str) -> dict[str, Any]:
        """Mean, standard deviation (of the sample), extremes and quantiles over the prompts, JSON-ready.

        Returns
        -------
        dict
            ``layers``: each statistic as ``[layer]``; ``heads``: as ``[layer][head]``; ``re_attention``.
        """
        return {
            "layers": _statistics(self.layer_scores(query_rows)),
            "heads": _statistics(self.head_scores(query_rows)),
            "re_attention": dataclasses.asdict(self.re_attention(query_rows)),
        }

    def to_json(self, path: str | Path | None = None, *, indent: int | None = None) -> str:
        """Return everything as JSON, with a summary for each choice, and write it to the file ``path``, if not None."""
        summaries = {str(rows): self.summary(rows) for rows in self.query_rows}
        return to_json({**dataclasses.asdict(self), "summary": summaries}, KIND, path, indent)

    @classmethod
    def from_json(cls, source: str | Path) -> AttentionProfile:
        """Read a profile from a file (a `Path`) or from JSON text (a `str`).

        Raises
        ------
        ConfigError
            If the source is not a profile of this version's format.
        """
        return from_json(source, KIND, _read_profile)


def _statistics(scores: np.ndarray) -> dict[str, Any]:
    """Statistics over the prompts, the first axis; None where a layer has no such head."""
    spread = scores.std(axis=0, ddof=1) if len(scores) > 1 else np.zeros_like(scores[0])
    statistics = {"mean": scores.mean(0), "std": spread, "min": scores.min(0), "max": scores.max(0)}
    quantiles = dict(zip(map(str, QUANTILES), np.quantile(scores, QUANTILES, axis=0), strict=True))
    return {
        **{name: _listed(values) for name, values in statistics.items()},
        "quantiles": {name: _listed(values) for name, values in quantiles.items()},
    }


def _listed(values: np.ndarray) -> Any:
    """Lists for JSON, of [layer] or [layer, head]: six digits, and None for NaN, which JSON cannot write."""
    rounded = [[None if np.isnan(v) else float(f"{v:.6g}") for v in row] for row in np.atleast_2d(values)]
    return rounded if values.ndim == 2 else rounded[0]


def _read_profile(values: dict[str, Any]) -> AttentionProfile:
    layers, rows = tuple(values["layers"]), tuple(values["query_rows"])
    prompts = tuple(_read_prompt(prompt, len(rows), len(layers)) for prompt in values["prompts"])
    if not prompts or not layers:
        raise ValueError("it holds no prompt or no layer")
    return AttentionProfile(rows, layers, prompts, dict(values["provenance"]))


def _read_prompt(values: dict[str, Any], choices: int, layers: int) -> ProfiledPrompt:
    scores = tuple(tuple(tuple(float(s) for s in head) for head in layer) for layer in values["scores"])
    if len(scores) != choices or any(len(choice) != layers for choice in scores):
        raise ValueError(f"the scores of a prompt must be {choices} x {layers} lists")
    return ProfiledPrompt(int(values["tokens"]), int(values["vision_tokens"]), scores)
