# SPDX-License-Identifier: Apache-2.0
"""JSON files that plphp reads and writes, and how messages quote what a user wrote; imports nothing but errors."""
