# SPDX-License-Identifier: Apache-2.0
"""The options of ``plphp serve`` with the engine transformers, and how it starts."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated

from plphp.serving.options import Limits, Listening
from plphp.settings.config import PLPHPConfig

from ._app import progress
from ._checks import check_model
from ._engines import REQUESTS, SERVER
from ._models import weights_of
from ._options import allow_urls_option, decode_option, device_option, dtype_option, option

HostOption = Annotated[str, option(SERVER, "Network interface; 0.0.0.0 for all.", show_default=True)]
PortOption = Annotated[int, option(SERVER, "TCP port.", min=0, max=65535, show_default=True)]
ServedModelNameOption = Annotated[
    str | None, option(SERVER, "What clients call the model; default: what it is called here.")
]
ApiKeyOption = Annotated[str | None, option(SERVER, "Key that clients have to send.", envvar="PLPHP_API_KEY")]
ServedDecodeOption = Annotated[str, decode_option(SERVER)]
ServedDtypeOption = Annotated[str, dtype_option(SERVER)]
ServedDeviceOption = Annotated[str | None, device_option(SERVER)]
MaxModelLenOption = Annotated[
    int | None, option(REQUESTS, "Tokens of a prompt and its answer; default: what the model knows.", min=1)
]
MaxNewTokensOption = Annotated[int, option(REQUESTS, "Tokens of an answer.", min=1, show_default=True)]
ImagesOption = Annotated[str, option(REQUESTS, "Images of a request.", "--limit-mm-per-prompt", show_default=True)]
MaxImagePixelsOption = Annotated[int, option(REQUESTS, "Pixels of an image.", min=1, show_default=True)]
MaxBodyBytesOption = Annotated[
    int, option(REQUESTS, "Bytes of a request, and of all that is fetched for it.", min=1, show_default=True)
]
MaxQueueOption = Annotated[int, option(REQUESTS, "Requests at once; further ones get a 503.", min=1, show_default=True)]
ConversationsOption = Annotated[
    int, option(REQUESTS, "Conversations whose caches wait for their next turn.", min=0, show_default=True)
]
ConversationBytesOption = Annotated[
    str, option(REQUESTS, "Bytes that these caches hold, all together, such as 500MB.", show_default=True)
]
ServedUrlsOption = Annotated[bool, allow_urls_option(REQUESTS)]
CONVERSATION_BYTES = "2GB"
"""Default of ``--conversation-bytes``, that of `Limits`."""
IMAGES = f'{{"image": {Limits.max_images}}}'
"""Default of ``--limit-mm-per-prompt``."""


@dataclass(frozen=True)
class ModelToServe:
    """A model, and how it is served.

    Parameters
    ----------
    name : str, optional
        Hub id or folder; None for the bundled model.
    served_name : str
        What clients call it.
    dtype, device, decode
        As for ``plphp generate``.
    settings : PLPHPConfig
        How every request is pruned.
    """

    name: str | None
    served_name: str
    dtype: str
    device: str | None
    decode: str
    settings: PLPHPConfig


def serve_with_transformers(model: ModelToServe, limits: Limits, listening: Listening) -> None:
    """Load a model, try it out, and serve it until the server is stopped."""
    check_model(model.name, model.dtype, model.device)
    with ExitStack() as stack:
        with progress("loading plphp") as show:
            from plphp.inputs.loading import decoder_layers, load_processor
            from plphp.methods.registry import chain_of
            from plphp.serving.served_model import ServedModel
            from plphp.serving.server import bound_socket, serve

            socket = stack.enter_context(bound_socket(listening))
            show("loading the processor")
            processor = load_processor(model.name)
            chain_of(model.settings, decoder_layers(model.name))  # refuses what does not fit, before the weights
        weights = weights_of(model.name, model.dtype, model.device, quiet=False)
        served = ServedModel(weights, processor, model.settings, model.decode, limits)
        served.try_out()
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s:     %(message)s")
        logging.getLogger("plphp").setLevel(logging.INFO)
        serve(socket, served, model.served_name, listening.api_key)
