# SPDX-License-Identifier: Apache-2.0
"""Files that plphp reads and writes, and how messages quote what a user wrote; imports nothing but errors."""
