# SPDX-License-Identifier: Apache-2.0
"""Measurements around a model: calibration, profiles, comparisons, estimates, query banks."""
