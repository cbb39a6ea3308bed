# SPDX-License-Identifier: Apache-2.0
"""One file per method; `plphp.methods.registry` finds them by name.

They are imported to be listed and to check options, before torch is: torch is imported in the functions that compute.
"""
