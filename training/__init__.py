# SPDX-License-Identifier: Apache-2.0
"""Training of the small vision-language model that ships inside plphp (see ``training/README.md``)."""
