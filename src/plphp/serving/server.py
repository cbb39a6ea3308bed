# SPDX-License-Identifier: Apache-2.0
"""Run a server until it is stopped."""

from __future__ import annotations

import logging
import socket
from contextlib import ExitStack

import uvicorn

from plphp.errors import ConfigError

from .app import make_app
from .options import Listening
from .served_model import ServedModel

logger = logging.getLogger("plphp")
SECONDS_TO_STOP = 10
"""How long a server that is told to stop goes on with the answers that it has begun."""


def bound_socket(listening: Listening) -> socket.socket:
    """Take a port, before a model is loaded, which may take minutes; nobody can connect yet.

    Raises
    ------
    ConfigError
        If the port is taken, or there is no such network interface.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            listening.host, listening.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with ExitStack() as failed:
            port = failed.enter_context(socket.socket(family, kind))
            port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            port.bind(address)
            failed.pop_all()
    except (OSError, OverflowError) as error:
        where = f"port {listening.port} of {listening.host}"
        raise ConfigError(f"Cannot listen at {where}: {error}. Choose another with --host and --port.") from error
    return port


def serve(port: socket.socket, served: ServedModel, model_name: str, api_key: str | None = None) -> None:
    """Run a server until it is stopped.

    Parameters
    ----------
    port : socket
        From `bound_socket`.
    served : ServedModel
        The model.
    model_name : str
        What clients call it.
    api_key : str, optional
        What clients have to send as their key.
    """
    logger.info("%s is served at http://%s:%d/v1", model_name, *port.getsockname()[:2])
    uvicorn.Server(uvicorn_config(served, model_name, api_key)).run(sockets=[port])


def uvicorn_config(served: ServedModel, model_name: str, api_key: str | None = None) -> uvicorn.Config:
    """Return how uvicorn runs the server of a model."""
    app = make_app(served, model_name, api_key)
    return uvicorn.Config(app, lifespan="on", timeout_graceful_shutdown=SECONDS_TO_STOP, server_header=False)
