# SPDX-License-Identifier: Apache-2.0
"""plphp inside other frameworks: each folder is idle until its framework asks for it."""
