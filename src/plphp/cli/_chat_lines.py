# SPDX-License-Identifier: Apache-2.0
"""The lines of a chat in the terminal: questions and commands, and what is shown for them."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer
from PIL import Image

from plphp.errors import ConfigError, PLPHPError, did_you_mean
from plphp.inputs.media import load_image
from plphp.io.quoting import quoted

from ._app import INTERRUPTED, USER_ERROR, console

if TYPE_CHECKING:
    from plphp.engines.hf.ongoing_chat import OngoingChat
    from plphp.pruning.image_report import ImageMemory

PROMPT = "> "


@dataclass(frozen=True)
class Shown:
    """How a chat shows what it says.

    Parameters
    ----------
    as_json : bool
        Whether it prints lines of JSON in the place of text.
    bank_folder : str
        Folder of the query bank that the session collects; "" for none.
    """

    as_json: bool
    bank_folder: str = ""

    def values(self, **values: Any) -> None:
        """Print values as a line of JSON, where that is asked for."""
        if self.as_json:
            print(json.dumps(values, ensure_ascii=False), flush=True)

    def note(self, text: str) -> None:
        """Say something beside the answers, on standard error; with JSON nothing."""
        if not self.as_json:
            typer.echo(text, err=True)


class ChatLines:
    """A chat by lines.

    Parameters
    ----------
    chat : OngoingChat
        The chat, whose session is open.
    processor : ProcessorMixin
        Processor of its model.
    shown : Shown
        How answers are shown.
    options : dict
        Arguments of ``generate``.
    allow_urls : bool
        Whether http and https addresses of images are fetched.

    Attributes
    ----------
    answers : int
        Answers so far.
    """

    def __init__(
        self, chat: OngoingChat, processor: Any, shown: Shown, options: dict[str, Any], *, allow_urls: bool
    ) -> None:
        self.chat, self.answers = chat, 0
        self._processor, self._shown, self._options, self._allow_urls = processor, shown, options, allow_urls
        self._messages: list[dict[str, Any]] = []
        self._images: list[Image.Image] = []
        self._sources: list[str] = []
        # By turn, from 1, the sources of its images: the chat keeps no pixels.
        self._sources_of: dict[int, list[str]] = {}
        self._failed = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._add_image,
            "/images": self._show_images,
            "/forget": self._forget,
            "/restore": self._restore,
            "/help": self._help,
        }

    def begin(self, system: str | None, images: Sequence[tuple[str, Image.Image]]) -> None:
        """Begin with a system message, and with images for the first question, each behind its source."""
        if system is not None:
            self._messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
        self._sources += [source for source, _ in images]
        self._images += [image for _, image in images]

    def run(self) -> None:
        """Answer line by line until there are no more.

        Raises
        ------
        Exit
            With the code of a user's mistake, if a line that came from a pipe was refused.
        """
        for line in _lines():
            if line == "/quit":
                break
            try:
                self._take(line)
            except PLPHPError as error:
                self._failed = True
                self._shown.values(error=str(error))
                typer.echo(f"error: {' '.join(str(error).splitlines())}", err=True)
                if self.chat.over:
                    raise typer.Exit(USER_ERROR) from error
        if self._failed and not sys.stdin.isatty():
            raise typer.Exit(USER_ERROR)

    def _take(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if not name.startswith("/"):
            self._ask(line)
        elif name in self._commands:
            self._commands[name](rest.strip())
        else:
            known = (*self._commands, "/quit")
            raise ConfigError(f"There is no command {quoted(name)}.{did_you_mean(name, known)}")

    def _ask(self, question: str) -> None:
        """Answer a question with the images that were added; where it is refused, they wait for the next."""
        images: list[dict[str, Any]] = [{"type": "image", "image": image} for image in self._images]
        content = [*images, {"type": "text", "text": question}]
        turn = self.chat.prepare([*self._messages, {"role": "user", "content": content}])
        earlier_seconds = 0.0 if self.chat.cache is None else self.chat.cache.pruning_seconds
        with _interrupts() as stopping:
            try:
                tokens = self.chat.generate(turn, **self._options, **self._streaming(stopping))
            except BaseException:
                self.chat.take_back()
                raise
        read = turn.tokens - self.chat.said.held
        self._images, self._sources, sources = [], [], self._sources
        answer = self._processor.decode(tokens, skip_special_tokens=True)
        # What was read is not read again, so that images are not kept: the template is to see their slots alone.
        asked = {"role": "user", "content": [*({"type": "image"} for _ in images), content[-1]]}
        self._messages += [asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        self.chat.keep(len(self._messages), turn, tokens)
        self.chat.settle()
        self._sources_of[self.chat.said.turns] = sources
        self.answers += 1
        self._show_answer(answer.strip(), len(tokens), read, earlier_seconds, interrupted=bool(stopping))

    def _streaming(self, stopping: list[int]) -> dict[str, Any]:
        """Arguments of ``generate`` that show an answer while it is written, and end it once there is an interrupt."""
        import torch
        from transformers import StoppingCriteriaList, TextStreamer

        def stops(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((ids.shape[0],), bool(stopping), dtype=torch.bool, device=ids.device)

        criteria: Any = StoppingCriteriaList([stops])
        if self._shown.as_json:
            return {"stopping_criteria": criteria}
        streamer = TextStreamer(self._processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        return {"stopping_criteria": criteria, "streamer": streamer}

    def _show_answer(self, answer: str, tokens: int, read: int, earlier_seconds: float, *, interrupted: bool) -> None:
        from plphp.show.memory_table import restoring_may_help, wanted_line
        from plphp.show.tables import collecting_line, summary

        report = self.chat.report()
        self._shown.values(
            answer=answer,
            tokens=tokens,
            read=read,
            interrupted=interrupted,
            kv_bytes=report.entry_bytes,
            kv_bytes_full=report.kv_bytes_full,
            wanted=[image.number for image in report.wanted],
        )
        self._shown.note(f"{read} tokens read. {summary(report, earlier_seconds)}")
        if wanted := wanted_line(report):
            self._shown.note(f"{wanted} /restore brings it back." if restoring_may_help(report) else wanted)
        if report.collecting is not None:
            self._shown.note(collecting_line(report.collecting, self._shown.bank_folder))

    def _add_image(self, source: str) -> None:
        self._images.append(load_image(source, allow_urls=self._allow_urls))
        self._sources.append(source)
        self._shown.note(f"New images of the next question: {len(self._images)}.")

    def _show_images(self, _: str) -> None:
        from plphp.show.chat_images import image_table, image_values

        report = self.chat.report() if self.answers else None
        self._shown.values(images=image_values(report) if report else [])
        if not self._shown.as_json:
            console().print((image_table(report) if report else None) or "No image was read so far.")

    def _forget(self, number: str) -> None:
        self.chat.forget(self._image("forget", number).number)
        self._show_images("")

    def _restore(self, number: str) -> None:
        """Bring an image back, from the sources that were named in its turn or from host memory."""
        image = self._image("restore", number)
        waits = self.chat.cache is not None and self.chat.cache.images_on_host
        sources = [] if waits else self._sources_of[image.turn]
        pictures = [load_image(source, allow_urls=self._allow_urls) for source in sources]
        self.chat.restore(image.number, pictures)
        self._show_images("")

    def _image(self, command: str, number: str) -> ImageMemory:
        """The image that a line names, which only a cache with a budget knows."""
        images = [] if self.chat.cache is None else self.chat.cache.images
        if not number.isdecimal() or int(number) >= len(images):
            raise ConfigError(
                f"/{command} takes the number of an image, of {len(images)} that were read, got {quoted(number)}."
            )
        return images[int(number)]

    def _help(self, _: str) -> None:
        self._shown.note(f"A question a line; {', '.join(self._commands)} and /quit are commands.")


def _lines() -> Iterator[str]:
    """The lines of standard input that are not empty; in a terminal with a prompt, and Ctrl-C between two ends it."""
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            print(PROMPT, end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        if not line:
            return
        if line.strip():
            yield line.strip()


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """While open, the first Ctrl-C is noted in the list that is yielded, and the second interrupts."""
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
