# SPDX-License-Identifier: Apache-2.0
"""``plphp report``: a page on which questions, answers and what each method kept can be looked at."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from plphp.errors import BackendUnavailableError, ConfigError, UnsupportedFeatureError
from plphp.inputs.media import load_image
from plphp.inputs.sources import is_bundled
from plphp.methods.registry import METHODS_BY_NAME
from plphp.settings.presets import compared

from ._app import app, print_json, progress
from ._checks import check_in_file, check_model, check_out_file, check_text
from ._lists import retentions
from ._models import weights_of
from ._options import JsonOption, allow_urls_option, device_option, dtype_option, model_option, option

if TYPE_CHECKING:
    from plphp.studies.question_runs import AnsweredQuestion, Question, Setting

WHAT, HOW, OUTPUT = "What", "How", "Output"
TASKS = ("list_row", "read_page", "cell_in")
"""Built-in tasks that a question is drawn of where none is asked: a grid, a page and several images."""


@app.command()
def report(
    html: Annotated[Path, option(OUTPUT, "File to write the page to.", show_default=False)],
    model: Annotated[str | None, model_option(WHAT)] = None,
    image: Annotated[list[str] | None, option(WHAT, "Image file of a single question; may be repeated.")] = None,
    prompt: Annotated[str | None, option(WHAT, "The single question.")] = None,
    prompts: Annotated[
        Path | None, option(WHAT, 'JSON Lines: {"images": [paths], "question": text, "answer": text or none}.')
    ] = None,
    allow_urls: Annotated[bool, allow_urls_option(WHAT)] = False,
    methods: Annotated[
        list[str] | None,
        option(
            WHAT,
            "Methods by commas, as for `plphp eval`; may be repeated; default: few bits, plphp and others.",
            complete=METHODS_BY_NAME.names,
        ),
    ] = None,
    target_retention: Annotated[
        str | None, option(WHAT, "Fractions of the vision tokens to keep, by commas; default 0.5,0.25,0.1.")
    ] = None,
    max_new_tokens: Annotated[int, option(HOW, "Length of the answers; default 128.", min=1)] = 128,
    dtype: Annotated[str, dtype_option(HOW)] = "auto",
    device: Annotated[str | None, device_option(HOW)] = None,
    open_page: Annotated[bool, option(OUTPUT, "Open the page in a browser.", "--open")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a page to look at: answers of several methods, and what each keeps of the picture.

    Without a question three are drawn, with pictures that the bundled model knows.
    """
    _check(image, prompt, prompts, html)
    lines, rates = compared(bundled=is_bundled(model))
    rates = retentions(target_retention) or rates
    pictures = [load_image(source, allow_urls=allow_urls) for source in image or ()]
    check_model(model, dtype, device)
    with progress("loading plphp", quiet=as_json) as show:
        from plphp.inputs.loading import load_processor

        settings = _settings(methods or lines, rates)
        questions = _questions(prompt, pictures, prompts, allow_urls)
        show("loading the processor")
        processor = load_processor(model)
    weights = weights_of(model, dtype, device, quiet=as_json)
    with progress("answering", quiet=as_json) as show:
        answered = _answered(weights, processor, questions, settings, max_new_tokens, show)
    _write(html, answered, settings, weights)
    if open_page:
        webbrowser.open(html.resolve().as_uri())
    if as_json:
        print_json(_values(html, answered, settings))
    else:
        print(f"{html}: {len(answered)} questions x {len(settings)} ways to answer, {html.stat().st_size / 1e6:.2f} MB")


def _check(image: Sequence[str] | None, prompt: str | None, prompts: Path | None, html: Path) -> None:
    check_out_file(html, "page")
    check_in_file(prompts, "prompts")
    check_text(prompt, "--prompt")
    if prompts is not None and (image or prompt is not None):
        raise ConfigError("--prompts goes without --image and --prompt: the file names questions and images itself.")
    if bool(image) != (prompt is not None):
        raise ConfigError("--prompt and --image go together: a question, and the image that it is about.")


def _settings(methods: Sequence[str], rates: Sequence[float]) -> list[Setting]:
    """The ways to answer, the full cache first."""
    from plphp.evaluation import make_variants, split_methods
    from plphp.studies.question_runs import Setting, check_settings

    variants = make_variants(split_methods(methods), rates)
    changed = [variant.name for variant in variants if variant.images != "as they are"]
    if changed:
        raise ConfigError(f"{changed[0]} changes the images, and a report shows one picture for all: leave it out.")
    settings = [Setting(variant.label, variant.retention, variant.config) for variant in variants]
    check_settings(settings)
    return settings


def _questions(prompt: str | None, images: list[Any], prompts: Path | None, allow_urls: bool) -> list[Question]:
    from plphp.evaluation import available_tasks
    from plphp.inputs.prompts_file import read_prompts
    from plphp.studies.question_runs import Question

    if prompt is not None:
        return [Question(prompt, images)]
    if prompts is None:
        try:
            samples = [next(available_tasks()[name].samples("dev", 1)) for name in TASKS]
        except BackendUnavailableError as error:
            raise BackendUnavailableError(f"{error} Or ask yourself: --image and --prompt, or --prompts.") from error
        return [Question(sample.turns[0].question, sample.images, (sample.turns[0].answer,)) for sample in samples]
    entries = read_prompts(prompts, allow_urls=allow_urls)
    for entry in entries:
        if entry.question is None:
            raise UnsupportedFeatureError(
                f'{entry.origin}: a report shows single questions, not the "turns" of a chat.'
            )
    return [Question(entry.question or "", entry.read_images(), entry.answers) for entry in entries]


def _answered(
    model: Any, processor: Any, questions: Sequence[Question], settings: Sequence[Setting], length: int, show: Any
) -> list[AnsweredQuestion]:
    from plphp.studies.question_runs import answer_by_each

    return [
        answer_by_each(
            model,
            processor,
            question,
            settings,
            max_new_tokens=length,
            progress=lambda step, number=number: show(f"question {number} of {len(questions)}, {step}"),  # type: ignore[misc]
        )
        for number, question in enumerate(questions, 1)
    ]


def _write(path: Path, answered: Sequence[AnsweredQuestion], settings: Sequence[Setting], model: Any) -> None:
    from plphp.show.html_report import html_report
    from plphp.studies.provenance import provenance

    path.write_text(html_report(answered, settings, provenance(model)), encoding="utf-8")


def _values(path: Path, answered: Sequence[AnsweredQuestion], settings: Sequence[Setting]) -> dict[str, Any]:
    """The answers without what was kept."""
    questions = [
        {
            "question": one.question.text,
            "answers": {
                setting.name: {
                    "answer": answer.text,
                    "right": one.right(answer),
                    "same": one.same(answer),
                    "kv_bytes": None if answer.report is None else answer.report.entry_bytes,
                    "refusal": answer.refusal or None,
                }
                for setting, answer in zip(settings, one.answers, strict=True)
            },
        }
        for one in answered
    ]
    return {"file": str(path), "questions": questions}
