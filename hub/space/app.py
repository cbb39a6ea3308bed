# SPDX-License-Identifier: Apache-2.0
"""The page of ``plphp ui`` as a Space; its variable PLPHP_MODEL names the model, by default the bundled one."""

import os

from plphp.ui.server import run

if __name__ == "__main__":
    run(os.environ.get("PLPHP_MODEL") or None, host="0.0.0.0", port=int(os.environ.get("PORT", "7860")))
