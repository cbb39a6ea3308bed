# SPDX-License-Identifier: Apache-2.0
"""Names under which vLLM knows the parts of the plugin."""

from __future__ import annotations

CONNECTOR = "PLPHPConnector"
"""Name of the KV connector, for ``--kv-transfer-config``."""
BACKENDS = {"CPU_ATTN": "plphp.engines.vllm.cpu_backend.PrunedCPUBackend"}
"""By the name of an attention backend of vLLM, the class that stands in for it."""
UNTESTED_BACKENDS = {"FLASH_ATTN": "plphp.engines.vllm.flash_backend.PrunedFlashBackend"}
"""Stand-ins that have never been run, for users who ask for them: `plphp.engines.vllm.refusals.untested_allowed`."""
