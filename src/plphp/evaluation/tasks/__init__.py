# SPDX-License-Identifier: Apache-2.0
"""What is asked and how answers are scored: built-in tasks, the user's own data and prompts, metrics."""
