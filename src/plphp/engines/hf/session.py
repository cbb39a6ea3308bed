# SPDX-License-Identifier: Apache-2.0
"""Sessions: prune whatever a model generates, within a block or until `remove`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from plphp.errors import CacheStateError, UnprunedWarning, UnsupportedFeatureError, UnsupportedModelError
from plphp.families.registry import family_of
from plphp.methods.registry import chain_of
from plphp.policy.bank import QueryBank
from plphp.pruning.report import PruneReport
from plphp.settings.config import PLPHPConfig, checked, checked_mode

from .attachment import Lease
from .cache import PrunedCache
from .cache_argument import NAME
from .generate_call import GenerateCall
from .own_bank import SessionBank
from .unwrapping import unwrapped

APPLIED = "_plphp_applied"
"""Attribute in which a model holds the session of `apply`; nothing else does, so that it goes when the model goes."""
WHY_UNPRUNED = (
    "generate was taken from the model, or compiled, before the session, or called as type(model).generate(model, "
    f"...), or the model was called directly. Call model.generate inside the session, or pass {NAME}="
    "plphp.PrunedCache.for_inputs(model, inputs)."
)


class Session:
    """An open session on a model; `prune` and `apply` return one.

    Attributes
    ----------
    config : PLPHPConfig
        Settings of the caches that ``generate`` makes.
    decode : str
        How decoding steps run with these caches, see `prune`.
    closed : bool
        Whether the session is over.
    """

    def __init__(self, model: Any, config: PLPHPConfig | None, decode: str = "eager") -> None:
        self.config, self.decode = checked(config), checked_mode(decode)
        wanted = chain_of(self.config).own_bank
        self.closed = False
        self._report: Callable[[], PruneReport] | None = None
        # Passes without plphp in the whole session, and since the newest report.
        self._unpruned = 0
        self._unpruned_since = 0
        _refuse_without_generate(model)
        self._own_bank = None if wanted is None else SessionBank(unwrapped(model), wanted)
        self._lease = Lease.of(model)

    @property
    def bank(self) -> QueryBank | None:
        """The query bank that the session has collected; None while it is not complete, or if the method needs none.

        Its ``save`` writes a file for the option ``bank``, which prunes in the same way.
        """
        return None if self._own_bank is None else self._own_bank.newest()

    @property
    def report(self) -> PruneReport:
        """What the newest ``generate`` kept.

        Raises
        ------
        CacheStateError
            If ``generate`` has not run, or the model ran without plphp since.
        """
        if self._report is not None and not self._unpruned_since:
            return self._report()
        if self._unpruned_since:
            raise CacheStateError(f"There is no report: {self._what_ran()} {WHY_UNPRUNED}")
        raise CacheStateError(
            "There is no report: no model.generate of this session has come to its end. If you called it, "
            + WHY_UNPRUNED
        )

    def note(self, report: Callable[[], PruneReport] | None) -> None:
        """Keep what gives the report of a finished ``generate``; None while one is running."""
        self._report, self._unpruned_since = report, 0

    def run_generate(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``generate`` with a new `PrunedCache`; unpruned as long as the method's own query bank is not complete.

        Raises
        ------
        UnsupportedFeatureError
            If the call names another cache, or asks for something else that cannot be pruned rightly.
        """
        attachment = self._lease.attachment
        call = GenerateCall.of(attachment.model, original, args, kwargs)
        if call.cache is not None:
            raise UnsupportedFeatureError(
                f"Inside a plphp session the cache must be a PrunedCache, got {call.cache_name}="
                f"{type(call.cache).__name__}: static, quantized, offloaded and plain dynamic caches cannot hold "
                "ragged entries. Leave it out, or call generate outside the session."
            )
        own_bank = None if self._own_bank is None else self._own_bank.ready(attachment)
        if self._own_bank is not None and own_bank is None:
            return self._own_bank.answer(attachment, call, self)
        return PrunedCache(attachment, self.config, self.decode, own_bank=own_bank).answer(call, self)

    def note_unpruned(self) -> None:
        """Count a pass of the model that no `PrunedCache` took part in."""
        self._unpruned += 1
        self._unpruned_since += 1

    def close(self) -> None:
        """End the session; the model is restored when nothing else uses plphp on it."""
        self.closed = True
        self._lease.attachment.sessions.close(self)
        self._lease.end()  # not left to the garbage collector: a user may keep the session for its report

    def warn_unpruned(self, frames: int) -> None:
        """Warn, at the caller so many frames above, if the model ran inside the session without plphp."""
        if self._unpruned:
            text = f"In a plphp session {self._what_ran()} {WHY_UNPRUNED}"
            warnings.warn(text, UnprunedWarning, stacklevel=frames + 1)

    def _what_ran(self) -> str:
        return f"the model ran without plphp ({self._unpruned} passes, with the whole cache)."


