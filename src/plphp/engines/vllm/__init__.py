# SPDX-License-Identifier: Apache-2.0
"""A plugin for vLLM: vision KV leaves the paged cache per layer and per head, and its blocks go back to the pool.

How it works, for every decoder layer by itself:

- The cache of each layer is a group of its own with its own block tables (`plphp.engines.vllm.specs`), so that its
  blocks can be returned alone. All groups draw from one pool.
- The attention backend reads a prompt as usual. In the chunk that ends it, the library's own scoring, allocation and
  selection say what each KV head keeps (`plphp.engines.vllm.reading`). What is kept moves to the *end* of the prompt's
  slots, so that every later token stands where vLLM expects it, and whole blocks at the head of the prompt fall empty.
- From then on the layer's block table begins behind the empty blocks, and its sequence is shorter by so many tokens
  (`plphp.engines.vllm.step`). No other number changes.
- The worker reports to the scheduler which blocks are empty, and the scheduler frees them
  (`plphp.engines.vllm.connector`).

All of it is idle unless vLLM is started with the connector and with settings, see docs/serving.md.
"""

from __future__ import annotations

import logging
import os


def register() -> None:
    """Make the plugin known to vLLM; the entry point of the group ``vllm.general_plugins``.

    vLLM calls it in each of its processes. On a version that the plugin is not tested with, only the connector is
    made known: it refuses by name when it is used.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from .names import BACKENDS, CONNECTOR, UNTESTED_BACKENDS
    from .refusals import tested_version, untested_allowed
    from .settings import ENVIRONMENT

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "plphp.engines.vllm.connector", CONNECTOR)
    if tested_version():
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        for name, path in {**BACKENDS, **(UNTESTED_BACKENDS if untested_allowed() else {})}.items():
            register_backend(AttentionBackendEnum[name], path)
    elif ENVIRONMENT in os.environ:
        logging.getLogger("vllm.plphp").warning("plphp does nothing without its KV connector in this version of vLLM.")
