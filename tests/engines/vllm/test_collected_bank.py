# SPDX-License-Identifier: Apache-2.0
"""The query bank that a server collects by itself, in engines: beside one that transformers collects."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

import plphp
from engine import EngineError, run
from plphp import PLPHPConfig
from plphp.engines.vllm.checkpoint import files_hash
from plphp.engines.vllm.metrics import PruneMetrics, PruneStats
from plphp.engines.vllm.pruned_prompt import PrunedPrompt
from plphp.engines.vllm.query_probe import note_queries
from plphp.engines.vllm.rotations import find_rotations
from plphp.errors import UnsupportedModelError
from plphp.policy.allocation import RowAllocation
from plphp.policy.bank import QueryBank
from plphp.pruning.report import BankProgress
from reference import Reference, in_blocks, requests
from tiny_checkpoint import LAYERS

BLOCK = 32
ONE = (448, 448)
SOME = requests([[(*ONE, 1)], [], [(280, 336, 2), (*ONE, 3)], [(*ONE, 4)], [(*ONE, 5)]])
"""Two are answered for the bank, one is text; the last two are pruned."""
IN_TURN = {"max_num_seqs": 1, "max_num_batched_tokens": 160}


def settings(folder: Path) -> dict[str, Any]:
    return {
        "method": "query_bank",
        "retention_rate": 0.3,
        "heads": "equal",
        "options": {"collect": 2, "folder": str(folder)},
    }


def test_it_prunes_as_with_the_bank_of_transformers(checkpoint: Path, tmp_path: Path) -> None:
    """In turn and in chunks, and after a restart; positions are those of m-RoPE."""
    reference, folder = Reference(checkpoint), tmp_path / "banks"
    first = run(tmp_path, checkpoint, requests=SOME, settings=settings(folder), engine=IN_TURN)
    assert list(first["pruned"]) == ["3", "4"]
    assert first["free_now"] == first["total"]
    assert "the query bank is of 1 of 2 prompts; the next prompts stay whole" in first["log"]
    assert "the query bank is of 2 of 2 prompts; it is complete" in first["log"]

    [file] = folder.glob("*.safetensors")
    ours = QueryBank.load(file)
    heard = [reference.inputs(SOME[number]) for number in (0, 2)]
    theirs = plphp.collect_query_bank(reference.model, heard, max_new_tokens=24)
    assert [ours.record[name] for name in ("prompts", "answer_tokens", "samples")] == [2, 46, 46]
    assert ours.ahead.tolist() == theirs.ahead.tolist()
    assert sorted(ours.layers) == sorted(theirs.layers) == list(range(LAYERS))
    for layer, expected in theirs.layers.items():
        found = ours.of(layer)
        assert found.rotation.interleaved == expected.rotation.interleaved
        torch.testing.assert_close(found.rotation.frequencies, expected.rotation.frequencies, rtol=1e-6, atol=0)
        # They are kept in bfloat16, which may round either way.
        torch.testing.assert_close(found.queries.float(), expected.queries.float(), rtol=2**-7, atol=1e-3)

    given = {**settings(folder), "options": {"bank": str(file)}, "method": in_blocks("query_bank", BLOCK)}
    answers = [reference.answer(one, None if n < 3 else PLPHPConfig.from_dict(given))[0] for n, one in enumerate(SOME)]
    assert first["tokens"] == answers
    assert answers[3:] != [reference.answer(one)[0] for one in SOME[3:]], "pruning has to change answers"

    again = run(tmp_path, checkpoint, requests=SOME[3:], settings=settings(folder))
    assert list(again["pruned"]) == ["0", "1"]
    assert again["tokens"] == answers[3:]


def rope(neox: bool = False, **parameters: Any) -> Any:
    with set_current_vllm_config(VllmConfig()):
        return get_rope(16, 2048, is_neox_style=neox, rope_parameters={"rope_theta": 1e4, **parameters})


class Layers(torch.nn.Module):
    """A text model of layers that do with their queries what the tests say."""

    def __init__(self, *layers: Any) -> None:
        super().__init__()
        self.layers = layers
        self.ropes = torch.nn.ModuleList(one for one in layers if isinstance(one, torch.nn.Module))

    def forward(self, positions: Any, inputs_embeds: Any, **_: Any) -> None:
        for number, layer in enumerate(self.layers):
            query = inputs_embeds.view(-1, 2, 16).clone()
            if layer is not None:
                query = layer(positions, query.flatten(1), query.flatten(1))[0].view(-1, 2, 16)
            output = torch.ones_like(query)
            assert note_queries(number, query, output)
            assert not output.any()


def runner(*layers: Any, **text: Any) -> Any:
    config = SimpleNamespace(
        model="tiny",
        hf_text_config=SimpleNamespace(model_type="tiny", **text),
        max_model_len=2048,
        dtype=torch.float32,
        get_inputs_embeds_size=lambda: 32,
    )
    model = Layers(*layers)
    return SimpleNamespace(
        model=model, model_config=config, device=torch.device("cpu"), uses_mrope=False, vllm_config=VllmConfig()
    )


def test_rotations_are_what_layers_do() -> None:
    """Some have none, some turn half of a head, some scale what they give; neighbours or halves are pairs."""
    with_factor = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    half = rope(neox=True, partial_rotary_factor=0.5)
    found = find_rotations(runner(rope(), None, half, rope(**with_factor)))
    assert [rotation.interleaved for rotation in found.values()] == [True, False, False, True]
    whole = 1e4 ** -(torch.arange(8) / 8)
    torch.testing.assert_close(found[0].frequencies, whole, rtol=1e-6, atol=0)
    assert found[1].frequencies.tolist() == [0]
    torch.testing.assert_close(found[2].frequencies, 1e4 ** -(torch.arange(4) / 4), rtol=1e-6, atol=0)
    assert not torch.allclose(found[3].frequencies, whole, rtol=1e-2)
    assert found[3].frequencies[0] == pytest.approx(1)
    assert not note_queries(0, torch.ones(1), torch.ones(1)), "outside of a probe nothing is noted"


def test_layers_that_turn_otherwise_are_refused() -> None:
    def growing(positions: Any, query: Any, key: Any) -> Any:
        return query * (1 + positions[:, None] / 100), key

    with pytest.raises(UnsupportedModelError, match="queries of layer 1"):
        find_rotations(runner(rope(), growing))
    with pytest.raises(UnsupportedModelError, match="'dynamic'"):
        find_rotations(runner(rope(), rope_parameters={"rope_type": "dynamic"}))
    with pytest.raises(UnsupportedModelError, match="tokens at positions of their own"):
        find_rotations(runner(lambda *_: 1 / 0))


def test_metrics() -> None:
    counts = PruneStats()
    counts.add_bank(3, BankProgress(1, 2))
    later = PruneStats()
    later.add_bank(1, BankProgress(2, 2))
    prompt = PrunedPrompt(100, 64)
    prompt.add(0, RowAllocation(0.1, "uniform", 0.5), 32.0, 1)
    later.add(prompt, 1)
    assert not counts.is_empty()
    total = counts.aggregate(later)
    assert total.reduce()["plphp query bank prompts"] == 2
    assert total.reduce()["plphp whole prompts"] == 4
    assert "plphp query bank prompts" not in PruneStats().reduce()
    assert PruneStats().is_empty()

    types = (prometheus_client.Gauge, prometheus_client.Counter, prometheus_client.Histogram)
    metrics = PruneMetrics(
        SimpleNamespace(kv_transfer_config=None), dict(zip(types, types, strict=True)), ["engine"], {0: ["0"]}
    )
    metrics.observe(total.data)
    metrics.observe(PruneStats().data)
    values = {name: prometheus_client.REGISTRY.get_sample_value(name, {"engine": "0"}) for name in NAMES}
    assert list(values.values()) == [2, 4, 1]


NAMES = ("vllm:plphp_bank_prompts", "vllm:plphp_whole_prompts_total", "vllm:plphp_prompts_total")


@pytest.mark.thorough
def test_a_broken_file_is_refused_when_the_engine_starts(checkpoint: Path, tmp_path: Path) -> None:
    """It has the hash of the checkpoint's files in its name."""
    folder = tmp_path / "banks"
    folder.mkdir()
    digest = files_hash(checkpoint.glob("*.safetensors"))
    (folder / f"qwen2_5_vl-{digest[:16]}.safetensors").write_bytes(b"no bank")
    with pytest.raises(EngineError, match="not a safetensors file"):
        run(tmp_path, checkpoint, requests=SOME[:1], settings=settings(folder))
