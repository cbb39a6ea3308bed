# SPDX-License-Identifier: Apache-2.0
"""Requests as lmms-eval makes them: texts, several rounds, stops, batches, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from local_tasks import answers, evaluate
from plphp.errors import ConfigError, LoadError, UnsupportedFeatureError
from plphp.inputs.media import load_image

pytestmark = pytest.mark.filterwarnings("default")

SETTINGS = "config='query_bank:bank=bundled,retention_rate=0.4',dtype=float32"
QUESTION = "What is in row 1?"
KWARGS = {"max_new_tokens": 40, "until": ["\n\n"]}


@pytest.fixture(scope="module")
def model() -> Any:
    from lmms_eval.models import get_model

    return get_model("plphp").create_from_arg_string(SETTINGS, {"batch_size": "4", "device": None})


def request(model: Any, messages: Any, kwargs: dict[str, Any] = KWARGS, number: int = 0) -> Any:
    """A request about a document that is its messages, or makes those of every round."""
    from lmms_eval.api.instance import Instance

    to_messages = messages if callable(messages) else lambda document: messages
    model.task_dict.setdefault("task", {"test": [None] * 100})
    # Longer contexts are answered first, so that the answers have to be put in order.
    arguments = (QUESTION * (number + 1), to_messages, kwargs, number, "task", "test")
    metadata = {"task": "task", "doc_id": number, "repeats": 1}
    return Instance("generate_until", arguments, 0, metadata)


def ask(text: str, *media: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*media, {"type": "text", "text": text}]}]


def pictures() -> list[dict[str, Any]]:
    folder = Path(__file__).parents[2] / "examples" / "images"
    return [{"type": "image", "url": load_image(path)} for path in sorted(folder.glob("grid*.png"))]


def texts(model: Any, *requests: Any) -> list[str]:
    return [result.text for result in model.generate_until(list(requests))]


def test_a_batch_of_all_sorts_is_answered_as_each_alone(model: Any) -> None:
    """Texts, several images and none, limits and stops of their own; in the order of the requests."""
    first, second, *_ = pictures()
    requests = [
        request(model, ask(QUESTION, first)),
        request(model, ask("Hello."), number=1),
        request(model, ask("What is in row 2?", second), number=2),
        request(model, ask("What is in row 1 of image 2?", first, second), number=3),
        request(model, ask(QUESTION, second), {"max_new_tokens": 3}, number=4),
        request(model, ask(QUESTION, second), {"max_new_tokens": 40, "until": [","]}, number=5),
    ]
    together = texts(model, *requests)
    assert together == [texts(model, alone)[0] for alone in requests]
    assert len(set(together)) == len(together)
    assert all(together)


def test_stops_cut_the_answer_and_end_it(model: Any) -> None:
    first = pictures()[0]
    [whole] = model.generate_until([request(model, ask(QUESTION, first))])
    assert "," in whole.text
    [cut] = model.generate_until([request(model, ask(QUESTION, first), {**KWARGS, "until": [","]})])
    assert cut.text == whole.text.partition(",")[0]
    assert cut.token_counts.output_tokens < whole.token_counts.output_tokens <= 40


def test_rounds_go_on_from_what_was_said(model: Any) -> None:
    first, second = pictures()[:2]
    calls: list[dict[str, Any]] = []

    def messages(document: Any, **round_: Any) -> Any:
        calls.append(round_)
        if not round_:
            return ask(QUESTION, first)
        said = round_["previous_output"]
        if round_["round_idx"] == 2:
            return None, True, [text.upper() for text in said], None
        return ask("What is in row 2?", second), False, said, {"seen": round_["round_idx"]}

    [said] = model.generate_until_multi_round([request(model, messages)])
    alone = texts(model, request(model, ask(QUESTION, first)), request(model, ask("What is in row 2?", second)))
    assert said == [text.upper() for text in alone]
    assert [call.get("round_idx") for call in calls] == [None, 1, 2]
    assert [call.get("previous_round_info") for call in calls] == [None, None, {"seen": 1}]
    assert model.generate_until_multi_round([request(model, lambda document, **_: ask(QUESTION, first))]) == [alone[:1]]


def test_samples_are_drawn_where_a_task_asks_for_them(model: Any) -> None:
    asked = [request(model, ask(QUESTION, pictures()[0]), {"max_new_tokens": 20, "temperature": 50.0}) for _ in "ab"]
    first, second = texts(model, *asked)
    assert first != second


def test_what_is_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="before its KV cache is pruned"):
        model.loglikelihood([])
    for messages, error, said in (
        (ask(QUESTION, {"type": "video", "url": str(tmp_path)}), UnsupportedFeatureError, "takes no videos"),
        (ask(QUESTION, {"type": "audio", "url": "a.wav"}), ConfigError, "'audio'"),
        (ask(QUESTION, {"type": "image", "url": "no.png"}), LoadError, "no image file"),
    ):
        with pytest.raises(error, match=f"task, document 7: .*{said}"):
            model.generate_until([request(model, messages, number=7)])
    with pytest.raises(ConfigError, match="max_tokens"):
        model.generate_until([request(model, ask(QUESTION), {"max_tokens": 3})])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("config=query_bank:bank=bundled,retention_rate=0.4", "takes no argument 'retention_rate'.*single quotes"),
        ("config=query_bank", "would answer the first documents"),
        ("batch_size=auto", "batch_size must be an integer"),
    ],
)
def test_arguments_that_are_refused(arguments: str, said: str) -> None:
    from lmms_eval.models import get_model

    with pytest.raises(ConfigError, match=said):
        get_model("plphp").create_from_arg_string(arguments)


@pytest.mark.parametrize(
    "settings",
    [
        "query_bank:bank=bundled,retention_rate=0.2",
        'query_bank:bank=bundled,tiers="pr2=.20,rvq=.24,pq=.32"',
        "fastv:retention_rate=0.5+query_bank:bank=bundled,retention_rate=0.2",
    ],
)
def test_settings_survive_the_parser(settings: str) -> None:
    from lmms_eval.utils import simple_parse_args_string

    from plphp import PLPHPConfig
    from plphp.integrations.lmms_eval.arguments import read_settings

    parsed = simple_parse_args_string(f"pretrained=a/b,config='{settings}',dtype=float32")
    assert set(parsed) == {"pretrained", "config", "dtype"}
    assert read_settings(parsed["config"], None, bundled=False) == PLPHPConfig.parse(settings)


def test_memory_is_given_back(tasks: Path) -> None:
    """lmms-eval frees the model before it scores, as a judge may need the memory."""
    from lmms_eval.models import get_model

    model = get_model("plphp").create_from_arg_string("config=none")
    model.clean()
    assert not hasattr(model, "model")
    assert not hasattr(model, "session")


def test_likelihood_tasks_do_not_run(tasks: Path) -> None:
    """lmms-eval itself stops at them, as at all models of chats."""
    with pytest.raises(AssertionError, match="for generation only"):
        evaluate(tasks, "config=none", "plphp_choice")


def test_rounds_by_the_evaluator(tasks: Path) -> None:
    results = evaluate(tasks, SETTINGS, "plphp_rounds", limit=2)
    rounds = answers(results, "plphp_rounds")
    assert all(len(said) == 2 for said in rounds)
