# SPDX-License-Identifier: Apache-2.0
"""Copies of modules in which some parts are others.

A copy shares all else with the module, and the module itself is never changed: another thread may run it meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

OWN = ("_parameters", "_buffers", "_modules")
"""Tables of a module of which its copy has its own."""
HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)
INSTANCE_FORWARD = ("forward", "_old_forward", "_hf_hook")
"""What accelerate puts on a module to move its inputs, bound to the module and not to a copy."""
Change = Callable[[Any], Any]
"""From what stands at a path to what takes its place."""


def copied_with(module: nn.Module, changes: Mapping[str, Change]) -> Any:
    """Copy a module, with other things in the place of some of its submodules, parameters and buffers.

    Parameters
    ----------
    module : nn.Module
    changes : mapping
        By path from the module; a path that leads nowhere is left out.
    """
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy.__dict__.update({name: dict(module.__dict__[name]) for name in OWN})
    copy.__dict__.update({name: OrderedDict() for name in HOOKS})
    for name in INSTANCE_FORWARD:
        copy.__dict__.pop(name, None)
    below: dict[str, dict[str, Change]] = {}
    for path, change in changes.items():
        first, _, rest = path.partition(".")
        if rest:
            below.setdefault(first, {})[rest] = change
            continue
        for table in (copy.__dict__[name] for name in OWN):
            if table.get(first) is not None:
                table[first] = change(table[first])
    for name, inner in below.items():
        part = copy._modules.get(name)
        if part is not None:
            copy._modules[name] = copied_with(part, inner)
    return copy


def standing_in(module: nn.Module, forward: Callable[..., Any]) -> Any:
    """Copy a module that runs another forward; the model may still read its sizes and its dtype."""
    copy = copied_with(module, {})
    copy.__dict__["forward"] = forward
    return copy
