# SPDX-License-Identifier: Apache-2.0
"""Names under which vLLM knows the parts of the plugin."""

from __future__ import annotations

CONNECTOR = "PLPHPConnector"
"""Name of the KV connector, for ``--kv-transfer-config``."""
BACKENDS = {"CPU_ATTN": "plphp.engines.vllm.cpu_backend.PrunedCPUBackend"}
"""By the name of an attention backend of vLLM, what stands in for it."""
UNTESTED_BACKENDS = {"FLASH_ATTN": "plphp.engines.vllm.flash_backend.PrunedFlashBackend"}
"""The same, for those who ask to try what has never been run, see `plphp.engines.vllm.refusals.untested_allowed`."""
