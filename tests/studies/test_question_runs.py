# SPDX-License-Identifier: Apache-2.0
"""A question answered by several methods: the same as each by hand, refusals in the place of answers."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

import plphp
import tiny_hub
from plphp import ConfigError, PLPHPConfig, SpanError, UnsupportedFeatureError
from plphp.inputs.prompt import build_inputs
from plphp.studies import question_runs
from plphp.studies.question_runs import FULL, Answer, AnsweredQuestion, Question, Setting, answer_by_each

NEW = 12
UNIFORM = Setting("uniform", 0.25, PLPHPConfig(method="uniform", retention_rate=0.25))


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> Question:
    path = tiny_hub.picture(tmp_path_factory.mktemp("images") / "a.png")
    return Question("What?", [Image.open(path)] * 2)


def test_equals_each_method_by_hand(llava: Any, question: Question) -> None:
    processor, steps = tiny_hub.processor(), []
    answered = answer_by_each(llava, processor, question, [FULL, UNIFORM], max_new_tokens=NEW, progress=steps.append)
    inputs = build_inputs(processor, question.text, images=question.images)
    for answer, setting in zip(answered.answers, (FULL, UNIFORM), strict=True):
        with plphp.prune(llava, setting.config) as run:
            output = llava.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer.text == text.strip()
        assert answer.report is not None
        assert answer.report.prompts == run.report.prompts
    full, pruned = (answer.report for answer in answered.answers)
    assert full.entry_bytes == full.kv_bytes_full == pruned.kv_bytes_full > pruned.entry_bytes
    assert steps == ["full", "uniform@0.25"]
    assert "generate" not in llava.__dict__


def test_a_refusal_takes_the_place_of_an_answer(
    llava: Any, question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = question_runs.PrunedCache.for_inputs

    def refusing(model: Any, inputs: Any, config: PLPHPConfig) -> Any:
        if config == UNIFORM.config:
            raise UnsupportedFeatureError("not with this model")
        return made(model, inputs, config)

    monkeypatch.setattr(question_runs.PrunedCache, "for_inputs", refusing)
    other = Setting("random", 0.5, PLPHPConfig(method="random", retention_rate=0.5))
    answered = answer_by_each(llava, tiny_hub.processor(), question, [FULL, UNIFORM, other], max_new_tokens=2)
    refusals = [answer.refusal for answer in answered.answers]
    assert refusals == ["", "not with this model", ""]
    assert [answer.report is None for answer in answered.answers] == [False, True, False]


def test_a_prompt_that_the_full_cache_cannot_answer_is_an_error(llava: Any) -> None:
    with pytest.raises(SpanError, match="no image slot"):
        answer_by_each(llava, tiny_hub.processor(), Question("What?", []), [FULL, UNIFORM])


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ([], ConfigError),
        ([UNIFORM, FULL], ConfigError),
        ([FULL, Setting("own", None, PLPHPConfig(method="query_bank"))], UnsupportedFeatureError),
    ],
    ids=["none", "order", "own bank"],
)
def test_refused_settings(llava: Any, question: Question, settings: list[Setting], error: type[Exception]) -> None:
    with pytest.raises(error):
        answer_by_each(llava, tiny_hub.processor(), question, settings)


def test_same_and_right_whatever_the_white_space(llava: Any, question: Question) -> None:
    kept = answer_by_each(llava, tiny_hub.processor(), question, [FULL], max_new_tokens=2).answers[0].report
    answers = [Answer(text, kept) for text in ("a b", "a\n b ", "b")] + [Answer("", None, "no")]
    answered = AnsweredQuestion(Question("?", [], ("b", "c")), answers)
    assert [answered.same(answer) for answer in answers] == [True, True, False, False]
    assert [answered.right(answer) for answer in answers] == [False, False, True, False]
    assert AnsweredQuestion(Question("?", []), answers).right(answers[0]) is None


def test_names() -> None:
    assert (FULL.name, UNIFORM.name) == ("full", "uniform@0.25")
