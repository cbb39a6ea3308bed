# SPDX-License-Identifier: Apache-2.0
"""One prompt, from its first chunk to what is left of it; knows no engine."""
