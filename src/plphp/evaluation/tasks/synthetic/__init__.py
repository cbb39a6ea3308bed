# SPDX-License-Identifier: Apache-2.0
"""Synthetic images with known content, and questions about them whose answers are true by construction."""
