# SPDX-License-Identifier: Apache-2.0
"""Pruning in Hugging Face transformers."""
