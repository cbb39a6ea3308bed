# SPDX-License-Identifier: Apache-2.0
"""Methods of the encoder stage: what they refuse, and that it is refused before anything is read."""

from __future__ import annotations

import pytest
import torch

from invariants import generate, pruned
from plphp import ConfigError, PLPHPConfig, PrunedCache
from plphp.engines.hf.cache_argument import passed
from plphp.methods.registry import available_methods, chain_of
from plphp.policy.image_tokens import ImageTokens
from tiny_models import TINY, tiny_model

BEFORE_THE_TEXT_MODEL = sorted(name for name, method in available_methods().items() if method.encoder is not None)


@pytest.mark.parametrize("method", BEFORE_THE_TEXT_MODEL)
@pytest.mark.parametrize(
    "setting",
    [
        "exempt_layers=0",
        "query_rows=2",
        "gqa_reduction=max",
        "score_pool=3",
        "heads=equal",
        "head_safeguard=0.5",
    ],
)
def test_settings_of_layers_heads_and_queries_are_refused(method: str, setting: str) -> None:
    name = setting.split("=")[0]
    message = f"{method} lets tokens leave before the text model, .* queries: leave out {name}, got"
    with pytest.raises(ConfigError, match=message):
        chain_of(PLPHPConfig.parse(f"{method}:{setting}"), 8)


@pytest.mark.parametrize("method", BEFORE_THE_TEXT_MODEL)
def test_of_each_image_one_token_stays_at_least(method: str) -> None:
    model, inputs = tiny_model("llava"), TINY["llava"].inputs(tiny_model("llava"), [2, 1])
    _, report = pruned(model, inputs, PLPHPConfig.parse(f"{method}:keep=0"))
    [stage] = report.prompts[0].stages
    assert stage.tokens_out == [2, 1]


def test_divprune_compares_directions_or_places() -> None:
    features = torch.tensor([[1.0, 0.0], [9.0, 0.0], [1.0, 0.4], [0.9, 0.0]])
    image = ImageTokens(features, text=features[:0], grid=None, row=0, number=0)

    def stay(line: str) -> list[int]:
        config = PLPHPConfig.parse(f"{line}keep=0.5")
        encoder = available_methods()["divprune"].encoder
        assert encoder is not None
        return encoder.choose(image, config).stay.nonzero()[:, 0].tolist()

    assert stay("divprune:") == stay("divprune:distance=cosine,") == [0, 2]
    assert stay("divprune:distance=euclidean,") == [1, 3]
    with pytest.raises(ConfigError, match="distance"):
        chain_of(PLPHPConfig.parse("divprune:distance=manhattan"), 8)


@pytest.mark.parametrize("line", ["pool:keep=0.5", "fopru:by=row,keep=0.5"])
def test_an_image_without_a_grid_is_refused_before_it_is_read(line: str) -> None:
    """A later turn that cannot be done leaves the cache as it was."""
    model = tiny_model("llava-next")
    inputs = TINY["llava-next"].inputs(model, [1])
    with pytest.raises(ConfigError, match=r"works on rows and columns .* image 0 of row 0 has no plain grid \(\d+ tok"):
        PrunedCache.for_inputs(model, inputs, PLPHPConfig.parse(line))
    whole = PrunedCache.for_inputs(model, inputs, PLPHPConfig.parse("pool:keep=1"))
    generate(model, inputs, **passed(whole))
    assert whole.get_seq_length() >= inputs["input_ids"].shape[1]
