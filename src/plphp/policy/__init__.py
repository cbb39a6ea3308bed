# SPDX-License-Identifier: Apache-2.0
"""Decisions as pure functions: from scores to retention rates and to the entries that a KV head keeps."""
