# SPDX-License-Identifier: Apache-2.0
"""Methods x retentions, spelled out."""

from __future__ import annotations

import pytest

from plphp.errors import ConfigError
from plphp.evaluation import Sample, Turn, make_variants, split_methods


def test_commas_of_settings_do_not_split() -> None:
    text = (
        "plphp:query_rows=text,gqa_reduction=max,uniform,best=recall_rank:value_norm=1,mine=random,random:seed=1,zero"
    )
    assert split_methods([text, "full"]) == [
        "plphp:query_rows=text,gqa_reduction=max",
        "uniform",
        "best=recall_rank:value_norm=1",
        "mine=random",
        "random:seed=1",
        "zero",
        "full",
    ]


def test_each_method_asks_for_a_retention_in_its_own_way() -> None:
    variants = {variant.name: variant for variant in make_variants(["plphp", "uniform", "vtw"], [1, 0.5, 0.5, 0])}
    assert list(variants)[:4] == ["full", "plphp@1", "plphp@0.5", "plphp@0"]
    assert variants["plphp@0.5"].config.target_retention == 0.5
    assert variants["uniform@0.5"].config.target_retention is None
    assert variants["uniform@0.5"].config.retention_rate == 0.5
    assert variants["uniform@0"].config.min_kept == 0
    assert variants["full"].config.method == "none"


def test_the_settings_of_a_method_say_how_it_is_asked() -> None:
    """Layers are sorted into classes by `recall_rank` only if it is told to."""
    variants = make_variants(["recall_rank", "classes=recall_rank:layers=vision_attention"], [0.25])
    plain, by_class = (variant.config for variant in variants[1:])
    assert (plain.target_retention, plain.retention_rate) == (None, 0.25)
    assert by_class.target_retention == 0.25


def test_settings_that_fix_the_retention_are_taken_as_they_are() -> None:
    text = "fixed=plphp:retention_rate=0.4,attentive_threshold=0.3"
    [full, fixed] = make_variants([text], [0.5, 0.1])
    assert (fixed.name, fixed.label, fixed.retention) == ("fixed", "fixed", None)
    assert fixed.config.retention_rate == 0.4
    assert fixed.config.attentive_threshold == 0.3
    assert full.label == "full"


def test_tiers_say_how_much_is_kept() -> None:
    text = 'query_bank:bank=bundled,tiers="pr2=.2,pq=.3",quantized,t=fastv:layer=1+query_bank:tiers=t7.5,random'
    variants = make_variants(split_methods([text]), [0.5])[1:]
    assert [(variant.label, variant.retention, variant.config.tiers) for variant in variants] == [
        ('query_bank:bank=bundled,tiers="pr2=.2,pq=.3"', None, "pr2=.2,pq=.3"),
        ("quantized", None, "c3"),
        ("t", None, "t7.5"),
        ("random", 0.5, None),
    ]
    for text in ("quantized@0.5", 'query_bank:tiers="pr2=.2,pq=.3"@0.5'):
        with pytest.raises(ConfigError, match="asks for retentions of a method that says itself"):
            make_variants([text], [0.5])


def test_options_that_set_the_rate_are_taken_as_they_are() -> None:
    variants = make_variants(["paper=pyramiddrop:factor=0.5", "pyramiddrop:stages=3"], [0.5, 0.4])[1:]
    assert [(variant.label, variant.retention) for variant in variants] == [
        ("paper", None),
        ("pyramiddrop:stages=3", 0.5),
        ("pyramiddrop:stages=3", 0.4),
    ]


def test_a_method_may_have_retentions_of_its_own() -> None:
    variants = make_variants(["plphp", "fastv@0.5+0.25", "mine=uniform:query_rows=8@0.1"], [0.4])
    assert [variant.name for variant in variants[1:]] == ["plphp@0.4", "fastv@0.5", "fastv@0.25", "mine@0.1"]
    assert variants[-1].config.query_rows == 8


def test_controls() -> None:
    variants = make_variants(["zero", "blank", "small=downsample"], [0.5, 0])
    assert [(variant.name, variant.images) for variant in variants[1:]] == [
        ("zero", "as they are"),
        ("blank", "blank"),
        ("small@0.5", "smaller"),
    ]
    assert variants[1].config.retention_rate == 0
    assert variants[1].config.min_kept == 0


