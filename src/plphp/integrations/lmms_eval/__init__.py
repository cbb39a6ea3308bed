# SPDX-License-Identifier: Apache-2.0
"""The model ``plphp`` of lmms-eval: its benchmarks on any model that plphp prunes, see docs/benchmarks.md.

lmms-eval looks the model up by the entry point of the group ``lmms_eval.models``. Nothing else in plphp imports
lmms-eval, and neither torch nor a model is touched before ``--model plphp`` is asked for.
"""

from __future__ import annotations

from typing import Any

MODEL = "plphp.integrations.lmms_eval.model.PrunedModel"


def manifest() -> Any:
    """Return the ``ModelManifest`` by which lmms-eval finds the model; the entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="plphp", chat_class_path=MODEL)
