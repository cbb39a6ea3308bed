# SPDX-License-Identifier: Apache-2.0
"""The version of plphp."""

__version__ = "0.1.0"