@pytest.mark.parametrize(
    ("methods", "retention", "message"),
    [
        (["plhp"], [0.5], "Unknown method 'plhp'. Did you mean 'plphp'"),
        (["uniform@half"], [0.5], "between 0 and 1, got 'half'"),
        (["zero@0.5"], [0.5], "'zero@0.5' asks for retentions of a method that says itself"),
        (["zer"], [0.5], "Did you mean 'zero'"),
        (["plphp:wrong=1"], [0.5], "wrong"),
        (["plphp", "plphp"], [0.5], "'plphp@0.5' is given twice: put a label"),
        (["plphp"], [1.5], "between 0 and 1, got 1.5"),
        (["plphp"], [], "at least one retention"),
        ([], [0.5], "at least one method"),
        (["zero:seed=1"], [0.5], "takes no settings"),
        (["=plphp"], [0.5], "label=method"),
    ],
)
def test_bad_methods(methods: list[str], retention: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_variants(methods, retention)


def test_chance_draws_anew_for_every_sample() -> None:
    sample_0, sample_1 = (Sample(f"dev-0-{number}", "cell", (), (Turn("a", "b"),)) for number in range(2))
    variants = make_variants(
        ["random", "again=random:seed=1", "mixed=recall_rank:random_share=0.5", "recall_rank", "encoder_random"], [0.5]
    )
    drawn = [variant.draws for variant in variants]
    assert drawn == [False, True, True, True, False, True]
    seeds = [
        [variant.for_sample(sample).config.seed for variant in variants] for sample in (sample_0, sample_0, sample_1)
    ]
    assert seeds[0] == seeds[1]
    assert seeds[0][1] != seeds[0][2]
    assert [a != b for a, b in zip(seeds[0], seeds[2], strict=True)] == drawn

    [_, chain] = make_variants(["encoder_random:keep=0.5+uniform"], [0.5])
    early = [chain.for_sample(sample).config.earlier[0].seed for sample in (sample_0, sample_0, sample_1)]
    assert early[0] == early[1] != early[2]


@pytest.mark.parametrize("line", ["query_bank:tiers=pr2=.5,pq=.2", "query_bank:tiers=pr2=.5,pq"])
def test_a_ladder_without_quotes_in_a_list_is_told_of_them(line: str) -> None:
    with pytest.raises(ConfigError, match=r"'pq' is a rung: .* double quotes"):
        make_variants(split_methods([line]), [0.5])


def test_a_share_is_the_budget_of_each_conversation() -> None:
    text = "old=query_bank:bank=bundled,retention_rate=1,vision_budget=share,fading=oldest@0.25+0.1"
    variants = make_variants(split_methods([text, "uniform"]), [0.5])[1:]
    assert [(variant.name, variant.budget_share) for variant in variants] == [
        ("old@0.25", 0.25),
        ("old@0.1", 0.1),
        ("uniform@0.5", None),
    ]
    config = variants[0].with_budget(1001).config
    assert (config.vision_budget, config.fading, config.retention_rate) == (250, "oldest", 1)
    assert variants[1].with_budget(5).config.vision_budget == 1  # a budget of nothing is none
    [_, asked] = make_variants(["query_bank:bank=bundled,vision_budget=share"], [0.5])
    assert asked.budget_share == 0.5


@pytest.mark.parametrize("rates", [[], [0.0]])
def test_a_share_of_nothing_is_refused(rates: list[float]) -> None:
    with pytest.raises(ConfigError, match="Give the shares of the budget above 0"):
        make_variants(["query_bank:bank=bundled,vision_budget=share"], rates)


def test_a_method_that_keeps_everything_takes_no_part_in_retentions() -> None:
    full, none = make_variants(["none"], [0.5, 0.25])
    assert (full.name, none.name, none.retention) == ("full", "none", None)
    with pytest.raises(ConfigError, match="says itself how much it keeps"):
        make_variants(["none@0.5"], [])


def test_what_goes_with_a_target_is_taken_where_a_retention_is_one() -> None:
    _, half, nothing = make_variants(["plphp:class_quantile=0.5"], [0.5, 0.0])
    assert (half.config.class_quantile, half.config.target_retention) == (0.5, 0.5)
    assert (nothing.config.base_rate, nothing.config.min_kept) == (0, 0)  # of nothing no layer has more than another
    with pytest.raises(ConfigError, match=r"uniform sorts no layers into classes .* leave out class_quantile"):
        make_variants(["uniform:class_quantile=0.5"], [0.5])
