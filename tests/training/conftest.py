# SPDX-License-Identifier: Apache-2.0
"""Make the ``training`` folder importable, and skip its tests where its extra is missing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

collect_ignore_glob = []
if any(importlib.util.find_spec(name) is None for name in ("sklearn", "matplotlib")):
    collect_ignore_glob.append("test_*.py")
