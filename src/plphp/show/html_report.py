# SPDX-License-Identifier: Apache-2.0
"""A page to look at: questions, the answers of several methods, and what each kept, layer by layer and head by head.

The page is a single file that asks nothing of the network: its content security policy forbids it. The parts stand in
``show/page`` as a browser reads them, and are put together here.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from plphp.errors import ConfigError
from plphp.studies.question_runs import Answer, AnsweredQuestion, Setting

from .kept_bits import image_values, kept_values

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("bits", "words", "dom", "methods", "answers", "layers", "pictures", "keys", "main")
"""In the order in which they need each other."""
LONGEST_SIDE = 448
"""Pixels of the longer side of an image on the page."""
JPEG_QUALITY = 85


def html_report(answered: Sequence[AnsweredQuestion], settings: Sequence[Setting], origin: Mapping[str, Any]) -> str:
    """Return the page for questions that several methods have answered.

    Parameters
    ----------
    answered : sequence of AnsweredQuestion
        The questions; each has an answer for every setting.
    settings : sequence of Setting
        Those of the answers, that of the full cache first.
    origin : mapping
        What is said of the model: ``model``, ``dtype``, ``hardware``, ``plphp`` and ``date`` of
        `plphp.studies.provenance.provenance`.

    Returns
    -------
    str
        HTML. Whatever a user or a model wrote stands in it as data, and never as markup or code.

    Raises
    ------
    ConfigError
        If there is no question, or one lacks the answer of a setting.
    """
    if not answered:
        raise ConfigError("A report needs at least one question.")
    if any(len(question.answers) != len(settings) for question in answered):
        raise ConfigError(f"Each question needs an answer for each of the {len(settings)} settings.")
    style = _part("style.css")
    script = '"use strict";\n(() => {\n' + "\n".join(_part(f"{name}.js") for name in SCRIPTS) + "})();\n"
    parts = {
        "POLICY": f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}",
        "TITLE": html.escape(f"What {origin['model']} keeps of images"),
        "STYLE": style,
        "DATA": _as_data(report_data(answered, settings, origin)),
        "SCRIPT": script,
    }
    # In a single pass: a question may hold the name of a part, which is not to be filled in.
    return re.sub("@([A-Z]+)@", lambda match: parts[match[1]], _part("page.html"))


def report_data(
    answered: Sequence[AnsweredQuestion], settings: Sequence[Setting], origin: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the page shows, as JSON-ready values; an image that several questions are about stands there once."""
    pictures: dict[str, int] = {}
    questions = [_question_values(question, pictures) for question in answered]
    return {
        "origin": {name: origin[name] for name in ("model", "dtype", "hardware", "plphp", "date")},
        "settings": [
            {"label": setting.label, "retention": setting.retention, "name": setting.name} for setting in settings
        ],
        "questions": questions,
        "pictures": list(pictures),
    }


def _question_values(answered: AnsweredQuestion, pictures: dict[str, int]) -> dict[str, Any]:
    question = answered.question
    shown = [pictures.setdefault(_data_uri(image), len(pictures)) for image in question.images]
    return {
        "text": question.text,
        "references": list(question.references),
        "pictures": shown,
        "images": _images(answered.answers[0]),
        "answers": [
            {"right": answered.right(answer), "same": answered.same(answer), **_answer_values(answer)}
            for answer in answered.answers
        ],
    }


def _images(answer: Answer) -> list[dict[str, Any]]:
    assert answer.report is not None  # the full cache refuses nothing
    return [image_values(image) for image in answer.report.prompts[0].images[0]]


def _answer_values(answer: Answer) -> dict[str, Any]:
    report = answer.report
    if report is None:
        return {"refusal": answer.refusal}
    return {
        "text": answer.text,
        "full": report.kv_bytes_full,
        "held": report.entry_bytes,
        "read": report.read_bytes,
        "retention": round(report.retention, 4),
        "visionHeld": round(report.vision_held, 4),
        "computed": round(report.computed_share, 4),
        "kept": kept_values(report.prompts[0]),
    }


def _data_uri(image: Image.Image) -> str:
    """An image as a data URI, made smaller where it is large; as PNG or JPEG, whichever is shorter."""
    small = image.convert("RGB")
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    files = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": JPEG_QUALITY, "optimize": True})):
        file = BytesIO()
        small.save(file, kind, **options)
        files[kind] = file.getvalue()
    kind = min(files, key=lambda name: len(files[name]))
    return f"data:image/{kind};base64,{base64.b64encode(files[kind]).decode('ascii')}"


def _as_data(values: Any) -> str:
    """JSON that a script element may hold: no ``<`` in it can end the element or begin a comment."""
    return json.dumps(values, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")


def _part(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """How a content security policy names the one style or script that it allows."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"
