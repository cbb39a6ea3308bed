# SPDX-License-Identifier: Apache-2.0
"""Turns of a chat: what a cache has read, what a later turn adds, and where its tokens stand."""
