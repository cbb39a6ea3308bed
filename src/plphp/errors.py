# SPDX-License-Identifier: Apache-2.0
"""The exceptions of plphp.

::

    PLPHPError
    ├── ConfigError(ValueError)              a setting is out of range, unknown or contradicts another
    ├── SpanError(ValueError)                the vision tokens cannot be found or do not match the features
    ├── HistoryError(ValueError)             a later turn does not go on from what the cache has read
    ├── UnsupportedModelError                this model class cannot be pruned rightly
    ├── UnsupportedFeatureError              this use of a supported model cannot be pruned rightly
    ├── BackendUnavailableError              an optional dependency or device is missing
    ├── LoadError(OSError)                   a model, an image, a video or a chat cannot be read
    ├── CacheStateError(RuntimeError)        the cache cannot be used any more, or not in this way
    ├── CacheMemoryError(MemoryError)        there is no memory for the keys and values of more tokens
    └── NonFiniteAttentionError(ArithmeticError)   no row of a batch has finite attention

and a warning, ``UnprunedWarning(UserWarning)``: a model ran inside a session without plphp.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PLPHPError(Exception):
    """Base of every error that plphp raises on purpose."""


class ConfigError(PLPHPError, ValueError):
    """A setting is out of range, unknown, or contradicts another one."""


class SpanError(PLPHPError, ValueError):
    """The vision tokens of a prompt cannot be found, or do not match its image features."""


class HistoryError(PLPHPError, ValueError):
    """A conversation differs from what the cache has read of it."""


class UnsupportedModelError(PLPHPError):
    """The model class cannot be pruned rightly."""


class UnsupportedFeatureError(PLPHPError):
    """A supported model is used in a way that cannot be pruned rightly."""


class BackendUnavailableError(PLPHPError):
    """An optional dependency or a device is missing."""


class LoadError(PLPHPError, OSError):
    """A model, an image, a video or a chat cannot be read."""


class CacheStateError(PLPHPError, RuntimeError):
    """A cache was left half-updated by an earlier failure, or is used outside its session."""


class CacheMemoryError(PLPHPError, MemoryError):
    """There is no memory for the keys and values of more tokens."""


class NonFiniteAttentionError(PLPHPError, ArithmeticError):
    """The attention of every row is NaN or inf, or the image features of the only row are: nothing can be ranked."""


class UnprunedWarning(UserWarning):
    """A model ran inside a session without plphp, so with its whole cache."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest known name, or the list of all of them.

    Parameters
    ----------
    given : str
        What the user wrote.
    known : iterable of str
        The names that exist.
    """
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(names)}."
