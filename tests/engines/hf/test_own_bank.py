# SPDX-License-Identifier: Apache-2.0
"""A session without a query bank: the first answers are whole, and what comes after is pruned by their queries."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

import plphp
from invariants import assert_same_generation, generate
from plphp import ConfigError, PLPHPConfig, PrunedCache, QueryBank, UnsupportedFeatureError, UnsupportedModelError
from plphp.engines.hf import rotation_probe
from plphp.engines.hf.answer_lengths import answer_lengths
from plphp.inputs.weights import kept_weights_hash, weights_hash
from plphp.policy.rotation import Rotation
from plphp.pruning.report import BankProgress, PruneReport
from plphp.studies.compare import compare
from test_invariants import FAMILIES
from tiny_models import TINY, collate, drop_empty, tiny_model

pytestmark = pytest.mark.usefixtures("float64")

NEW = 6
ROWS = (2, 1, 0, 1)
"""Images of the rows of a batch; the row without any counts for nothing."""


def settings(family: str = "llava", collect: int = 3, **options: Any) -> PLPHPConfig:
    if family == "gemma4":  # it normalises its values, so that float error would rank them
        options = {"value_norm": 0, **options}
    return PLPHPConfig(method="query_bank", retention_rate=0.3, options={"collect": collect, **options})


def with_file(config: PLPHPConfig, path: Path) -> PLPHPConfig:
    """The same, by the bank of a file."""
    options = {name: value for name, value in config.options.items() if name not in ("collect", "folder")}
    return PLPHPConfig.from_dict({**config.to_dict(), "options": {**options, "bank": str(path)}})


def prompt(family: str, seed: int, images: int = 2) -> dict[str, Any]:
    inputs: dict[str, Any] = TINY[family].inputs(tiny_model(family), [images], seed=seed)
    return inputs


def rows_of(family: str, rows: tuple[int, ...], seed: int = 5) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A left-padded batch, and its rows alone."""
    model, tiny = tiny_model(family), TINY[family]
    return tiny.inputs(model, list(rows), seed=seed), tiny.rows(model, list(rows), seed=seed)


def assert_same_bank(bank: QueryBank | None, expected: QueryBank) -> None:
    assert bank is not None
    assert bank.ahead.tolist() == expected.ahead.tolist()
    assert bank.layers.keys() == expected.layers.keys()
    for number, layer in expected.layers.items():
        assert (bank.layers[number].queries.float() - layer.queries.float()).abs().max() < 1e-6
        assert torch.equal(bank.layers[number].rotation.frequencies, layer.rotation.frequencies)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_answers_are_whole_and_their_bank_prunes_the_rest(family: str, tmp_path: Path) -> None:
    model, config = tiny_model(family), settings(family)
    first, later = [prompt(family, seed) for seed in (10, 11, 12)], prompt(family, 20)
    with plphp.prune(model, config) as run:
        for number, inputs in enumerate(first, 1):
            assert run.bank is None
            stock = generate(model, inputs, max_new_tokens=NEW)
            assert run.report.collecting == BankProgress(number, 3)
            assert run.report.retention == 1
            assert run.report.kv_reduction == 0
            assert run.report.config == config.to_dict()
            with plphp.prune(model, PLPHPConfig(method="none")):
                assert_same_generation(generate(model, inputs, max_new_tokens=NEW), stock)
        output = generate(model, later)
        assert run.report.collecting is None
        assert run.report.retention < 0.4
        assert run.bank is not None
        run.bank.save(tmp_path / "bank")
        report = run.report
    assert "generate" not in model.__dict__
    with plphp.prune(model, with_file(config, tmp_path / "bank")) as by_file:
        assert_same_generation(generate(model, later), output)
    assert by_file.report.prompts == report.prompts
    collected = plphp.collect_query_bank(model, first, max_new_tokens=NEW)
    assert_same_bank(run.bank, collected.rounded())
    assert (run.bank.record["prompts"], run.bank.record["answer_tokens"]) == (3, collected.record["answer_tokens"])


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "qwen2.5-vl", "glm4v", "gemma3", "internvl", "paligemma"])
def test_a_padded_batch_gives_the_queries_of_its_rows_alone(family: str) -> None:
    """Up to the end token of each row: ``generate`` goes on with a row that has ended until all have."""
    model = tiny_model(family)
    batch, rows = rows_of(family, ROWS)
    long = generate(model, batch, max_new_tokens=NEW).sequences[:, -NEW:]
    ends = sorted({int(long[0, 2]), int(long[1, 3])})
    options = {"max_new_tokens": NEW, "eos_token_id": ends, "pad_token_id": 0}
    lengths = []
    for inputs, images in zip(rows, ROWS, strict=True):
        sequences = generate(model, inputs, **options).sequences
        lengths += [sequences.shape[1] - inputs["input_ids"].shape[1]] if images else []
    assert min(lengths) < max(lengths), "the rows of this batch end at the same step"
    count = sum(length > 1 for length in lengths)
    with plphp.prune(model, settings(family, count)) as alone:
        for inputs in rows:
            generate(model, inputs, **options)
    with plphp.prune(model, settings(family, count)) as together:
        generate(model, batch, **options)
    assert together.report.collecting == BankProgress(count, count)
    assert alone.bank is not None
    assert_same_bank(together.bank, alone.bank)
    assert alone.bank.record["answer_tokens"] == sum(lengths) - len(lengths)


