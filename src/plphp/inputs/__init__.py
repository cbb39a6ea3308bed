# SPDX-License-Identifier: Apache-2.0
"""From what a user names to what a model reads: models, images, videos, chats, and prompts in files."""
