# SPDX-License-Identifier: Apache-2.0
"""``plphp ui``: a page in the browser to ask with pictures of one's own."""

from __future__ import annotations

import webbrowser
from importlib.util import find_spec
from typing import Annotated

from plphp.errors import BackendUnavailableError
from plphp.inputs.sources import is_bundled

from ._app import app, progress
from ._checks import check_model
from ._models import weights_of
from ._options import (
    MODEL_HELP,
    ConfigFileOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    MethodOption,
    RetentionRateOption,
    TargetRetentionOption,
    argument,
    option,
)
from ._settings import read_settings


@app.command()
def ui(
    model: Annotated[str | None, argument(MODEL_HELP)] = None,
    config: ConfigOption = None,
    config_file: ConfigFileOption = None,
    method: MethodOption = None,
    retention_rate: RetentionRateOption = None,
    target_retention: TargetRetentionOption = None,
    max_new_tokens: Annotated[int, option(None, "Length of the answers.", min=1, show_default=True)] = 128,
    host: Annotated[str, option(None, "Network interface; 0.0.0.0 for all.", show_default=True)] = "127.0.0.1",
    port: Annotated[int, option(None, "TCP port; 0: any.", min=0, max=65535, show_default=True)] = 7860,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    open_page: Annotated[bool, option(None, "Open the page in a browser.", "--open")] = False,
) -> None:
    """Serve a page to ask with your own pictures: both answers, what they took, and what stayed of the picture.

    Every method and ladder can be chosen on the page; the settings given here are those that it begins with.
    """
    settings = read_settings(config, config_file, method, retention_rate, target_retention, bundled=is_bundled(model))
    missing = [name for name in ("gradio", "matplotlib") if find_spec(name) is None]
    if missing:
        raise BackendUnavailableError(f"plphp ui needs {' and '.join(missing)}: pip install 'plphp[ui]'.")
    check_model(model, dtype, device)
    with progress("loading plphp") as show:
        from plphp.inputs.loading import load_processor
        from plphp.ui.server import launch, page_of

        show("loading the processor")
        processor = load_processor(model)
    weights = weights_of(model, dtype, device, quiet=False)
    page = page_of(weights, processor, model, settings, max_new_tokens=max_new_tokens)
    address = launch(page, host, port, wait=False)
    print(f"{address} (Ctrl+C to stop)", flush=True)
    if open_page:
        webbrowser.open(address)
    page.block_thread()
