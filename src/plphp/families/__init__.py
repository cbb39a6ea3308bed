# SPDX-License-Identifier: Apache-2.0
"""Where the vision tokens of a prompt stand, for each family of vision-language models: a file per family."""
