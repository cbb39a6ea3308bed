# SPDX-License-Identifier: Apache-2.0
"""What a user gives: models, images, videos, chats, prompts in files."""
