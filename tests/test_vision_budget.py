# SPDX-License-Identifier: Apache-2.0
"""Images fade below a budget, over families x methods x rules; what is held is what the ledger says."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import plphp
from invariants import assert_same_generation, tensors_of
from memory_chat import answer, by_token, converse, dense_copy, held_entries, next_turn, vision_bytes
from plphp.engines.hf.cache_argument import cache_in, passed
from plphp.kernels.rungs import RUNGS
from plphp.pruning import fading
from plphp.pruning.report import PruneReport
from plphp.settings.vision_budget import RULES, VisionBudget
from precision import assert_exact
from tier_reference import books_file, noting_what_is_held
from tiny_models import TEXT_IDS, TIERS, tiers_model

pytestmark = pytest.mark.usefixtures("float64")

METHODS = ("none", "quantized", "plphp", "uniform:retention_rate=0.5", 'random:tiers="pr2=.2,whole=.1,rvq=.3,pq=.2"')


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("books")


def line(method: str, budget: Any, folder: Path, family: str = "llava", rule: str = "ranked") -> str:
    """A method with a budget, with codebooks where its rungs need them."""
    books = f",books={books_file(folder, family)}" if "pq" in method else ""
    return f"{method}{',' if ':' in method else ':'}vision_budget={budget},fading={rule}{books}"


def spent(method: str, folder: Path, family: str = "llava", turns: int = 4) -> int:
    """Bytes of the vision entries of a conversation that nothing bounds."""
    cache, *_ = converse(tiers_model(family), TIERS[family], line(method, "1GB", folder, family), turns)
    return vision_bytes(cache)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", METHODS)
def test_bytes_stay_below_the_budget_after_every_turn(method: str, rule: str, folder: Path) -> None:
    full = spent(method, folder)
    for share in (0.6, 0.2):
        budget = int(share * full)
        for turns in (2, 4):
            cache, *_ = converse(tiers_model("llava"), TIERS["llava"], line(method, budget, folder, rule=rule), turns)
            assert 0 < vision_bytes(cache) <= budget


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "gemma3"])
@pytest.mark.parametrize("method", METHODS)
def test_a_budget_that_does_not_bind_changes_nothing(method: str, family: str, folder: Path) -> None:
    model, tiny = tiers_model(family), TIERS[family]
    bounded = line(method, "1GB", folder, family)
    cache, outputs, _ = converse(model, tiny, bounded, 3)
    free = bounded.replace("vision_budget=1GB,fading=ranked", "seed=0").replace(",books=", ",books=")
    other, expected, _ = converse(model, tiny, free, 3)
    for output, own in zip(outputs, expected, strict=True):
        assert_same_generation(output, own)
    assert cache.nbytes == other.nbytes


def faded(method: str, folder: Path, family: str = "llava", share: float = 0.3, turns: int = 4, **kwargs: Any) -> Any:
    """A conversation within a share of what it would take."""
    budget = int(share * spent(method, folder, family, turns) * len(kwargs.get("rows", (1,))))
    return converse(tiers_model(family), TIERS[family], line(method, budget, folder, family), turns, **kwargs)


@pytest.mark.parametrize(
    ("family", "method", "rows"),
    [(family, method, (1,)) for family in ("llava", "qwen2-vl") for method in METHODS]
    + [("llava", method, (2, 1)) for method in METHODS]
    + [("llava", "none", (2, 0, 1))],
)
def test_a_faded_cache_is_the_dense_cache_of_what_it_holds(
    family: str, method: str, rows: tuple[int, ...], folder: Path
) -> None:
    chat = faded(method, folder, family, rows=rows, share=0.25)
    assert any(layer.coded for layer in chat.cache.layers)
    assert_is_dense(family, *chat)


def assert_is_dense(family: str, cache: Any, outputs: Any, inputs: Any) -> None:
    """A turn of text is answered like from the dense cache of what is held."""
    model, tiny, cache = tiers_model(family), TIERS[family], copy.deepcopy(cache)
    inputs = next_turn(model, tiny, inputs, outputs[-1].sequences, seed=9, with_image=False)
    arguments = cache.model_inputs(cache.plan(inputs))
    with torch.no_grad(), dense_copy(model, cache) as dense:
        expected = model(**{**arguments, **passed(dense)}).logits
    with torch.no_grad():
        assert_exact(model(**{**arguments, **passed(cache)}).logits, expected)


@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
@pytest.mark.parametrize("rows", [(1,), (2, 1)], ids=str)
def test_the_ledger_names_the_tokens_of_entries(family: str, rows: tuple[int, ...], folder: Path) -> None:
    """Whole entries are the keys and values of the tokens that it names; codes are near them, and near no others."""
    if family == "qwen2-vl" and len(rows) > 1:
        pytest.skip("its images lie row by row in one tensor")
    with noting_what_is_held() as notes:
        cache, *_ = faded("none", folder, family, rows=rows, turns=3)
    near, far = 0.0, 0.0
    for layer in cache.layers:
        keys = torch.cat([note.keys for note in notes if note.layer is layer], 2)
        values = torch.cat([note.values for note in notes if note.layer is layer], 2)
        whole = len(layer.prefix.pair_counts)
        for number, (row, head, position, own_keys, own_values) in enumerate(held_entries(layer)):
            if number < whole:
                assert torch.equal(own_keys, keys[row, head, position])
                assert torch.equal(own_values, values[row, head, position])
            else:
                near += (own_keys - keys[row, head, position]).square().sum().item()
                far += (own_keys - keys[row, head, position].roll(1, 0)).square().sum().item()
    assert near < 0.2 * far


def test_rows_that_share_entries_fade_apart(folder: Path) -> None:
    model, tiny = tiers_model("llava"), TIERS["llava"]
    chat = faded("none", folder)
    copied = copy.deepcopy(chat.cache)
    copied.batch_repeat_interleave(2)
    copied.reorder_cache(torch.tensor([1, 0]))
    assert vision_bytes(copied) == vision_bytes(chat.cache)
    assert [image.row for image in copied.images] == [0, 1] * 4
    assert {image.entries["whole"] for image in copied.images[:2]} == {chat.cache.images[0].entries["whole"]}
    sequences = chat.outputs[-1].sequences.repeat(2, 1)
    inputs = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in chat.inputs.items()}
    inputs = next_turn(model, tiny, inputs, sequences, seed=5)
    budget = copied.fading.budget_of(copied._pruned)
    output = answer(model, copied, inputs)
    assert vision_bytes(copied) <= budget
    assert_is_dense("llava", copied, [output], inputs)
    copied.batch_select_indices(torch.tensor([1]))
    assert {image.row for image in copied.images} == {0}
    one = {name: value[1:] for name, value in inputs.items()}
    output.sequences = output.sequences[1:]
    assert_is_dense("llava", copied, [output], one)


def test_beams_and_samples_read_what_has_faded(folder: Path) -> None:
    model, tiny = tiers_model("llava"), TIERS["llava"]
    method = 'random:tiers="r4=.5,r2=.4"'
    budget = 3 * spent(method, folder, turns=1)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    bound = converse(model, tiny, line(method, budget, folder), 1, rows=(3, 1), **beams)
    assert {image.row for image in bound.cache.images} == set(range(6))
    assert 0 < vision_bytes(bound.cache) <= budget
    free = converse(model, tiny, line(method, "1GB", folder), 1, rows=(3, 1), **beams)
    for cache in (bound.cache, free.cache):
        report = cache.report()
        assert report.vision_bytes == pytest.approx(3 * vision_bytes(cache), abs=12)  # rows share what is stored
        assert [len(layer.rows) for layer in report.prompts[0].layers] == [6] * len(cache.layers)
    with pytest.raises(plphp.UnsupportedFeatureError, match="cannot restore an image: it holds the beams"):
        bound.cache.restore(0, pixel_values=bound.inputs["pixel_values"])
    expected = converse(model, tiny, method, 1, rows=(3, 1), **beams)
    assert torch.equal(free.outputs[0].sequences, expected.outputs[0].sequences)
    sampled = converse(
        model, tiny, line(method, budget, folder), 1, rows=(3, 1), do_sample=True, num_return_sequences=2
    )
    assert 0 < vision_bytes(sampled.cache) <= budget
    assert_is_dense("llava", sampled.cache, sampled.outputs, repeated(sampled.inputs, 2))


def repeated(inputs: dict[str, Any], times: int) -> dict[str, Any]:
    return {name: value.repeat_interleave(times, dim=0) for name, value in inputs.items()}


@pytest.mark.parametrize("method", METHODS)
def test_forgetting_leaves_nothing_of_an_image(method: str, folder: Path) -> None:
    chat = faded(method, folder, share=0.4)
    cache = chat.cache
    before, images = vision_bytes(cache), cache.images
    assert sum(image.nbytes for image in images) == pytest.approx(before, abs=len(images))
    victim = max(images, key=lambda image: image.nbytes)
    cache.forget(victim.number)
    assert vision_bytes(cache) == pytest.approx(before - victim.nbytes, abs=1)
    now = cache.images
    assert now[victim.number].forgotten
    assert now[victim.number].nbytes == 0
    assert [image.entries for image in now if image != now[victim.number]] == [
        image.entries for image in images if image != victim
    ]
    for layer in cache.layers:
        for *_, position, _, _ in held_entries(layer):
            assert not bool(((position >= victim.first) & (position <= victim.last)).any())
    assert_is_dense("llava", *chat)


def test_one_of_several_images_of_a_prompt_is_forgotten(folder: Path) -> None:
    """Codes over groups of entries are made again of what they stand for."""
    chat = converse(tiers_model("llava"), TIERS["llava"], line("quantized:tiers=c3", "1GB", folder), 2, rows=(3,))
    first = chat.cache.images
    assert [image.turn for image in first] == [1, 1, 1, 2]
    chat.cache.forget(1)
    now = chat.cache.images
    assert now[1].nbytes == 0
    assert now[3].entries == first[3].entries
    assert now[0].vision_kept == now[2].vision_kept == 1
    assert_is_dense("llava", *chat)
    chat.cache.forget(0)
    chat.cache.forget(2)
    chat.cache.forget(3)
    assert vision_bytes(chat.cache) == 0
    assert not any(layer.coded for layer in chat.cache.layers)


def test_what_cannot_be_forgotten_is_refused(folder: Path) -> None:
    model, tiny = tiers_model("llava"), TIERS["llava"]
    chat = converse(model, tiny, line("none", "1GB", folder), 1)
    for number in (1, -1, True, "0"):
        with pytest.raises(plphp.ConfigError, match=r"the images 0 to 0, got image"):
            chat.cache.forget(number)
    free = converse(model, tiny, "none", 1).cache
    with pytest.raises(plphp.UnsupportedFeatureError, match="vision_budget=1GB"):
        free.forget(0)
    with pytest.raises(plphp.UnsupportedFeatureError, match="vision_budget=1GB"):
        _ = free.images
    chat.cache.plan(next_turn(model, tiny, chat.inputs, chat.outputs[-1].sequences))
    with pytest.raises(plphp.CacheStateError, match="planned"):
        chat.cache.forget(0)


def test_a_report_says_what_is_held_now(folder: Path) -> None:
    cache, *_ = faded('random:tiers="r4=.5,r2=.4"', folder)
    report = cache.report()
    assert report.images == cache.images
    assert report.vision_bytes == pytest.approx(vision_bytes(cache), abs=4)
    assert report.budget_bytes >= report.vision_bytes
    assert report.ledger_bytes == sum(layer.ledger.nbytes for layer in cache.layers)
    entries = sum(sum(image.entries.values()) for image in report.images)
    kept = sum(sum(row.kept) for prompt in report.prompts for layer in prompt.layers for row in layer.rows)
    assert kept == entries
    held = sum(row.vision_bytes for prompt in report.prompts for layer in prompt.layers for row in layer.rows)
    assert held == pytest.approx(report.vision_bytes, abs=4)
    assert PruneReport.from_json(report.to_json()) == report
    assert json.loads(report.to_json())["images"][0]["turn"] == 1


def test_an_error_in_the_middle_ends_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tiny, moved = tiers_model("llava"), TIERS["llava"], []
    budget = int(0.3 * spent("none", folder))

    def failing(move: Any) -> None:
        moved.append(move.layer)
        if len(moved) == 2:
            raise RuntimeError("no memory left")
        run(move)

    run = fading.Move.run
    monkeypatch.setattr(fading.Move, "run", failing)
    inputs = tiny.inputs(model, (3,))
    cache = plphp.PrunedCache.for_inputs(model, inputs, plphp.PLPHPConfig.parse(line("none", budget // 2, folder)))
    with pytest.raises(RuntimeError, match="no memory left"):
        answer(model, cache, inputs)
    assert cache.nbytes == 0
    with pytest.raises(plphp.CacheStateError, match="cannot be used any more: an error stopped the reading"):
        answer(model, cache, inputs)


def test_a_budget_that_holds_nothing_is_refused(folder: Path) -> None:
    model, tiny = tiers_model("llava"), TIERS["llava"]
    with pytest.raises(plphp.ConfigError, match=r"vision_budget of 100 bytes.*at least (\d+)") as error:
        converse(model, tiny, line("none", 100, folder), 1)
    least = int(str(error.value).split("at least ")[1].split()[0])
    cache, *_ = converse(model, tiny, line("none", least, folder), 1)
    assert 0 < vision_bytes(cache) <= least


def test_a_budget_of_tokens_is_that_many_whole(folder: Path) -> None:
    cache, *_ = converse(tiers_model("llava"), TIERS["llava"], line("none", "20 tokens", folder), 3)
    nbytes = 20 * sum(layer.entry_nbytes for layer in cache.layers)
    assert cache.report().budget_bytes == nbytes
    assert 0.8 * nbytes < vision_bytes(cache) <= nbytes


def test_where_images_cannot_fade_a_budget_is_refused() -> None:
    model, tiny = tiers_model("llava"), TIERS["llava"]
    config = plphp.PLPHPConfig(method="none", vision_budget="1MB")
    with pytest.raises(plphp.UnsupportedFeatureError, match="one prompt, and vision_budget=1MB"):
        plphp.branch(model, tiny.inputs(model, (1,)), [config])


def test_crop_copies_and_reset_know_the_ledger(folder: Path) -> None:
    chat = faded("none", folder)
    copied = copy.deepcopy(chat.cache)
    copied.crop(-1)
    assert copied.images == chat.cache.images
    copied.forget(0)
    assert not chat.cache.images[0].forgotten
    copied.reset()
    assert copied.images == []
    assert_is_dense("llava", *chat)


def pixels(tiny: Any, inputs: dict[str, Any], number: int = 0) -> dict[str, Any]:
    """The features of one image of some inputs."""
    from plphp.families.registry import family_of

    [kind] = [own for own in family_of(tiny.config()).features if inputs.get(own.pixels[0]) is not None]
    return kind.items(inputs)[number]


@pytest.mark.parametrize("family", ["llava", "qwen2-vl", "llava-next"])
def test_a_restored_image_is_as_if_it_had_never_faded(family: str) -> None:
    model, tiny = tiers_model(family), TIERS[family]
    first = tiny.inputs(model, (2,))
    cache = plphp.PrunedCache.for_inputs(model, first, plphp.PLPHPConfig.parse("none:vision_budget=1GB"))
    outputs = [answer(model, cache, first)]
    second = next_turn(model, tiny, first, outputs[-1].sequences, seed=1)
    outputs.append(answer(model, cache, second))
    whole = copy.deepcopy(cache)
    cache.forget(1)
    assert cache.nbytes < whole.nbytes
    cache.restore(1, **pixels(tiny, first, 1))
    assert cache.nbytes == whole.nbytes
    assert [image.entries for image in cache.images] == [image.entries for image in whole.images]
    for layer, expected in zip(cache.layers, whole.layers, strict=True):
        assert layer.ledger.whole.block.counts == expected.ledger.whole.block.counts
        assert torch.equal(layer.ledger.whole.position, expected.ledger.whole.position)
        assert_exact(layer.prefix.keys, expected.prefix.keys)
        assert_exact(layer.prefix.values, expected.prefix.values)
    third = next_turn(model, tiny, second, outputs[-1].sequences, seed=2)
    assert_same_generation(answer(model, cache, third), answer(model, whole, third))


def test_a_restored_image_takes_the_places_of_others(folder: Path) -> None:
    """A padded batch of rows with several images, below a budget that binds."""
    model, tiny = tiers_model("llava"), TIERS["llava"]
    inputs = tiny.inputs(model, (2, 1))
    full = converse(model, tiny, line("none", "1GB", folder), 1, rows=(2, 1))
    budget = vision_bytes(full.cache) // 3
    chat = converse(model, tiny, line("none", budget, folder), 1, rows=(2, 1))
    before = chat.cache.images
    chat.cache.restore(0, **pixels(tiny, inputs, 0))
    after = chat.cache.images
    assert [image.row for image in after] == [0, 0, 1]
    assert vision_bytes(chat.cache) <= budget
    assert after[0].entries["whole"] > before[0].entries.get("whole", 0)
    assert after[1].nbytes < before[1].nbytes
    assert_is_dense("llava", *chat)
    for layer, expected in zip(chat.cache.layers[:1], full.cache.layers[:1], strict=True):
        for row, head, position, keys, _ in held_entries(layer)[: len(layer.prefix.pair_counts)]:
            of_row = {
                int(place): key
                for own, of_head, places, own_keys, _ in held_entries(expected)
                if (own, of_head) == (row, head)
                for place, key in zip(places, own_keys, strict=True)
            }
            for place, key in zip(position.tolist(), keys, strict=True):
                assert torch.allclose(key, of_row[place], atol=1e-10)


def test_what_cannot_be_restored_is_refused(folder: Path) -> None:
    model, tiny = tiers_model("llava"), TIERS["llava"]
    inputs = tiny.inputs(model, (2,))
    cache = plphp.PrunedCache.for_inputs(model, inputs, plphp.PLPHPConfig.parse("none:vision_budget=1GB"))
    answer(model, cache, inputs)
    before = copy.deepcopy(cache)
    with pytest.raises(plphp.HistoryError, match="not among the 1 whose features"):
        cache.restore(0, **pixels(tiny, inputs, 1))
    own = pixels(tiny, inputs, 0)
    with pytest.raises(plphp.HistoryError, match="another dtype"):
        cache.restore(0, pixel_values=own["pixel_values"].to(torch.bfloat16))
    with pytest.raises(plphp.ConfigError, match="there are none"):
        cache.restore(0)
    with pytest.raises(plphp.ConfigError, match="as the processor returns them, and pixel_values is a str"):
        cache.restore(0, pixel_values="photo.png")
    with pytest.raises(plphp.ConfigError, match="the images 0 to 1"):
        cache.restore(2, **own)
    cache.history.images.clear()
    with pytest.raises(plphp.HistoryError, match="never passed"):
        cache.restore(0, **own)
    assert cache.nbytes == before.nbytes
    early = converse(model, tiny, "fastv:retention_rate=0.8+none:vision_budget=1GB", 1).cache
    with pytest.raises(plphp.UnsupportedFeatureError, match="fastv chose tokens"):
        early.restore(0, **own)


@pytest.mark.parametrize(("family", "reason"), [("gemma3", "sliding window"), ("paligemma", "attend to tokens behind")])
def test_models_whose_images_cannot_be_computed_again_are_refused(family: str, reason: str) -> None:
    model, tiny = tiers_model(family), TIERS[family]
    cache = converse(model, tiny, "quantized:tiers=c3,vision_budget=1GB", 1).cache
    with pytest.raises(plphp.UnsupportedFeatureError, match=reason):
        cache.restore(0, **pixels(tiny, tiny.inputs(model, (1,))))


@pytest.mark.parametrize(
    "method", ["none", "plphp", "quantized", "fastv:retention_rate=0.8+uniform:retention_rate=0.5"]
)
def test_an_image_in_host_memory_comes_back_as_it_was_read(method: str, folder: Path) -> None:
    model, tiny = tiers_model("llava"), TIERS["llava"]
    chat = converse(model, tiny, f"{line(method, '1GB', folder)},tier_device=cpu", 3, rows=(2, 1))
    read = converse(model, tiny, "none", 1, rows=(2, 1)).cache  # the images of the first turn, whole
    cache = chat.cache
    report = cache.report()
    assert report.host_bytes == sum(tensor.nbytes for tensor in host_tensors(cache))
    assert report.kv_bytes == cache.nbytes
    cache.forget(1)
    assert cache.images[1].nbytes == 0
    cache.restore(1)
    image = cache.images[1]
    assert (image.forgotten, image.row) == (False, 0)
    if "fastv" not in method:
        assert image.entries == {"whole": 16 * 2 * 3}
        for layer, expected in zip(cache.layers, read.layers, strict=True):
            whole = held_entries(layer)[: len(layer.prefix.pair_counts)]
            for row, head, position, keys, values in whole:
                own = (position >= image.first) & (position <= image.last)
                start, _ = expected.prefix.index[:, row, head].tolist()
                padding = expected.length - expected.tail_length - expected.prefix.counts[row][head]
                if row == 0:
                    some = start + position[own] - padding
                    assert torch.equal(keys[own], expected.prefix.keys[some])
                    assert torch.equal(values[own], expected.prefix.values[some])
    assert_is_dense("llava", *chat)


def host_tensors(cache: Any) -> list[torch.Tensor]:
    return [states for row in cache._on_host.rows for own in row.values() for states in (own.keys, own.values)]


def test_host_memory_follows_rows_and_copies(folder: Path) -> None:
    chat = converse(tiers_model("llava"), TIERS["llava"], "none:vision_budget=1GB,tier_device=cpu", 2)
    copied = copy.deepcopy(chat.cache)
    nbytes = copied.report().host_bytes
    copied.batch_repeat_interleave(2)
    assert copied.report().host_bytes == nbytes
    copied.forget(1)
    copied.restore(1)
    assert {image.vision_kept for image in copied.images} == {1.0}
    copied.reset()
    assert copied._on_host.nbytes == 0
    assert chat.cache.report().host_bytes == nbytes


@pytest.mark.own_dtype
@pytest.mark.parametrize("rule", RULES)
def test_the_bundled_model_fades_by_the_codebooks_of_its_bank(rule: str) -> None:
    from PIL import Image

    from plphp.inputs.loading import load_model
    from plphp.inputs.prompt import build_inputs

    model, processor = load_model(None, "float32", None)
    chat: list[dict[str, Any]] = []
    cache, budget = None, 90_000
    for turn in range(3):
        image = Image.effect_noise((84, 84), 40 + turn).convert("RGB")
        content = [{"type": "image", "image": image}, {"type": "text", "text": "What is in row 1?"}]
        chat.append({"role": "user", "content": content})
        inputs = build_inputs(processor, messages=chat)
        if cache is None:
            text = f"query_bank:bank=bundled,tiers=t10,vision_budget={budget},fading={rule}"
            cache = plphp.PrunedCache.for_inputs(model, inputs, plphp.PLPHPConfig.parse(text))
        output = model.generate(**inputs, **passed(cache), max_new_tokens=4, do_sample=False)
        said = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        chat.append({"role": "assistant", "content": said})
        assert 0 < vision_bytes(cache) <= budget
    assert {name for image in cache.images for name in image.entries} <= {"pr2", "rvq", "pq"}
    assert vision_bytes(cache) > 0.6 * budget


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_recall_reads_a_share_of_what_has_faded(share: float, folder: Path) -> None:
    """Each prompt by itself, as without a budget; what stands in for the rest counts."""
    method = f'random:tiers="r4=.5,r2=.4",read={share}'
    chat = faded(method, folder, share=0.5)
    assert any(block.block.rest_values is not None for layer in chat.cache.layers for block in layer.coded)
    assert {reading.share for layer in chat.cache.layers for reading in layer.coded[0].block.reading} == {share}
    free = converse(tiers_model("llava"), TIERS["llava"], line(method, "1GB", folder), 3)
    expected = converse(tiers_model("llava"), TIERS["llava"], method, 3)
    for output, own in zip(free.outputs, expected.outputs, strict=True):
        assert_same_generation(output, own)


def test_text_that_leaves_is_not_in_the_ledger(folder: Path) -> None:
    chat = faded("expected_attention:retention_rate=0.7", folder)
    assert_is_dense("llava", *chat)
    bank = "snapkv:retention_rate=0.7"
    assert_is_dense("llava", *faded(bank, folder, share=0.5))


def test_a_class_rule_divides_the_budget_as_the_method_alone_would(folder: Path) -> None:
    """Layers that are attended to more hold more, below the budget as well."""
    method = "plphp:target_retention=0.5,retention_delta=0.4,class_quantile=0.34"
    full = converse(tiers_model("llava"), TIERS["llava"], line(method, "1GB", folder), 2).cache
    chat = faded(method, folder, share=0.5, turns=2)
    assert len({sum(layer.ledger.weights) for layer in full.layers}) > 1
    for layer, expected in zip(chat.cache.layers, full.layers, strict=True):
        own = fading.vision_nbytes(layer, chat.cache._images)
        alone = fading.vision_nbytes(expected, full._images)
        assert own <= 0.5 * alone * 1.001
        assert own > 0.3 * alone
    assert_is_dense("llava", *chat)


@pytest.mark.parametrize(
    "method", ['random:tiers="pr2=.3,whole=.1,rvq=.3,pq=.2"', 'random:tiers="r4=.5,r3=.3"', "none"]
)
@pytest.mark.parametrize("rule", RULES)
def test_entries_go_down_and_what_stays_in_its_rung_stays_as_it_was(method: str, rule: str, folder: Path) -> None:
    cache = converse(tiers_model("llava"), TIERS["llava"], line(method, "1GB", folder, rule=rule), 3).cache
    before = [by_token(layer) for layer in cache.layers]
    full = vision_bytes(cache)
    cache.fading = dataclasses.replace(cache.fading, budget=VisionBudget(nbytes=full // 2))
    assert fading.fade(cache._pruned, cache._images, cache.fading)
    bits = {"whole": 999.0, **{name: rung.bits(8) for name, rung in RUNGS.items()}}
    stayed = fell = error = power = 0.0
    for layer, old in zip(cache.layers, before, strict=True):
        now = by_token(layer)
        assert now.keys() <= old.keys()
        for token, (rung, key) in now.items():
            own_rung, own_key = old[token]
            assert bits[rung] <= bits[own_rung]
            if rung == own_rung:
                stayed += 1
                assert torch.equal(key, own_key)
            else:
                fell += 1
                error += (key - own_key).square().sum().item()
                power += own_key.square().sum().item()
    assert stayed
    if fell and "pq" not in method:  # the codebooks of these tests are random
        assert error < 0.1 * power
    assert fading.fade(cache._pruned, cache._images, cache.fading) is False


@pytest.mark.own_dtype
def test_a_chat_whose_answers_are_collected_stays_below_its_budget() -> None:
    model, tiny = tiers_model("llava"), TIERS["llava"]
    config = plphp.PLPHPConfig.parse("query_bank:tiers=t10,vision_budget=9000,collect=2")
    inputs, cache = tiny.inputs(model, (1,)), None
    with plphp.prune(model, config) as run:
        for turn in range(4):
            output = model.generate(**inputs, **passed(cache), max_new_tokens=2, return_dict_in_generate=True)
            cache = cache_in(output)
            inputs = next_turn(model, tiny, inputs, output.sequences, seed=turn + 1)
        assert run.report.budget_bytes == 9000
        assert sum(image.nbytes for image in cache.images) <= 9000


@pytest.mark.own_dtype
def test_a_row_without_new_images_does_not_end_the_batch() -> None:
    model, tiny = tiers_model("llava"), TIERS["llava"]
    inputs = tiny.inputs(model, (1, 1))
    cache = plphp.PrunedCache.for_inputs(model, inputs, plphp.PLPHPConfig.parse("none:vision_budget=4000"))
    output = answer(model, cache, inputs)
    for turn in range(1, 20):
        [new] = tiny.new_parts(model, 1, True, turn)
        text = torch.full_like(new["input_ids"], min(TEXT_IDS))
        ids = torch.cat([output.sequences, torch.cat([new["input_ids"], text])], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": new["pixel_values"]}
        cache_mask = cache.history.valid
        inputs["attention_mask"][:, : cache_mask.shape[1]] = cache_mask.long()
        output = answer(model, cache, inputs)
    assert vision_bytes(cache) <= 4000


@pytest.mark.own_dtype
def test_a_damaged_row_does_not_end_the_others_when_images_fade() -> None:
    model, tiny = tiers_model("llava"), TIERS["llava"]
    inputs = tiny.inputs(model, (1, 1))
    inputs["pixel_values"][0] = torch.nan
    cache = plphp.PrunedCache.for_inputs(model, inputs, plphp.PLPHPConfig.parse("none:vision_budget=9000"))
    output = answer(model, cache, inputs)
    assert vision_bytes(cache) <= 9000
    damaged, sound = cache.images
    assert damaged.entries.keys() <= {"whole"}
    assert sound.nbytes > damaged.nbytes
    output = answer(model, cache, next_turn(model, tiny, inputs, output.sequences, with_image=False))
    assert all(bool(logits[1].isfinite().all()) for logits in output.logits)


@pytest.mark.own_dtype
@pytest.mark.parametrize("line", ["none:vision_budget=20000", "pool:retention_rate=0.5+none", "zipvl"])
def test_what_is_noted_grows_with_the_conversation_and_not_with_its_square(line: str) -> None:
    def noted(turns: int) -> int:
        cache = converse(tiers_model("llava"), TIERS["llava"], line, turns).cache
        seen, left = {}, [cache.records, cache.left, cache.attended]
        while left:
            held = left.pop()
            if id(held) not in seen and not isinstance(held, type):
                seen[id(held)] = held
                left += [] if isinstance(held, torch.Tensor) else gc.get_referents(held)
        storages = {
            s.data_ptr(): s.nbytes()
            for h in seen.values()
            if isinstance(h, torch.Tensor)
            for s in [h.untyped_storage()]
        }
        return sum(storages.values())

    assert 0 < noted(12) < 2.5 * noted(6)


@pytest.mark.own_dtype
def test_the_report_counts_means_that_lie_beside_prompts_that_need_none() -> None:
    line = "quantized:tiers=kivi2,vision_budget=1GB"
    cache = converse(tiers_model("llava"), TIERS["llava"], line, 2, rows=(2,)).cache
    cache.forget(1)
    assert cache.report().vision_bytes == pytest.approx(vision_bytes(cache), abs=3)


@pytest.mark.own_dtype
def test_a_wider_dtype_leaves_whole_entries_below_the_budget() -> None:
    model, tiny = tiers_model("llava"), TIERS["llava"]
    inputs = tiny.inputs(model, (1,))
    cache = plphp.PrunedCache.for_inputs(model, inputs, plphp.PLPHPConfig.parse("none:vision_budget=5000"))
    with torch.autocast("cpu", torch.bfloat16):
        output = answer(model, cache, inputs)
    answer(model, cache, next_turn(model, tiny, inputs, output.sequences, with_image=False))
    assert vision_bytes(cache) <= 5000


def test_the_report_of_a_session_is_of_the_end_of_generate_and_keeps_no_entries_alive(folder: Path) -> None:
    model, tiny = tiers_model("llava"), TIERS["llava"]
    inputs, cache = tiny.inputs(model, (1,)), None
    config = plphp.PLPHPConfig.parse(line('random:tiers="r4=.5,r2=.4"', 3 * spent("quantized", folder) // 4, folder))
    with plphp.prune(model, config) as run:
        for turn in range(3):
            output = model.generate(**inputs, **passed(cache), max_new_tokens=2, return_dict_in_generate=True)
            cache = cache_in(output)
            inputs = next_turn(model, tiny, inputs, output.sequences, seed=turn + 1)
        expected = cache.report()
        held = [t for layer in cache.layers for t in (layer.keys, layer.prefix.keys, *tensors_of(layer.coded))]
        alive = [weakref.ref(tensor) for tensor in held]
        cache.forget(1)
        cache.reorder_cache(torch.tensor([0, 0]))
        del output, cache, held
        gc.collect()
        assert not any(tensor() is not None for tensor in alive)
        assert run.report == expected
        assert run.report is run.report
        assert not run.report.images[1].forgotten


@pytest.mark.own_dtype
def test_entries_of_a_bank_fade_by_the_most_attention_unless_reduce_is_named(tmp_path: Path) -> None:
    model, tiny, bank = tiers_model("llava"), TIERS["llava"], tmp_path / "bank.safetensors"
    plphp.collect_query_bank(model, [tiny.inputs(model, (1,))], max_new_tokens=8).save(bank)

    def noted(more: str) -> torch.Tensor:
        line = f"query_bank:bank={bank},retention_rate=1,vision_budget=1GB{more}"
        return torch.cat([layer.ledger.whole.score for layer in converse(model, tiny, line, 2).cache.layers])

    assert torch.equal(noted(""), noted(",reduce=peak"))
    assert not torch.equal(noted(""), noted(",reduce=best_rank"))
