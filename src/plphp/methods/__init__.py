# SPDX-License-Identifier: Apache-2.0
"""One file per method; `plphp.registry` finds them by name."""