@pytest.mark.parametrize("copies", [1, 2])
def test_a_padded_batch_gives_the_codebooks_of_its_rows_alone(copies: int) -> None:
    """Whatever stands before a row, and however many answers it has: there are fewer entries than centroids."""

    def config() -> Any:
        made = TINY["llava"].config()
        made.text_config.head_dim = 16
        return made

    tiny = dataclasses.replace(TINY["llava"], config=config)
    model = tiny.build()
    options: dict[str, Any] = {"max_new_tokens": NEW, "num_return_sequences": copies, "do_sample": copies > 1}
    banks = []
    for calls in (tiny.rows(model, list(ROWS), seed=5), [tiny.inputs(model, list(ROWS), seed=5)]):
        with plphp.prune(model, settings(collect=3)) as run:
            for inputs in calls:
                generate(model, inputs, **options)
        assert run.bank is not None
        assert run.bank.books is not None
        assert run.bank.record["book_prompts"] == 3
        banks.append(run.bank)
    for layer, expected in banks[0].books.items():
        for side in ("keys", "values"):
            ours, theirs = (getattr(books, side).tensors() for books in (banks[1].books[layer], expected))
            assert expected.keys.fine.abs().max() > 0.1
            for name in ("fine", "coarse"):
                assert (ours[name].float() - theirs[name].float()).abs().max() < 1e-2, (layer, side, name)


def test_a_batch_that_would_collect_too_much_counts_up_to_the_last_wanted_row() -> None:
    model = tiny_model("llava")
    batch, rows = rows_of("llava", (1, 2, 1))
    with plphp.prune(model, settings(collect=2)) as run:
        generate(model, batch, max_new_tokens=NEW)
    assert run.report.collecting == BankProgress(2, 2)
    assert_same_bank(run.bank, plphp.collect_query_bank(model, rows[:2], max_new_tokens=NEW).rounded())


