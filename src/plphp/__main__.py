# SPDX-License-Identifier: Apache-2.0
"""``python -m plphp``."""

from .cli import main

main()
