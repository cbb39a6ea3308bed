# SPDX-License-Identifier: Apache-2.0
"""How an evaluation runs: methods at retentions, samples in tokens, scores of every sample, worker processes."""
