# SPDX-License-Identifier: Apache-2.0
"""A table of named objects: those of a package's own files, those of installed packages, and registered ones."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, Generic, Protocol, TypeVar

from plphp.errors import ConfigError
from plphp.io.quoting import one_line


class Named(Protocol):
    """What a table holds: an object that knows its name."""

    @property
    def name(self) -> str:
        """The name by which it is looked up."""
        ...


Item = TypeVar("Item", bound=Named)


class Plugins(Generic[Item]):
    """Objects of one kind by name; a later source wins: built in, then installed, then registered.

    Nothing is imported before the objects are asked for.

    Parameters
    ----------
    kind : type
        Class of the objects.
    package : module
        Package whose modules hold the built-in ones.
    attribute : str
        Name under which a module holds its object; in the plural, with an "S" behind it or "IES" in the place of "Y",
        a tuple of several.
    group : str
        Entry point group in which installed packages name theirs.
    helpers : tuple of str
        Modules of the package that hold no object.
    """

    def __init__(
        self, kind: type[Item], package: ModuleType, attribute: str, group: str, helpers: tuple[str, ...]
    ) -> None:
        self.kind, self.package, self.attribute, self.group = kind, package, attribute, group
        self.helpers = helpers
        self.registered: dict[str, Item] = {}
        self._discovered: dict[str, Item] | None = None

    def register(self, item: Item, replace: bool) -> None:
        """Make an object known by its name.

        Raises
        ------
        ConfigError
            If it is of another kind, or its name is taken and ``replace`` is False.
        """
        if not isinstance(item, self.kind):
            raise ConfigError(f"Expected a {self.kind.__name__}, got {item!r}.")
        if not replace and item.name in self.available():
            raise ConfigError(f"The name {item.name!r} is taken; pass replace=True to take its place.")
        self.registered[item.name] = item

    def available(self) -> dict[str, Item]:
        """All objects by name, registered ones last."""
        if self._discovered is None:
            self._discovered = {item.name: item for item in [*self._built_in(), *self._installed()]}
        return {**self._discovered, **self.registered}

    def names(self) -> list[str]:
        """Names for a shell to complete: no package is imported, and installed objects go by their entry points."""
        return sorted({*self.file_names(), *self.registered, *(entry.name for entry in entry_points(group=self.group))})

    def file_names(self) -> list[str]:
        """Names of the package's modules that may hold an object, none of which is imported."""
        modules = (module.name for module in pkgutil.iter_modules(self.package.__path__))
        return [name for name in modules if name not in self.helpers and not name.startswith("_")]

    def forget_discovered(self) -> None:
        """Look for built-in and installed objects again when they are next asked for."""
        self._discovered = None

    def _built_in(self) -> list[Item]:
        several = f"{self.attribute[:-1]}IES" if self.attribute.endswith("Y") else f"{self.attribute}S"
        items: list[Item] = []
        for name in self.file_names():
            content = importlib.import_module(f"{self.package.__name__}.{name}")
            items += [getattr(content, self.attribute)] if hasattr(content, self.attribute) else []
            items += getattr(content, several, ())
        return items

    def _installed(self) -> list[Item]:
        items: list[Item] = []
        for entry in entry_points(group=self.group):
            item = self._loaded(entry)
            if not isinstance(item, self.kind):
                raise ConfigError(f"The entry point {entry.value!r} of {self.group} is not a {self.kind.__name__}.")
            items.append(item)
        return items

    def _loaded(self, entry: Any) -> object:
        try:
            return entry.load()
        except Exception as error:  # a package can fail in any way
            raise ConfigError(
                f"The entry point {entry.value!r} of {self.group} cannot be loaded: {type(error).__name__}: "
                f"{one_line(error)}. Repair or uninstall its package."
            ) from error
