# SPDX-License-Identifier: Apache-2.0
"""``python -m plphp``."""

from plphp.cli import main

main()
