# SPDX-License-Identifier: Apache-2.0
"""A question about a picture, answered with the full cache and with a pruned one: what the page asks for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image
from transformers import PreTrainedModel

from plphp.errors import ConfigError, PLPHPError
from plphp.evaluation import make_variants
from plphp.inputs.media import load_image
from plphp.inputs.prompt import build_inputs
from plphp.io.quoting import one_line
from plphp.methods.registry import chain_of, methods_by_stage, settled
from plphp.settings.config import PLPHPConfig
from plphp.settings.ladder import LADDERS, PRODUCT_RUNGS, Ladder
from plphp.settings.presets import BUNDLED_OPTIONS
from plphp.show.plots import plot_kept
from plphp.show.tables import comparison_rows
from plphp.studies.compare import Comparison, compare

DEFAULT = "default"
"""The method that stands for the settings with which the page was started."""
EVICT = "whole, the rest evicted"
"""How entries are held without a ladder."""
HELD = (EVICT, *LADDERS)
COLUMNS = 4
"""Layers side by side in the picture, of which a phone shows all."""
MOST = 0.9
"""A rate that every method can have: some keep their first layers whole."""
DOTS_PER_INCH = 110
"""Of the picture."""


@dataclass(frozen=True)
class Choice:
    """How an answer is to be pruned.

    Parameters
    ----------
    method : str
        Name of a method, or `DEFAULT`, which the other settings are not for.
    held : str
        Of `HELD`: a ladder, or `EVICT`.
    retention : float
        Fraction of the vision tokens to keep, in [0, 1], where no ladder says it.
    line : str
        A line of settings, in the place of all of these; "" for none.
    """

    method: str = DEFAULT
    held: str = EVICT
    retention: float = 0.4
    line: str = ""


@dataclass(frozen=True)
class Outcome:
    """What the page shows of an answer.

    Parameters
    ----------
    unpruned, pruned : str
        The answers.
    verdict : str
        A sentence that compares them.
    rows : list of tuple of str
        Figures: name, value unpruned, value pruned.
    picture : Image
        What stayed of the picture.
    """

    unpruned: str
    pruned: str
    verdict: str
    rows: list[tuple[str, str, str]]
    picture: Image.Image


class Asking:
    """Answers questions about pictures, one at a time.

    Parameters
    ----------
    model : PreTrainedModel
        A supported model, in evaluation mode.
    processor : ProcessorMixin
        Its processor.
    config : PLPHPConfig
        The settings of `DEFAULT`.
    bundled : bool
        Whether it is the bundled model, whose bank and codebooks methods that need any then take.
    max_new_tokens : int
        Longest answer.

    Raises
    ------
    PLPHPError
        If the settings do not fit the model, or collect a query bank first, so that there is nothing to compare.
    """

    def __init__(
        self, model: PreTrainedModel, processor: Any, config: PLPHPConfig, *, bundled: bool, max_new_tokens: int = 128
    ) -> None:
        self.config, self.bundled = config, bundled
        self._model, self._processor, self._max_new_tokens = model, processor, max_new_tokens
        self._layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self._one_at_a_time = threading.Lock()
        self._seen: set[str] = set()
        self._check(config)

    def methods(self) -> list[tuple[str, str]]:
        """The methods that this model can be asked with: what they do, and their names; `DEFAULT` first."""
        own = settled(self.config)
        held = "" if own.tiers is None else f", held by {own.tiers}"
        listed = [(f"{DEFAULT}: {own.method}{held}", DEFAULT)]
        for method in methods_by_stage():
            if method.name != "none" and not (method.kv is not None and method.kv.needs_answer):
                try:
                    self.settings(Choice(method.name, retention=MOST))
                except PLPHPError:  # such as one that needs a query bank of this model
                    continue
                listed.append((f"{method.name}: {method.summary}", method.name))
        return listed

    def settings(self, choice: Choice) -> PLPHPConfig:
        """Return the settings of a choice.

        Raises
        ------
        PLPHPError
            If there is no such method or setting, they contradict each other or do not fit the model, or they name
            files or repositories that the page was not started with.
        """
        if choice.line.strip():
            config = _single(choice.line, choice.retention)
            self._refuse_others_files(config)
        elif choice.method == DEFAULT:
            return self.config
        else:
            config = _single(self._line(choice), choice.retention)
        self._check(config)
        return config

    def answer(
        self,
        image: Any,
        question: str | None,
        choice: Choice,
        progress: Callable[[str], None] = lambda step: None,
    ) -> Outcome:
        """Answer a question unpruned and pruned.

        Parameters
        ----------
        image : str, Path or Image
            The picture, see `plphp.inputs.media.load_image`; None where none was given.
        question : str
            What is asked about it.
        choice : Choice
            How the second answer is pruned.
        progress : callable
            Called with what is going on, in a few words.

        Raises
        ------
        PLPHPError
            If there is no picture or question, the picture cannot be read, or the choice cannot be.
        """
        if image is None:
            raise ConfigError("There is no picture: choose one first.")
        if question is None or not question.strip():
            raise ConfigError("There is no question: write what is asked about the picture.")
        config = self.settings(choice)
        picture = load_image(image)
        inputs = build_inputs(self._processor, question, images=[picture])
        with self._one_at_a_time:
            comparison = self._compared(inputs, config, progress)
        return Outcome(
            unpruned=comparison.unpruned.texts[0],
            pruned=comparison.pruned.texts[0],
            verdict=_verdict(comparison),
            rows=comparison_rows(comparison),
            picture=_drawn(comparison, picture),
        )

    def _compared(self, inputs: dict[str, Any], config: PLPHPConfig, progress: Callable[[str], None]) -> Comparison:
        """Both answers. With settings that come for the first time two tokens are answered before, uncounted: what is
        built and loaded on first use belongs to no answer."""
        options: dict[str, Any] = {"rounds": 1, "do_sample": False}
        if repr(config) not in self._seen:
            progress("getting ready")
            compare(self._model, self._processor, inputs, config, max_new_tokens=2, **options)
            self._seen.add(repr(config))
        length = self._max_new_tokens
        return compare(
            self._model, self._processor, inputs, config, max_new_tokens=length, progress=progress, **options
        )

    def _line(self, choice: Choice) -> str:
        """A choice as a line of settings, with what the bundled model has of its own."""
        values = dict(BUNDLED_OPTIONS.get(choice.method, {})) if self.bundled else {}
        if choice.held != EVICT:
            values["tiers"] = choice.held
            if self.bundled and not values.get("bank") and set(Ladder.parse(choice.held).names) & set(PRODUCT_RUNGS):
                values["books"] = "bundled"
        settings = ",".join(f"{name}={value}" for name, value in values.items())
        return f"{choice.method}:{settings}" if settings else choice.method

    def _check(self, config: PLPHPConfig) -> None:
        chain_of(config, self._layers).refuse_uncollected("A comparison")

    def _refuse_others_files(self, config: PLPHPConfig) -> None:
        """Whoever sees the page is not to have this machine read its files, or fetch what he likes from the hub."""
        known = {"bundled", *_files(self.config)}
        for name in _files(config):
            if name not in known:
                raise ConfigError(
                    f"{name} is no query bank of this page: it has {', '.join(sorted(known))}; start plphp ui with a "
                    "--config that names it."
                )


def shown_error(error: Exception) -> str | None:
    """Return what the page says of an error; None for one that is a mistake in plphp."""
    if isinstance(error, PLPHPError):
        return " ".join(str(error).split())
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError"):
        return f"Out of memory: use a smaller picture. {one_line(error, limit=200)}"
    return None


def _single(line: str, retention: float) -> PLPHPConfig:
    """The settings of a line of the grammar of ``plphp eval``, at a retention where it says none itself."""
    variants = make_variants([line], [retention])
    if len(variants) != 2 or variants[1].images != "as they are":
        raise ConfigError(
            f"{line!r} is not one way to prune: name a method, such as plphp:target_retention=0.4, or a chain of them."
        )
    return variants[1].config


def _files(config: PLPHPConfig) -> Iterator[str]:
    """The files and repositories of query banks that settings name."""
    for part in (*config.earlier, config):
        named = (part.books, part.options.get("bank"), part.options.get("folder"))
        yield from (str(name) for name in named if name)


def _verdict(comparison: Comparison) -> str:
    same = "The same answer" if comparison.same_tokens else "Another answer"
    return f"{same}, with {comparison.kv_reduction:.0%} of the prompt's KV bytes gone."


def _drawn(comparison: Comparison, picture: Image.Image) -> Image.Image:
    written = BytesIO()
    plot_kept(comparison.report, [picture], columns=COLUMNS).savefig(written, format="png", dpi=DOTS_PER_INCH)
    return Image.open(written)