def _refuse_without_generate(model: Any) -> None:
    """Raise for a part of a model, whose owner's ``generate`` a session on the part would not see."""
    inner = unwrapped(model)
    family_of(inner.config)
    if not inner.can_generate():
        raise UnsupportedModelError(
            f"{type(inner).__name__} has no generate to prune: pass the model that holds it and whose generate you "
            "call, a ...ForConditionalGeneration."
        )


@contextmanager
def prune(model: Any, config: PLPHPConfig | None = None, *, decode: str = "eager") -> Iterator[Session]:
    """Prune whatever the model generates inside the block.

    Sessions may be nested, the innermost counts. A session belongs to the context (`contextvars`) that opens it:
    coroutines and threads that share a model open one each. A thread that is started inside a session joins it, so that
    ``generate`` may run in a thread beside a streamer, as long as it is the only session on the model; calls whose
    session is unclear are refused, see `plphp.engines.hf.contexts`.

    Parameters
    ----------
    model : PreTrainedModel
        A supported vision-language model, in evaluation mode, or what `torch.compile`, ``DataParallel`` or PEFT (LoRA)
        made of such a model.
    config : PLPHPConfig, optional
        Default: every vision entry in 3 bits, ``quantized:tiers=c3``.
    decode : {"eager", "auto", "graph"}
        Replay decoding steps from a CUDA graph ("graph"), where that is possible and pays ("auto"), or never.

    Yields
    ------
    Session
        Its ``report`` tells what the newest ``generate`` kept.

    Raises
    ------
    UnsupportedModelError, UnsupportedFeatureError, ConfigError

    Warns
    -----
    UnprunedWarning
        At the end, if the model ran in the block without plphp.

    Examples
    --------
    >>> with plphp.prune(model, plphp.PLPHPConfig(retention_rate=0.4)) as run:  # doctest: +SKIP
    ...     output = model.generate(**inputs, max_new_tokens=100)
    >>> run.report.kv_reduction  # doctest: +SKIP
    """
    session = Session(model, config, decode)
    session._lease.attachment.sessions.open(session)
    try:
        yield session
    finally:
        session.close()
    session.warn_unpruned(3)  # this generator, and what contextlib does at its end


def apply(model: Any, config: PLPHPConfig | None = None, *, decode: str = "eager") -> Session:
    """Prune whatever the model generates from now on, for every caller, until `remove`; pipelines work unchanged.

    A second ``apply`` on a model takes the place of the first.

    Parameters
    ----------
    model : PreTrainedModel
        A supported vision-language model, or a wrapper as for `prune`.
    config : PLPHPConfig, optional
        Default: every vision entry in 3 bits, ``quantized:tiers=c3``.
    decode : {"eager", "auto", "graph"}
        As for `prune`.

    Returns
    -------
    Session
        Its ``report`` tells what the newest ``generate`` kept.
    """
    session = Session(model, config, decode)
    sessions = session._lease.attachment.sessions
    # The new session holds its lease by now, so that closing the previous one does not detach the model in between.
    previous, sessions.applied = sessions.applied, session
    unwrapped(model).__dict__[APPLIED] = session
    if previous is not None:
        previous.close()
        previous.warn_unpruned(2)
    return session


def remove(model: Any) -> None:
    """Undo `apply`; does nothing on a model where nothing was applied.

    Parameters
    ----------
    model : PreTrainedModel
        The model, or a wrapper as for `prune`.

    Raises
    ------
    UnsupportedModelError
        If there is no model in it.

    Warns
    -----
    UnprunedWarning
        If the model ran meanwhile without plphp.
    """
    _refuse_without_generate(model)
    session = unwrapped(model).__dict__.pop(APPLIED, None)
    if session is not None:
        session._lease.attachment.sessions.applied = None
        session.close()
        session.warn_unpruned(2)
