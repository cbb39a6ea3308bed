# SPDX-License-Identifier: Apache-2.0
"""The settings of a run: the config, the options of methods, the grammar of a line, presets."""