def test_of_several_returned_sequences_the_first_counts() -> None:
    model = tiny_model("qwen2-vl")
    batch, _ = rows_of("qwen2-vl", (1, 2))
    with plphp.prune(model, settings("qwen2-vl", 2)) as run:
        torch.manual_seed(3)
        sequences = generate(model, batch, do_sample=True, num_return_sequences=3, max_new_tokens=NEW).sequences
    assert len(sequences) == 6
    assert run.report.collecting == BankProgress(2, 2)
    start = batch["input_ids"].shape[1]
    heads = model.config.get_text_config().num_attention_heads
    seen: list[torch.Tensor] = []
    projection = model.get_decoder().layers[0].self_attn.q_proj
    hook = projection.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    try:
        mask = torch.cat([batch["attention_mask"], torch.ones(2, NEW - 1, dtype=torch.long)], 1)
        rest = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
        types = torch.cat([rest.pop("mm_token_type_ids"), torch.zeros(2, NEW - 1, dtype=torch.long)], 1)
        with torch.no_grad():
            model(input_ids=sequences[::3, :-1], attention_mask=mask, mm_token_type_ids=types, **rest)
    finally:
        hook.remove()
    expected = seen[0][:, start:].unflatten(-1, (heads, -1)).flatten(0, 1).transpose(0, 1)
    assert run.bank is not None
    assert (run.bank.layers[0].queries.double() - expected).abs().max() < 0.01 * expected.abs().max()  # bfloat16


def test_what_counts_for_nothing() -> None:
    """Prompts of text, answers of one token, calls that fail: the answer is whole, and the bank as before."""
    model = tiny_model("llava")

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            if input_ids.shape[1] > start + 3:
                raise RuntimeError("stopped by its user")
            return torch.zeros(len(input_ids), dtype=torch.bool)

    with plphp.prune(model, settings(collect=1)) as run:
        generate(model, prompt("llava", 1, 0), max_new_tokens=NEW)
        assert run.report.collecting == BankProgress(0, 1)
        generate(model, prompt("llava", 2), max_new_tokens=1)
        assert run.report.collecting == BankProgress(0, 1)
        start = prompt("llava", 3)["input_ids"].shape[1]
        with pytest.raises(RuntimeError, match="stopped by its user"):
            generate(model, prompt("llava", 3), max_new_tokens=NEW, stopping_criteria=StoppingCriteriaList([Stop()]))
        assert run.bank is None
        generate(model, prompt("llava", 4), max_new_tokens=NEW)
    assert run.report.collecting == BankProgress(1, 1)
    expected = plphp.collect_query_bank(model, [prompt("llava", 4)], max_new_tokens=NEW)
    assert_same_bank(run.bank, expected.rounded())
    assert "generate" not in model.__dict__


@pytest.mark.parametrize(
    ("answer", "ends", "pad", "length"),
    [
        ([5, 6, 7, 8], None, None, 4),
        ([5, 2, 0, 0], [2], 0, 2),
        ([5, 3, 2, 2], [2, 3], 2, 2),
        ([5, 6, 0, 0], [2], 0, 2),  # ended by a stopping criterion
        ([5, 0, 6, 2], 2, 0, 4),
        ([2, 2, 2, 2], 2, 2, 1),
    ],
)
def test_where_an_answer_ends(answer: list[int], ends: Any, pad: int | None, length: int) -> None:
    config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
    assert answer_lengths(torch.tensor([answer, answer]), config) == [length, length]


