# SPDX-License-Identifier: Apache-2.0
"""Reports and measurements as tables and plots; nothing is measured here."""
