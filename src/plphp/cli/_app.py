# SPDX-License-Identifier: Apache-2.0
"""The typer app and what its commands share: errors of a single line, JSON, progress."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from plphp.errors import PLPHPError
from plphp.inputs.sources import is_bundled
from plphp.io.quoting import one_line

USER_ERROR = 2
INTERRUPTED = 130
"""Exit code of a program that the user interrupted, as shells have it: 128 and the number of the signal."""
BUNDLED_NOTE = (
    "note: the bundled model knows drawn shapes, digits and printed codes alone, as in examples/images: for "
    "photographs name another with --model."
)


class _Group(TyperGroup):
    """Commands whose expected errors end as a line on standard error, never as a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # an answer may hold what the terminal cannot show
                stream.reconfigure(errors="replace")
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # typer ends quietly, as for `plphp ... | head`
            raise
        except PLPHPError as error:
            message = " ".join(str(error).splitlines())  # whole, however long a user's values in it are
        except OSError as error:
            message = f"{error.filename}: {error.strerror}" if error.filename else one_line(error)
        except Exception as error:
            if type(error).__name__ not in ("OutOfMemoryError", "MemoryError"):
                raise
            message = f"Out of memory: use a smaller image, model or --max-new-tokens. {one_line(error, limit=200)}"
        print(f"error: {message}", file=sys.stderr)
        raise typer.Exit(USER_ERROR)


app = typer.Typer(
    cls=_Group,
    help="Evict vision tokens from the KV cache of vision-language models, per layer and per head.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        from plphp._version import __version__

        print(f"plphp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def note_on_bundled(model: str | None, quiet: bool) -> None:
    """Say on standard error what the bundled model knows: about a photo it writes nonsense, in whole sentences."""
    if is_bundled(model) and not quiet:
        print(BUNDLED_NOTE, file=sys.stderr)


def print_json(values: Any) -> None:
    """Print values as a JSON document."""
    print(json.dumps(values, indent=2))


def console() -> Console:
    """Standard output for tables; wide enough for them where it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 110, highlight=False)


@contextlib.contextmanager
def progress(text: str, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Show on standard error, if that is a terminal, what is going on; yields a function that shows the next step."""
    quiet_libraries()
    errors = Console(stderr=True, quiet=quiet)
    with errors.status(text) as status:
        yield lambda step: status.update(step)


def quiet_libraries() -> None:
    """Leave standard error to plphp: transformers and the hub warn on it, and show bars of their own."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
