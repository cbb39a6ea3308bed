# SPDX-License-Identifier: Apache-2.0
"""The command line ``plphp``: thin commands over public functions; the only place that prints."""

from . import calibrate, chat, collect, estimate, eval, generate, profile, report_page, reports, serve, support, ui  # noqa: F401  (each adds its commands to the app)
from ._app import app


def main() -> None:
    """Run ``plphp``; the entry point of the console script."""
    app(prog_name="plphp")
