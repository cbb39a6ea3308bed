# SPDX-License-Identifier: Apache-2.0
"""Methods and model families by name: the built-in ones, registered ones, and those of installed packages.

A package adds its own with the entry point groups ``plphp.methods`` and ``plphp.families``, each entry naming a
`Method` or a `Family` object.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from plphp.errors import ConfigError, UnsupportedModelError, did_you_mean
from plphp.families.base import Family
from plphp.families.unsupported import reason_against
from plphp.io.quoting import one_line
from plphp.methods.base import Method
from plphp.settings.config import SETTINGS, PLPHPConfig
from plphp.settings.options import check_options

from . import families as families_package
from . import methods as methods_package

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_methods: dict[str, Method] = {}
_families: dict[str, Family] = {}


def register_method(method: Method, *, replace: bool = False) -> None:
    """Make a method known by its name.

    Parameters
    ----------
    method : Method
        The method.
    replace : bool
        Allow to take the place of a method of the same name.

    Raises
    ------
    ConfigError
        If it is not a `Method`, or its name is taken.
    """
    _add(_methods, _builtin_methods(), method.name if isinstance(method, Method) else "", method, Method, replace)


def register_family(family: Family, *, replace: bool = False) -> None:
    """Make a model family known by its name and its model types.

    Raises
    ------
    ConfigError
        If it is not a `Family`, or its name is taken.
    """
    _add(_families, _builtin_families(), family.name if isinstance(family, Family) else "", family, Family, replace)


def available_methods() -> dict[str, Method]:
    """All methods by name."""
    return {**_builtin_methods(), **_methods}


def builtin_method_names() -> list[str]:
    """Names of the methods that plphp brings: those of their files, none of which is imported."""
    names = (module.name for module in pkgutil.iter_modules(methods_package.__path__))
    return [name for name in names if name != "base" and not name.startswith("_")]


def method_names() -> list[str]:
    """Names of all methods for a shell to complete: packages are not imported, and go by their entry points' names."""
    installed = [entry.name for entry in entry_points(group="plphp.methods")]
    return sorted({*builtin_method_names(), *_methods, *installed})


def available_families() -> dict[str, Family]:
    """All model families by name."""
    return {**_builtin_families(), **_families}


def get_method(name: str) -> Method:
    """The method of a name.

    Raises
    ------
    ConfigError
        If there is none.
    """
    known = available_methods()
    if name not in known:
        raise ConfigError(f"Unknown method {name!r}.{did_you_mean(name, known)}")
    return known[name]


def resolve(config: PLPHPConfig) -> Method:
    """The method of a config.

    Raises
    ------
    ConfigError
        If there is none of that name, or the config's options are not those of the method.
    """
    method = get_method(config.method)
    check_options(method.name, method.options, config.options, SETTINGS)
    return method


def family_of(config: PretrainedConfig) -> Family:
    """The family that a model's config belongs to.

    Raises
    ------
    UnsupportedModelError
        If the model cannot be pruned rightly, with the reason, or is not known.
    """
    model_type = getattr(config, "model_type", type(config).__name__)
    reason = reason_against(config)
    if reason is not None:
        raise UnsupportedModelError(f"plphp does not prune this {model_type!r} model: {reason}")
    # Registered families come last and win, so that a user can correct a built-in one.
    found = [family for family in available_families().values() if model_type in family.model_types]
    if found:
        return found[-1]
    known = [name for family in available_families().values() for name in family.model_types]
    raise UnsupportedModelError(
        f"plphp does not know {model_type!r} models.{did_you_mean(model_type, known)} A new family is one "
        "small object: see plphp.register_family and docs/extending.md."
    )


def _add(table: dict[str, Any], builtin: dict[str, Any], name: str, item: Any, kind: type, replace: bool) -> None:
    if not isinstance(item, kind):
        raise ConfigError(f"Expected a {kind.__name__}, got {item!r}.")
    if not replace and (name in table or name in builtin):
        raise ConfigError(f"The name {name!r} is taken; pass replace=True to take its place.")
    table[name] = item


@cache
def _builtin_methods() -> dict[str, Method]:
    return _discover(methods_package, "METHOD", Method, "plphp.methods")


@cache
def _builtin_families() -> dict[str, Family]:
    return _discover(families_package, "FAMILY", Family, "plphp.families")


def _discover(package: Any, attribute: str, kind: type, group: str) -> dict[str, Any]:
    """Objects ``METHOD`` / ``FAMILY`` / ``FAMILIES`` of the package's modules, then those of installed packages."""
    found: list[Any] = []
    for module in pkgutil.iter_modules(package.__path__):
        content = importlib.import_module(f"{package.__name__}.{module.name}")
        found += [getattr(content, attribute)] if hasattr(content, attribute) else []
        found += list(getattr(content, "FAMILIES", ())) if attribute == "FAMILY" else []
    for entry in entry_points(group=group):
        try:
            item = entry.load()
        except Exception as error:  # a package can fail in any way
            raise ConfigError(
                f"The entry point {entry.value!r} of {group} cannot be loaded: {type(error).__name__}: "
                f"{one_line(error)}. Repair or uninstall its package."
            ) from error
        if not isinstance(item, kind):
            raise ConfigError(f"The entry point {entry.value!r} of {group} is not a {kind.__name__}.")
        found.append(item)
    return {item.name: item for item in found}