def test_a_folder_keeps_the_bank_over_restarts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every session stands for a process: it goes on where the last one was, and the end is one bank."""
    model, config = tiny_model("qwen2-vl"), settings("qwen2-vl", 3, folder=str(tmp_path / "made" / "here"))
    prompts = [prompt("qwen2-vl", seed) for seed in (10, 11, 12)]
    for number, inputs in enumerate(prompts, 1):
        with plphp.prune(model, config) as run:
            generate(model, inputs, max_new_tokens=NEW)
        assert run.report.collecting == BankProgress(number, 3)
    [file] = (tmp_path / "made" / "here").glob("*.safetensors")
    digest = weights_hash(model)
    assert file.name == f"{model.config.model_type}-{digest[:16]}.safetensors"
    kept = QueryBank.load(file)
    assert kept.record["weights_sha256"] == digest
    assert kept.record["prompts"] == 3
    assert kept.record["decoder_layers"] == model.config.get_text_config().num_hidden_layers
    assert_same_bank(kept, plphp.collect_query_bank(model, prompts, max_new_tokens=NEW).rounded())
    with caplog.at_level(logging.INFO, "plphp"), plphp.prune(model, config) as last:
        pruned = generate(model, prompt("qwen2-vl", 20))
        assert last.report.collecting is None
    assert f"Pruning by the query bank of 3 prompts in {file}" in caplog.text
    with plphp.prune(model, with_file(config, file)) as by_file:
        assert_same_generation(generate(model, prompt("qwen2-vl", 20)), pruned)
    assert by_file.report.prompts == last.report.prompts
    assert sorted(path.suffix for path in file.parent.iterdir()) == [".lock", ".safetensors"]


def test_a_bank_of_other_weights_or_a_broken_one_is_refused_and_stays(tmp_path: Path) -> None:
    model, config = TINY["llava"].build(), settings(collect=1, folder=str(tmp_path))
    with plphp.prune(model, config):
        generate(model, prompt("llava", 10), max_new_tokens=NEW)
    [file] = tmp_path.glob("*.safetensors")
    content = file.read_bytes()
    with torch.no_grad():
        model.get_input_embeddings().weight[0] += 1
    with plphp.prune(model, config) as run:
        generate(model, prompt("llava", 10), max_new_tokens=NEW)
    assert run.report.collecting == BankProgress(1, 1), "the bank of other weights was taken"
    own = file.with_name(f"llava-{weights_hash(model)[:16]}.safetensors")
    own.write_bytes(content)
    with pytest.raises(ConfigError, match=r"another model: its weights_sha256 is .*Move the file .* away"):
        plphp.apply(model, config)
    own.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"not a safetensors file.*Move the file .* away"), plphp.prune(model, config):
        pass
    assert own.read_bytes() == content[: len(content) // 2]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Cannot make the folder"):
        plphp.apply(model, settings(folder=str(tmp_path / "file" / "folder")))
    assert "generate" not in model.__dict__


def test_sessions_that_share_a_folder_share_a_bank(tmp_path: Path) -> None:
    """As two processes do: what comes from either counts, and both prune when it is complete."""
    first, second = TINY["llava"].build(), TINY["llava"].build()
    second.load_state_dict(first.state_dict())
    config = settings(collect=3, folder=str(tmp_path))
    ours, theirs = plphp.apply(first, config), plphp.apply(second, config)
    inputs = [prompt("llava", seed) for seed in (10, 11, 12)]
    for model, one in zip((first, second, first), inputs, strict=True):
        generate(model, one, max_new_tokens=NEW)
    assert ours.report.collecting == BankProgress(3, 3)
    generate(second, prompt("llava", 20))
    assert theirs.report.collecting is None
    assert theirs.report.retention < 0.4
    assert_same_bank(ours.bank, plphp.collect_query_bank(first, inputs, max_new_tokens=NEW).rounded())
    assert_same_bank(theirs.bank, ours.bank)  # type: ignore[arg-type]
    plphp.remove(first), plphp.remove(second)


def test_threads_that_share_a_session_lose_no_answer() -> None:
    model = TINY["llava"].build()
    session = plphp.apply(model, settings(collect=8))
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            generate(model, prompt("llava", seed), max_new_tokens=NEW)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(10, 18)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plphp.remove(model)
    assert not errors
    prompts = [prompt("llava", seed) for seed in range(10, 18)]
    expected = plphp.collect_query_bank(model, prompts, max_new_tokens=NEW).rounded()
    assert session.bank is not None
    assert session.bank.record["prompts"] == 8

    def columns(bank: QueryBank) -> list[tuple[float, ...]]:
        return sorted(tuple(column.flatten().tolist()) for column in bank.layers[0].queries.float().unbind(1))

    for ours, theirs in zip(columns(session.bank), columns(expected), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_report_and_log_say_that_answers_are_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llava")
    with caplog.at_level(logging.INFO, "plphp"), plphp.prune(model, settings(collect=2)) as run:
        for seed in (10, 11):
            generate(model, prompt("llava", seed), max_new_tokens=NEW)
        report = run.report
        generate(model, prompt("llava", 12))
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "the next 2 answer(s) to prompts with vision tokens, this one included, are not pruned" in warnings[0]
    said = [record.message for record in caplog.records if record.levelno == logging.INFO]
    assert said[:2] == ["The query bank is of 1 of 2 prompts.", "The query bank is of 2 of 2 prompts."]
    assert said[2].startswith("The query bank is complete: 2 prompts, ")
    assert "pruning from now on" in said[2]
    assert len(said) == 3
    report.to_json(tmp_path / "report.json")
    assert PruneReport.from_json(tmp_path / "report.json") == report
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["collecting"] == {"collected": 2, "wanted": 2}
    del values["collecting"]  # as an older version wrote it
    assert PruneReport.from_json(json.dumps(values)).collecting is None
    with pytest.raises(ConfigError, match="collected must be a number"):
        PruneReport.from_json(json.dumps({**values, "collecting": {"collected": "2", "wanted": 2}}))


def test_the_warning_comes_before_the_memory_runs_out(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answer is that of the full cache, which may be too large for what is there."""
    model = TINY["llava"].build()
    with plphp.prune(model, settings(collect=2)):
        generate(model, prompt("llava", 1, 0), max_new_tokens=NEW)
        assert "no query bank yet" not in caplog.text, "a prompt of text is never pruned"

        def full(*_: Any, **__: Any) -> Any:
            raise torch.OutOfMemoryError("out of memory")

        monkeypatch.setattr(model.get_decoder().layers[0], "forward", full)
        with pytest.raises(torch.OutOfMemoryError):
            generate(model, prompt("llava", 2), max_new_tokens=NEW)
    assert "the next 2 answer(s) to prompts with vision tokens, this one included, are not pruned" in caplog.text


