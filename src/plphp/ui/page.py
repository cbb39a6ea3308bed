# SPDX-License-Identifier: Apache-2.0
"""The page itself, of gradio's components."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import gradio as gr
from PIL import Image

from plphp.methods.registry import available_methods

from .asking import DEFAULT, EVICT, HELD, Asking, Choice, shown_error

SYSTEM_FONTS = ("system-ui", "sans-serif")
MONO_FONTS = ("ui-monospace", "monospace")
THEME = gr.themes.Base(primary_hue="indigo", neutral_hue="slate", font=SYSTEM_FONTS, font_mono=MONO_FONTS)
CSS = ".gradio-container { max-width: 1180px !important; margin: 0 auto; } footer { display: none !important; }"
ABOUT = """# {title}

A vision-language model answers your question twice: with the full KV cache, and with the vision tokens pruned or held
in few bits. The picture shows what every layer kept: **dark** is dropped, **dimmed** is held in few bits."""
REFUSED = "Cannot answer"
LINE_HINT = "fastv:retention_rate=0.5+plphp:target_retention=0.4"


def make_page(
    asking: Asking, title: str, note: str = "", examples: Sequence[tuple[Image.Image, str]] = ()
) -> gr.Blocks:
    """Make the page.

    Parameters
    ----------
    asking : Asking
        What answers.
    title : str
        The name of the model.
    note : str
        What visitors need to know of the model; "" for nothing.
    examples : sequence of tuple of Image and str
        Pictures with questions that the model can answer.

    Returns
    -------
    gradio.Blocks
        See `plphp.ui.server.launch`.
    """
    with gr.Blocks(title=f"plphp: {title}", analytics_enabled=False) as page:
        gr.Markdown(ABOUT.format(title=title) + (f"\n\n{note}" if note else ""))
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = _picture()
                question = gr.Textbox(label="Question", lines=2, max_length=4000)
                choices = _choices(asking)
                ask = gr.Button("Answer", variant="primary")
            with gr.Column(scale=3, min_width=300):
                shown = _results()
        gr.Markdown("### What stayed, layer by layer")
        shown.append(gr.Image(show_label=False, interactive=False, format="png", buttons=["fullscreen", "download"]))
        if examples:
            gr.Examples([list(example) for example in examples], [image, question], cache_examples=False)
        run = _answering(asking)
        for start in (ask.click, question.submit):
            start(run, [image, question, *choices], shown, concurrency_limit=1, concurrency_id="model", api_name=False)
    return page


def _picture() -> Any:
    """An image to choose, of which the file is handed over: plphp reads it, and says what is wrong with it."""
    image = gr.Image(type="filepath", image_mode=None, label="Picture", sources=["upload", "clipboard"])
    read = image.preprocess

    def checked(payload: Any) -> Any:
        try:
            return read(payload)
        except OSError as error:  # UnidentifiedImageError is one; gradio would show that something failed, and no more
            raise gr.Error(
                "The file is not an image that can be read.", title=REFUSED, print_exception=False
            ) from error

    image.preprocess = checked  # on the object: gradio takes a subclass for a component with a frontend of its own
    return image


def _choices(asking: Asking) -> list[Any]:
    """What to choose of, in the order of the fields of `Choice`."""
    method = gr.Dropdown(asking.methods(), value=DEFAULT, label="Method")
    held = gr.Dropdown(list(HELD), value=EVICT, label="Vision entries are held", visible=False)
    retention = gr.Slider(0.0, 1.0, value=0.25, step=0.05, label="Fraction of the vision tokens kept", visible=False)
    with gr.Accordion("Settings as a line, in the place of these", open=False):
        line = gr.Textbox(label="Settings", placeholder=LINE_HINT, max_length=1000)
    for field in (method, held):
        field.change(_what_is_open, [method, held], [held, retention], api_name=False, queue=False)
    return [method, held, retention, line]


def _what_is_open(method: str, held: str) -> tuple[Any, Any]:
    """Which of ladder and rate there is to choose: the default has both, and a ladder says how much is kept."""
    has_ladder = method != DEFAULT and available_methods()[method].tiers is not None
    chosen = method != DEFAULT and not has_ladder
    return gr.update(visible=chosen), gr.update(visible=chosen and held == EVICT)


def _results() -> list[Any]:
    """What is shown in words and figures, in the order in which `_answering` returns it; the picture comes last."""
    verdict = gr.Markdown("The answers come here.")
    with gr.Row():
        unpruned = gr.Textbox(label="Full cache", lines=4, interactive=False, min_width=200)
        pruned = gr.Textbox(label="Pruned", lines=4, interactive=False, min_width=200)
    return [verdict, unpruned, pruned, gr.Markdown()]


def _answering(asking: Asking) -> Any:
    """The function behind the button."""

    def answer(
        image: str | None,
        question: str,
        method: str,
        held: str,
        retention: float,
        line: str,
        progress: Any = gr.Progress(),  # noqa: B008  (gradio finds it by the default)
    ) -> tuple[str, str, str, str, Image.Image]:
        try:
            choice = Choice(method, held, retention, line or "")
            outcome = asking.answer(image, question, choice, lambda step: progress(None, desc=step))
        except Exception as error:
            message = shown_error(error)
            if message is None:
                raise
            raise gr.Error(escape(message), title=REFUSED, print_exception=False) from error
        rows = [
            "|  | full cache | pruned |",
            "| --- | --- | --- |",
            *(f"| {' | '.join(row)} |" for row in outcome.rows),
        ]
        return outcome.verdict, outcome.unpruned, outcome.pruned, "\n".join(rows), outcome.picture

    return answer
