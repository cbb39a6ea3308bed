# SPDX-License-Identifier: Apache-2.0
"""Methods by name, and the method of a config.

A package adds its own with the entry point group ``plphp.methods``, each entry naming a `Method`.
"""

from __future__ import annotations

import dataclasses

from plphp import methods
from plphp.errors import ConfigError, did_you_mean
from plphp.plugins import Plugins
from plphp.policy.chain import Chain
from plphp.policy.method import Method
from plphp.policy.stages import STAGES
from plphp.settings.calibrated import warn_if_calibrated_elsewhere
from plphp.settings.config import SETTINGS, PLPHPConfig
from plphp.settings.ladder import quoting_hint
from plphp.settings.options import check_options

from ._tiers import check_books, refuse_tiers
from ._unused import refuse_idle

METHODS_BY_NAME = Plugins(Method, methods, "METHOD", "plphp.methods", helpers=("registry",))


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
    METHODS_BY_NAME.register(method, replace)


def available_methods() -> dict[str, Method]:
    """All methods by name."""
    return METHODS_BY_NAME.available()


def methods_by_stage() -> list[Method]:
    """All methods, in the order in which a prompt passes the first of their stages, and by name."""
    return sorted(available_methods().values(), key=lambda method: STAGES.index(next(iter(method.stages))))


def get_method(name: str) -> Method:
    """The method of a name.

    Raises
    ------
    ConfigError
        If there is none.
    """
    known = available_methods()
    if name not in known:
        chain = " Chains of methods are for --config and PLPHPConfig.parse." if "+" in name else ""
        raise ConfigError(f"Unknown method {name!r}.{chain or quoting_hint(name) or did_you_mean(name, known)}")
    return known[name]


def resolve(config: PLPHPConfig) -> Method:
    """The method of a config.

    Raises
    ------
    ConfigError
        If there is none of that name, the config's options are not those of the method, or it asks for ragged heads
        where the scores of the method say nothing of heads, for a quota of each image where text competes, for tiers
        that there are not or that the method cannot fill, or has settings of classes or heads that nothing looks at.
    """
    method = get_method(config.method)
    check_options(method.name, method.options, config.options, SETTINGS)
    if config.heads == "ragged" and (method.kv is None or not method.kv.heads_compare):
        raise ConfigError(
            f"The method {method.name!r} has no scores by which KV heads could compete: leave out heads='ragged'."
        )
    text_competes = method.kv is not None and method.kv.evidence(config).candidates == "prompt"
    if config.image_quota == "per_image" and text_competes:
        raise ConfigError(
            f"The method {method.name!r} ranks text and images together, and text has no image whose quota it could "
            "count for: leave out image_quota='per_image', or take a method that keeps all text."
        )
    settled = method.settled(config)
    refuse_tiers(method, settled)
    refuse_idle(method, settled)
    return method


def settled(config: PLPHPConfig) -> PLPHPConfig:
    """The same settings as a run takes them: with the ladders that methods of the chain have of their own.

    Raises
    ------
    ConfigError
        See `plphp.policy.method.Method.settled`.
    """
    own = get_method(config.method).settled(config)
    return dataclasses.replace(own, earlier=tuple(settled(part) for part in config.earlier))


def chain_of(config: PLPHPConfig, layers: int | None = None) -> Chain:
    """What a run with a config does at each stage.

    Parameters
    ----------
    config : PLPHPConfig
        With those before it in a chain.
    layers : int, optional
        Decoder layers of the model that all settings have to fit; None where it is not known yet.

    Raises
    ------
    ConfigError
        If a config names a method, a layer, an option or a rate that cannot be, or two methods act at the same stage.
    """
    parts = (*config.earlier, config)
    methods = [resolve(part) if layers is None else _method_for(part, layers) for part in parts]
    return Chain.of(list(zip(methods, parts, strict=True)))


def with_bank(config: PLPHPConfig, file: str) -> PLPHPConfig:
    """The same settings, with the query bank of a file in the place of one that the engine would collect.

    Parameters
    ----------
    config : PLPHPConfig
        With those before it in a chain.
    file : str
        The file, for all methods of the chain that ask for a bank of their own.

    Raises
    ------
    ConfigError
        If a method of the chain has no setting for it, see `plphp.policy.method.Method.with_bank`.
    """
    earlier = tuple(_by_file(part, file) for part in config.earlier)
    return dataclasses.replace(_by_file(config, file), earlier=earlier)


def _by_file(config: PLPHPConfig, file: str) -> PLPHPConfig:
    method = resolve(config)
    if Chain.of([(method, config)]).own_bank is None:
        return config
    if method.with_bank is None:
        raise ConfigError(f"The method {method.name!r} collects its query bank and takes none from a file.")
    return method.with_bank(config, file)


def _method_for(config: PLPHPConfig, layers: int) -> Method:
    for layer in config.exempt_layers:
        if not -layers <= layer < layers:
            raise ConfigError(f"exempt_layers names layer {layer}, but the model has the layers 0 to {layers - 1}.")
    warn_if_calibrated_elsewhere(config, layers)
    method = resolve(config)
    settled = method.settled(config)
    method.check(settled, layers)
    check_books(method, settled, layers)
    return method