def test_answers_of_one_token_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """They are never pruned, as none of them counts."""
    model = tiny_model("llava")
    batch, _ = rows_of("llava", (1, 0, 1))
    with plphp.prune(model, settings(collect=2)) as run:
        generate(model, prompt("llava", 2), max_new_tokens=1)
        assert [record.message[:31] for record in caplog.records] == ["There is no query bank yet: the"]
        generate(model, batch, max_new_tokens=1)
    assert [record.message[:31] for record in caplog.records][1:] == ["The last 3 answer(s) gave nothi"]
    assert run.report.collecting == BankProgress(0, 2)


def test_a_full_disk_costs_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, config = tiny_model("llava"), settings(collect=1, folder=str(tmp_path))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with plphp.prune(model, config) as run:
        with monkeypatch.context() as patch:
            patch.setattr(QueryBank, "save", full)
            answer = generate(model, prompt("llava", 10), max_new_tokens=NEW).sequences
        assert answer.shape[1] == prompt("llava", 10)["input_ids"].shape[1] + NEW
        assert run.report.collecting == BankProgress(1, 1)
        assert "No space left on device" in caplog.text
        assert run.bank is None
        generate(model, prompt("llava", 11), max_new_tokens=NEW)  # it saves what the first could not
        assert_same_bank(run.bank, plphp.collect_query_bank(model, [prompt("llava", 10)], max_new_tokens=NEW).rounded())
        generate(model, prompt("llava", 20))
        assert run.report.retention < 0.4


def test_sessions_hash_the_weights_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service may open one for every request; training in between is noticed."""
    model, config, hashed = TINY["llava"].build(), settings(folder=str(tmp_path)), []
    monkeypatch.setattr("plphp.inputs.weights.weights_hash", lambda model: hashed.append(1) or weights_hash(model))
    for _ in range(3):
        with plphp.prune(model, config):
            pass
    assert len(hashed) == 1
    for times, change in enumerate(("add", "load", "half"), 2):
        if change == "add":
            with torch.no_grad():
                model.get_input_embeddings().weight += 1
        elif change == "load":
            model.load_state_dict(TINY["llava"].build().state_dict())
        else:
            model.half()
        for _ in range(2):
            assert kept_weights_hash(model) == weights_hash(model)
        assert len(hashed) == times, change
    freed = weakref.ref(model)
    del model
    gc.collect()
    assert freed() is None, "the hash holds on to the model"


def test_a_model_is_asked_once_how_it_rotates_its_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the session's own bank and by what else needs to know it."""
    model, looked, find = TINY["llava"].build(), [], rotation_probe.find_rotations
    monkeypatch.setattr(rotation_probe, "find_rotations", lambda model: looked.append(1) or find(model))
    session = plphp.apply(model, settings())
    for seed in (10, 11):
        generate(model, prompt("llava", seed), max_new_tokens=NEW)
        rotation_probe.rotations_of(session._lease.attachment)
    plphp.remove(model)
    assert len(looked) == 1


