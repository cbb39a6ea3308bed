# SPDX-License-Identifier: Apache-2.0
"""Where pruning runs: Hugging Face transformers and vLLM."""
