# SPDX-License-Identifier: Apache-2.0
"""What is left of an evaluation: the folder of a run, its figures with intervals, tables and plots."""
