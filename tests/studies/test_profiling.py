# SPDX-License-Identifier: Apache-2.0
"""Vision attention per layer and head, against transformers' eager attention; re-attention on made-up curves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import plphp
from invariants import eager_attention, pruned
from plphp import AttentionProfile, ConfigError, PLPHPConfig
from plphp.show.profile_plots import plot_heads, plot_profile
from plphp.studies.profile_report import ProfiledPrompt
from tiny_models import TINY, tiny_model

pytestmark = pytest.mark.usefixtures("float64")

ROWS = (1, 5, "text")
DIGITS = 6e-7
"""Scores are rounded to six digits."""


def curves(*means: float, spread: float = 0.01, prompts: int = 10) -> AttentionProfile:
    """A profile of two heads around these means, whose prompts go up and down in turns."""
    shifts = [spread * (-1) ** number for number in range(prompts)]
    scores = [((tuple((mean + up + 0.1, mean + up - 0.1) for mean in means)),) for up in shifts]
    return AttentionProfile((1,), tuple(range(len(means))), tuple(ProfiledPrompt(9, 5, each) for each in scores), {})


@pytest.mark.parametrize("family", ["llava", "llava-next", "qwen2-vl", "qwen3-vl", "gemma3", "idefics3", "internvl"])
def test_scores_are_those_of_eager_attention(family: str) -> None:
    model = tiny_model(family)
    inputs = TINY[family].inputs(model, [2, 1], seed=5)
    measured = plphp.profile(model, [inputs], ROWS)
    _, report = pruned(model, inputs, PLPHPConfig(method="none"))
    assert measured.layers == tuple(layer.layer for layer in report.prompts[0].layers)
    assert "generate" not in model.__dict__
    attention = eager_attention(model, inputs)
    length = inputs["input_ids"].shape[1]
    for row, prompt in enumerate(measured.prompts):
        vision = [position for image in report.prompts[0].images[row] for position in image.positions]
        assert (prompt.vision_tokens, prompt.tokens) == (len(vision), int(inputs["attention_mask"][row].sum()))
        for choice, begin in ((1, length - 1), (5, length - 5), ("text", max(vision) + 1)):
            scores = measured.head_scores(choice)[row]
            for index, layer in enumerate(measured.layers):
                expected = attention[layer][row, :, begin:, vision].sum(-1).mean(-1)
                assert scores[index] == pytest.approx(expected.numpy(), abs=DIGITS), (choice, layer)
    gammas = [[row.vision_score for row in layer.rows] for layer in report.prompts[0].layers]
    assert np.abs(measured.layer_scores(1).T - gammas).max() < DIGITS
    assert np.abs(measured.layer_scores("text") - measured.layer_scores(1)).max() > 1e-3


def test_several_prompts_and_rows_without_images() -> None:
    model = tiny_model("llava")
    inputs = [TINY["llava"].inputs(model, counts, seed=seed) for seed, counts in enumerate(([1, 0], [0], [3]))]
    measured = plphp.profile(model, iter(inputs), [1])
    assert [prompt.vision_tokens for prompt in measured.prompts] == [16, 48]
    assert measured.provenance["decoder_layers"] == 3
    alone = plphp.profile(model, [inputs[2]], [1])
    assert measured.prompts[1].scores == alone.prompts[0].scores


def test_what_cannot_be_profiled() -> None:
    model = tiny_model("llava")
    text, image = (TINY["llava"].inputs(model, [count]) for count in (0, 1))
    with pytest.raises(ConfigError, match="vision token"):
        plphp.profile(model, [text])
    with pytest.raises(ConfigError, match="query_rows"):
        plphp.profile(model, [image], ["all"])
    with pytest.raises(ConfigError, match="different choices"):
        plphp.profile(model, [image], [1, 1])
    for none in ([], [None]):
        with pytest.raises(ConfigError, match="different choices"):
            plphp.profile(model, [image], none)
    with pytest.raises(ConfigError, match="not 8"):
        plphp.profile(model, [image]).layer_scores(8)
    with pytest.raises(plphp.UnsupportedModelError):
        plphp.profile(torch.nn.Linear(1, 1), [image])
    assert "generate" not in model.__dict__


def test_json_reads_back_and_has_the_statistics(tmp_path: Path) -> None:
    model = tiny_model("qwen2-vl")
    inputs = [TINY["qwen2-vl"].inputs(model, [count], seed=count) for count in (1, 2, 3)]
    measured = plphp.profile(model, inputs, ROWS)
    text = measured.to_json(tmp_path / "profile.json")
    assert AttentionProfile.from_json(text) == measured == AttentionProfile.from_json(tmp_path / "profile.json")
    summary = json.loads(text)["summary"]["text"]
    scores = measured.head_scores("text")
    assert np.array(summary["heads"]["mean"]) == pytest.approx(scores.mean(0), rel=1e-5)
    assert np.array(summary["layers"]["std"]) == pytest.approx(np.std(scores.mean(2), axis=0, ddof=1), rel=1e-4)
    assert summary["layers"]["quantiles"]["0.5"] == pytest.approx(np.median(scores.mean(2), axis=0), rel=1e-5)
    assert np.array(summary["heads"]["max"]) == pytest.approx(scores.max(0), rel=1e-5)
    assert summary["re_attention"]["appears"] is None


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"format": 9}', '{"format": 1, "layers": [0], "query_rows": [1], "prompts": []}']
)
def test_what_is_no_profile(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="profile"):
        AttentionProfile.from_json(text)
    with pytest.raises(ConfigError, match="Cannot read"):
        AttentionProfile.from_json(tmp_path / "none.json")


class TestReAttention:
    """Falls, then rises again: by the criterion that the docstring states."""

    def test_a_valley(self) -> None:
        valley = curves(0.5, 0.7, 0.3, 0.2, 0.4, 0.6, 0.5).re_attention(1)
        assert valley.appears is True
        assert (valley.before, valley.layer, valley.after, valley.depth) == (1, 3, 5, 0.5)
        assert (valley.fall, valley.rise, valley.range) == pytest.approx((0.5, 0.4, 0.5))
        assert (valley.rise_spread, valley.prompts_with_both) == (pytest.approx(0, abs=1e-9), 10)
        assert str(valley).endswith("re-attention appears")

    @pytest.mark.parametrize("means", [(0.1, 0.2, 0.3), (0.3, 0.2, 0.1), (0.1, 0.4, 0.1), (0.2, 0.2, 0.2), (0.4,)])
    def test_no_valley(self, means: tuple[float, ...]) -> None:
        valley = curves(*means).re_attention(1)
        assert valley.appears is False
        assert min(valley.fall, valley.rise) == 0
        assert "does not appear" in str(valley)

    def test_a_shallow_valley_beside_a_large_change(self) -> None:
        assert curves(0.1, 0.5, 0.45, 0.5).re_attention(1).appears is False
        assert curves(0.4, 0.5, 0.45, 0.5).re_attention(1).appears is True

    def test_a_late_dip_does_not_hide_the_valley(self) -> None:
        valley = curves(0.6, 0.2, 0.5, 0.1).re_attention(1)
        assert (valley.layer, valley.after, valley.appears) == (1, 2, True)

    def test_a_valley_of_some_prompts_only(self) -> None:
        falling_and_rising = curves(0.5, 0.2, 0.5, prompts=12).prompts
        for means in ((0.4, 0.4, 0.4), (0.5, 0.4, 0.4), (0.4, 0.4, 0.5)):
            without = curves(*means, prompts=12).prompts
            for count, appears in ((0, True), (1, True), (2, False)):
                mixed = AttentionProfile((1,), (0, 1, 2), (*without[:count], *falling_and_rising[count:]), {})
                valley = mixed.re_attention(1)
                assert (valley.prompts_with_both, valley.appears) == (12 - count, appears)

    def test_a_rise_within_its_spread(self) -> None:
        # A prompt rises by a lot and nine by little, which would be enough of a mean
        for mirrored in (False, True):
            scores = [((0.5,), (0.3,), (0.32 if number else 1.0,))[:: -1 if mirrored else 1] for number in range(10)]
            prompts = tuple(ProfiledPrompt(9, 5, (choice,)) for choice in scores)
            valley = AttentionProfile((1,), (0, 1, 2), prompts, {}).re_attention(1)
            small, spread = (valley.fall, valley.fall_spread) if mirrored else (valley.rise, valley.rise_spread)
            assert valley.prompts_with_both == 10
            assert 0.25 * valley.range < small < spread
            assert valley.appears is False

    def test_too_few_prompts(self) -> None:
        valley = curves(0.5, 0.2, 0.5, prompts=7).re_attention(1)
        assert valley.appears is None
        assert "too few prompts" in str(valley)
        assert curves(0.5, 0.2, 0.5, prompts=1).re_attention(1).appears is None


def test_plots_show_the_means() -> None:
    pytest.importorskip("matplotlib")
    measured = curves(0.5, 0.2, 0.6)
    (axes,) = plot_profile(measured).axes
    (line,) = axes.get_lines()
    assert list(line.get_ydata()) == pytest.approx([0.5, 0.2, 0.6])
    band, ring = axes.collections
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(0.6 + np.std([0.01, -0.01] * 5, ddof=1))
    assert ring.get_offsets().tolist() == [[1, pytest.approx(0.2)]]
    panel = plot_heads(measured).axes[0]
    assert np.allclose(panel.images[0].get_array(), [[0.6, 0.4], [0.3, 0.1], [0.7, 0.5]])
    assert len(plot_profile(curves(0.1, 0.2)).axes[0].collections) == 1
