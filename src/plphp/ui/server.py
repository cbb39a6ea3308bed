# SPDX-License-Identifier: Apache-2.0
"""Run the page so that no other host is asked for anything, by the server or by the browser."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from PIL import Image

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported

from plphp.errors import BackendUnavailableError, ConfigError
from plphp.evaluation import available_tasks
from plphp.inputs.loading import load_model
from plphp.inputs.sources import is_bundled
from plphp.settings.config import PLPHPConfig
from plphp.settings.presets import default_settings

from .asking import Asking
from .page import CSS, THEME, make_page

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:"
)
"""What a browser may load: of this server alone, however gradio's page may name other hosts."""
BUNDLED_NOTE = (
    "*This is the small model that ships with plphp. It knows drawn shapes, digits and printed codes alone, and talks "
    "nonsense of a photograph.*"
)
EXAMPLE_TASKS = ("list_row", "read_page", "relation")
"""Built-in tasks of one picture that examples for the bundled model are drawn of."""
MOST_WAITING = 20
"""Questions that wait; further ones are refused."""
LARGEST_FILE = "32mb"


class OwnHostOnly:
    """Adds `POLICY` to every answer."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def with_policy(message: Scope) -> None:
            if message["type"] == "http.response.start":
                headers = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message.get("headers", ()), *headers]}
            await send(message)

        await self._app(scope, receive, with_policy)


def launch(page: Any, host: str, port: int, *, wait: bool = True) -> str:
    """Serve a page.

    Parameters
    ----------
    page : gradio.Blocks
        See `plphp.ui.page.make_page`.
    host : str
        Network interface; ``0.0.0.0`` for all.
    port : int
        TCP port; 0 for any that is free.
    wait : bool
        Whether to serve until the process is told to stop.

    Returns
    -------
    str
        Its address.

    Raises
    ------
    ConfigError
        If the port is taken, or there is no such interface.
    """
    from starlette.middleware import Middleware

    page.queue(max_size=MOST_WAITING, api_open=False)
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port or None,
            quiet=True,
            share=False,
            ssr_mode=False,
            prevent_thread_lock=True,
            footer_links=[],
            max_file_size=LARGEST_FILE,
            theme=THEME,
            css=CSS,
            app_kwargs={"middleware": [Middleware(OwnHostOnly)]},
        )
    except OSError as error:
        raise ConfigError(
            f"Cannot listen at port {port} of {host}: {error} Choose another with --host and --port."
        ) from error
    if wait:
        page.block_thread()
    return str(address)


def page_of(
    model: Any, processor: Any, name: str | None, config: PLPHPConfig | None = None, *, max_new_tokens: int = 128
) -> Any:
    """Make the page of a model that is loaded.

    Parameters
    ----------
    model : PreTrainedModel
        A supported model, in evaluation mode.
    processor : ProcessorMixin
        Its processor.
    name : str, optional
        Its hub id or folder; None for the bundled model.
    config : PLPHPConfig, optional
        Settings that the page begins with; default: those of ``plphp generate``.
    max_new_tokens : int
        Longest answer.

    Returns
    -------
    gradio.Blocks
    """
    bundled = is_bundled(name)
    settings = default_settings(bundled) if config is None else config
    asking = Asking(model, processor, settings, bundled=bundled, max_new_tokens=max_new_tokens)
    if not bundled:
        return make_page(asking, Path(str(name)).name)
    return make_page(asking, "The bundled model of plphp", BUNDLED_NOTE, _examples())


def run(name: str | None = None, *, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Load a model and serve its page until the process is told to stop: all that a Space needs.

    Parameters
    ----------
    name : str, optional
        Hub id or folder of the model; default: the bundled model.
    host : str
        Network interface; ``0.0.0.0`` for all.
    port : int
        TCP port.
    """
    model, processor = load_model(name)
    launch(page_of(model, processor, name), host, port)


def _examples() -> list[tuple[Image.Image, str]]:
    """Pictures with questions for the bundled model; none where the package that draws digits is missing."""
    try:
        samples = [next(available_tasks()[name].samples("dev", 1)) for name in EXAMPLE_TASKS]
    except BackendUnavailableError:
        return []
    return [(sample.images[0], sample.turns[0].question) for sample in samples]
