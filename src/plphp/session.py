# SPDX-License-Identifier: Apache-2.0
"""Sessions: prune whatever a model generates, within a block or until told otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from .attachment import ATTRIBUTE, Lease
from .config import PLPHPConfig, checked, checked_mode
from .errors import CacheStateError
from .registry import resolve
from .report import PruneReport


class Session:
    """An open session on a model; `prune` and `apply` return one.

    Attributes
    ----------
    config : PLPHPConfig
        Settings of the caches that ``generate`` makes.
    decode : str
        How they are decoded with.
    """

    def __init__(self, model: PreTrainedModel, config: PLPHPConfig | None, decode: str = "eager") -> None:
        self.config, self.decode = checked(config), checked_mode(decode)
        resolve(self.config)
        self._report: PruneReport | None = None
        self._lease = Lease.of(model)
        self._lease.attachment.open(self)

    @property
    def report(self) -> PruneReport:
        """What the newest ``generate`` kept.

        Raises
        ------
        CacheStateError
            If ``generate`` has not run.
        """
        if self._report is None:
            raise CacheStateError("There is no report yet: call model.generate inside the session first.")
        return self._report

    def note(self, report: PruneReport | None) -> None:
        """Keep the report of a finished ``generate``; None while one is running."""
        self._report = report

    def close(self) -> None:
        """End the session; the model is restored when nothing else uses plphp on it."""
        self._lease.attachment.close(self)
        self._lease.end()


@contextmanager
def prune(model: PreTrainedModel, config: PLPHPConfig | None = None, *, decode: str = "eager") -> Iterator[Session]:
    """Prune whatever the model generates inside the block.

    Sessions may be nested, the innermost counts. A thread that has no session of its own uses the newest one of any
    thread, so that ``generate`` may run in a thread beside a streamer: threads that share a model open one each.

    Parameters
    ----------
    model : PreTrainedModel
        A supported vision-language model, in evaluation mode.
    config : PLPHPConfig, optional
        Default: ``PLPHPConfig()``.
    decode : {"eager", "auto", "graph"}
        Replay decoding steps from a CUDA graph ("graph"), where that is possible and pays ("auto"), or never.

    Yields
    ------
    Session
        Its ``report`` tells what the newest ``generate`` kept.

    Raises
    ------
    UnsupportedModelError, UnsupportedFeatureError, ConfigError

    Examples
    --------
    >>> with plphp.prune(model, plphp.PLPHPConfig(retention_rate=0.4)) as run:  # doctest: +SKIP
    ...     output = model.generate(**inputs, max_new_tokens=100)
    >>> run.report.kv_reduction  # doctest: +SKIP
    """
    session = Session(model, config, decode)
    try:
        yield session
    finally:
        session.close()


def apply(model: PreTrainedModel, config: PLPHPConfig | None = None, *, decode: str = "eager") -> Session:
    """Prune whatever the model generates from now on, until `remove`; pipelines work unchanged.

    A second ``apply`` takes the place of the first.

    Parameters
    ----------
    model : PreTrainedModel
        A supported vision-language model.
    config : PLPHPConfig, optional
        Default: ``PLPHPConfig()``.
    decode : {"eager", "auto", "graph"}
        As for `prune`.

    Returns
    -------
    Session
        Its ``report`` tells what the newest ``generate`` kept.
    """
    session = Session(model, config, decode)
    attachment = session._lease.attachment
    previous, attachment.applied = attachment.applied, session
    if previous is not None:
        previous.close()
    return session


def remove(model: PreTrainedModel) -> None:
    """Undo `apply`; does nothing where nothing was applied."""
    attachment = model.__dict__.get(ATTRIBUTE)
    if attachment is not None and attachment.applied is not None:
        session, attachment.applied = attachment.applied, None
        session.close()