def test_a_method_inside_prefill_waits_for_the_bank_as_well(tmp_path: Path) -> None:
    model = tiny_model("llava")
    config = PLPHPConfig.parse("fastv:retention_rate=0.5,layer=1+query_bank:retention_rate=0.3,collect=1")
    with plphp.prune(model, config) as run:
        whole = generate(model, prompt("llava", 10), max_new_tokens=NEW)
        assert run.report.retention == 1
        output = generate(model, prompt("llava", 20))
        assert run.report.retention < 0.4
        assert run.bank is not None
        run.bank.save(tmp_path / "bank.safetensors")
    assert_same_generation(whole, generate(model, prompt("llava", 10), max_new_tokens=NEW))
    chain = f"fastv:retention_rate=0.5,layer=1+query_bank:retention_rate=0.3,bank={tmp_path}/bank.safetensors"
    with plphp.prune(model, PLPHPConfig.parse(chain)) as by_file:
        assert_same_generation(generate(model, prompt("llava", 20)), output)
    assert by_file.report.prompts == run.report.prompts


def test_later_settings_that_the_model_cannot_meet_are_refused_at_the_first_prompt() -> None:
    model = tiny_model("llava")
    config = PLPHPConfig.from_dict({**settings().to_dict(), "exempt_layers": [99]})
    with pytest.raises(ConfigError, match="exempt_layers names layer 99"), plphp.prune(model, config):
        generate(model, prompt("llava", 10))


def test_what_cannot_collect_is_refused_by_name() -> None:
    model, config, inputs = tiny_model("llava"), settings(), prompt("llava", 10)
    match = r"{} cannot collect the query bank that query_bank has no file of: .*plphp collect.*bank=FILE"
    with pytest.raises(UnsupportedFeatureError, match=match.format("A PrunedCache")):
        PrunedCache.for_inputs(model, inputs, config)
    with pytest.raises(UnsupportedFeatureError, match=match.format("plphp.branch")):
        plphp.branch(model, inputs, [PLPHPConfig(), config])
    with pytest.raises(UnsupportedFeatureError, match=match.format("A comparison")):
        compare(model, None, inputs, config)
    with pytest.raises(UnsupportedFeatureError, match=match.format("A PrunedCache")):
        plphp.measure_retention(model, [inputs], config)
    with (
        pytest.raises(UnsupportedFeatureError, match=r"no query bank yet, and beams.*num_beams=1.*plphp collect"),
        plphp.prune(model, config),
    ):
        generate(model, inputs, num_beams=2)
    chain = PLPHPConfig.parse("fastv:retention_rate=0.5,layer=1+query_bank:retention_rate=0.3,collect=2")
    with pytest.raises(UnsupportedFeatureError, match=match.format("A PrunedCache")):  # and not "fastv and query_bank"
        PrunedCache.for_inputs(model, inputs, chain)
    for options, names in (({"collect": 4}, "collect"), ({"collect": 4, "folder": "here"}, "collect and folder")):
        named = PLPHPConfig(method="query_bank", options={"bank": "bundled", **options})
        with pytest.raises(ConfigError, match=f"has the bank bundled.*leave out bank, or {names}"):
            plphp.branch(model, inputs, [named])
    assert "generate" not in model.__dict__


def test_beams_are_fine_with_the_complete_bank() -> None:
    model = tiny_model("llava")
    with plphp.prune(model, settings(collect=1)) as run:
        generate(model, prompt("llava", 10), max_new_tokens=NEW)
        generate(model, prompt("llava", 20), num_beams=2)
        assert run.report.retention < 0.4


def test_a_rotation_that_is_not_known_is_refused_before_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["llava"].build()
    monkeypatch.setitem(model.config.get_text_config().rope_parameters, "rope_type", "dynamic")
    with pytest.raises(UnsupportedModelError, match="'dynamic'"), plphp.prune(model, settings()) as run:
        generate(model, prompt("llava", 10))
    assert run.bank is None
    assert "generate" not in model.__dict__


def test_bad_rows_are_left_out_of_the_bank() -> None:
    model, tiny = tiny_model("llava"), TINY["llava"]
    prompts = tiny._rows(model, (1, 1), (5, 7), 0, video=False)
    prompts[0]["pixel_values"] = torch.full_like(prompts[0]["pixel_values"], torch.nan)
    with plphp.prune(model, settings(collect=1)) as run:
        generate(model, drop_empty(collate(prompts)), max_new_tokens=NEW)
    assert run.report.collecting == BankProgress(1, 1)
    assert run.bank is not None
    expected = plphp.collect_query_bank(model, [drop_empty(collate(prompts[1:]))], max_new_tokens=NEW)
    assert_same_bank(run.bank, expected.rounded())


@torch.no_grad()
def test_a_bank_gives_away_the_words_of_its_answers() -> None:
    """What the documents say of privacy: the first layer's queries name the tokens to whoever has the weights."""
    model = tiny_model("llava")
    inputs = prompt("llava", 10)
    with plphp.prune(model, settings(collect=1)) as run:
        answer = generate(model, inputs, max_new_tokens=NEW).sequences[0, inputs["input_ids"].shape[1] :]
    assert run.bank is not None
    layer = model.get_decoder().layers[0]
    every = layer.self_attn.q_proj(layer.input_layernorm(model.get_input_embeddings().weight))  # [vocab, q_heads * dim]
    queries = run.bank.layers[0].queries.to(every.dtype).transpose(0, 1).flatten(1)  # [samples, q_heads * dim]
    assert torch.equal(torch.cdist(queries, every).argmin(1), answer[:-1])


def test_a_kept_bank_of_other_rotary_settings_is_refused(tmp_path: Path) -> None:
    """The weights are the same, and so is their hash: the queries would be turned to other positions."""
    model = tiny_model("llava")
    config = settings(collect=1, folder=str(tmp_path))
    with plphp.prune(model, config):
        generate(model, prompt("llava", 1))
    [file] = tmp_path.glob("*.safetensors")
    bank = QueryBank.load(file)
    layers = {
        number: dataclasses.replace(
            layer, rotation=Rotation(layer.rotation.frequencies * 2, layer.rotation.interleaved)
        )
        for number, layer in bank.layers.items()
    }
    dataclasses.replace(bank, layers=layers).save(file)
    with plphp.prune(model, config), pytest.raises(ConfigError, match="turns the queries of layer 0 otherwise"):
        generate(model, prompt("llava", 2))


def test_a_complete_bank_is_read_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llava")
    config = settings(collect=1, folder=str(tmp_path))
    with plphp.prune(model, config):
        generate(model, prompt("llava", 1))
    monkeypatch.setattr("plphp.policy.bank_folder.os.access", lambda *_: False)
    with plphp.prune(model, config) as run:
        generate(model, prompt("llava", 2))
    assert run.report.collecting is None
    assert run.report.retention < 0.5


def test_a_bank_is_written_with_the_permissions_of_new_files_and_not_printed(tmp_path: Path) -> None:
    model = tiny_model("llava")
    with plphp.prune(model, settings(collect=1)) as run:
        generate(model, prompt("llava", 1))
        run.bank.save(tmp_path / "bank.safetensors")
        shown = repr(run.bank)
    (tmp_path / "new").touch()
    assert (tmp_path / "bank.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode
    assert "tensor" not in shown
