# SPDX-License-Identifier: Apache-2.0
"""What a run does at each stage: one method alone, or a chain of methods that act at different stages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from plphp.errors import ConfigError, UnsupportedFeatureError
from plphp.settings.config import PLPHPConfig

from . import fading_scores
from .allocation import keep_all
from .evidence import OwnBank
from .image_tokens import TowerEvidence
from .method import Method
from .rankers import at_random, per_head
from .stages import STAGES, AttentionStage, EncoderStage, KVStage, PrefillStage

StageT = TypeVar("StageT", EncoderStage, PrefillStage, AttentionStage, KVStage)

WHERE = {
    "encoder": "before the text model",
    "prefill": "inside prefill",
    "attention": "of prefill's attention",
    "kv": "of the KV cache",
}
"""Where the tokens of each stage leave, in words that complete a sentence."""
KEEP_WHAT_STAYED = KVStage(
    allocate=keep_all, score=per_head, evidence=fading_scores.evidence, fading_score=fading_scores.score
)
"""What happens to the KV cache where no method acts on it."""


@dataclass(frozen=True)
class Link(Generic[StageT]):
    """What one method does at one stage.

    Parameters
    ----------
    method : str
        Name of the method.
    stage : EncoderStage, PrefillStage, AttentionStage or KVStage
        What it does.
    config : PLPHPConfig
        Its settings.
    """

    method: str
    stage: StageT
    config: PLPHPConfig


@dataclass(frozen=True)
class Chain:
    """The links of a run; each hands on what it leaves to the next.

    Parameters
    ----------
    encoder : Link of EncoderStage, optional
        What leaves before the text model.
    prefill : Link of PrefillStage, optional
        What leaves inside prefill.
    attention : Link of AttentionStage, optional
        What attends while a layer reads the prompt.
    kv : Link of KVStage
        What leaves the KV cache; nothing where no method acts on it.
    """

    encoder: Link[EncoderStage] | None
    prefill: Link[PrefillStage] | None
    attention: Link[AttentionStage] | None
    kv: Link[KVStage]

    @classmethod
    def of(cls, methods: Sequence[tuple[Method, PLPHPConfig]]) -> Chain:
        """Put methods one behind the other.

        Parameters
        ----------
        methods : sequence of (Method, PLPHPConfig)
            At least one, in the order in which a prompt passes their stages.

        Raises
        ------
        ConfigError
            If two act at the same stage, or a later one acts at an earlier stage.
        """
        links: dict[str, Link[Any]] = {}
        methods = [(method, method.settled(config)) for method, config in methods]
        for method, config in methods:
            for name, stage in method.acting(config).items():
                _check_order(links, name, method.name)
                links[name] = Link(method.name, stage, config)
        last, config = methods[-1]
        return cls(
            links.get("encoder"),
            links.get("prefill"),
            links.get("attention"),
            links.get("kv") or Link(last.name, KEEP_WHAT_STAYED, config),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Chain:
        return self  # nothing in it changes, and copies of a cache are of the same methods

    @property
    def stages(self) -> dict[str, Link[Any]]:
        """The links by the name of their stage, without a KV stage that keeps everything that stayed."""
        links: dict[str, Link[Any] | None] = {name: getattr(self, name) for name in STAGES}
        return {name: link for name, link in links.items() if link is not None and link.stage is not KEEP_WHAT_STAYED}

    @property
    def acts_early(self) -> bool:
        """Whether tokens leave before layers get them: before the text model or inside prefill."""
        return self.encoder is not None or self.prefill is not None

    @property
    def draws(self) -> bool:
        """Whether chance has a part in what stays."""
        early = self.encoder is not None and self.encoder.stage.draws
        asked = any(link.stage.evidence(link.config).random_rows for link in self._links_with_evidence)
        return early or asked or self.kv.stage.score is at_random or self.kv.stage.mix(self.kv.config).random > 0

    @property
    def changes_prefill(self) -> list[Link[Any]]:
        """The links by which layers compute a prompt in another way than the model would: all but that of the KV
        cache."""
        return [link for link in (self.encoder, self.prefill, self.attention) if link is not None]

    @property
    def tower(self) -> TowerEvidence | None:
        """What the encoder stage wants to know of the vision tower."""
        return None if self.encoder is None else self.encoder.stage.tower(self.encoder.config)

    def refuse_all_but(self, supported: Iterable[str], engine: str) -> None:
        """Raise `UnsupportedFeatureError` for a link that an engine cannot do.

        Parameters
        ----------
        supported : iterable of str
            Stages that the engine runs, of `STAGES`.
        engine : str
            Its name, for the message.
        """
        for name, link in self.stages.items():
            if name not in supported:
                raise UnsupportedFeatureError(
                    f"The method {link.method!r} takes tokens out {WHERE[name]}, which {engine} has no place for: "
                    "choose one that prunes the KV cache after prefill, such as 'plphp'."
                )

    @property
    def own_bank(self) -> OwnBank | None:
        """The query bank that a link asks the engine to collect by itself, if any does.

        Raises
        ------
        ConfigError
            If two links ask for different ones.
        """
        own = self._own_banks()
        if len(set(own.values())) > 1:
            raise ConfigError(f"{' and '.join(own)} ask for different banks: give them one.")
        return next(iter(own.values()), None)

    def _own_banks(self) -> dict[str, OwnBank]:
        """The banks that links ask the engine to collect, by the names of their methods."""
        banks = {link.method: link.stage.evidence(link.config).bank for link in self._links_with_evidence}
        return {method: bank for method, bank in banks.items() if isinstance(bank, OwnBank)}

    @property
    def _links_with_evidence(self) -> list[Link[Any]]:
        """The links that look at the attention of layers."""
        return [link for link in (self.prefill, self.attention, self.kv) if link is not None]

    def refuse_uncollected(self, what: str) -> None:
        """Raise `UnsupportedFeatureError` for a method that collects its query bank, where nothing is collected.

        Parameters
        ----------
        what : str
            What cannot collect, to begin a sentence with.
        """
        if self.own_bank is not None:
            methods = " and ".join(self._own_banks())
            raise UnsupportedFeatureError(
                f"{what} cannot collect the query bank that {methods} has no file of: make it with plphp collect and "
                "give its file (bank=FILE), or let a session collect it (plphp.prune, plphp.apply, plphp generate)."
            )

    def refuse_unanswered(self) -> None:
        """Raise `UnsupportedFeatureError` for a method that scores by the answer, where there is none."""
        if self.kv.stage.needs_answer:
            raise UnsupportedFeatureError(
                f"The method {self.kv.method!r} ranks by the queries of the answer, which is not there yet: it is for "
                "plphp.branch(..., answer_ids=...) only."
            )


def _check_order(links: dict[str, Link[Any]], name: str, method: str) -> None:
    """Raise `ConfigError` unless every link so far is of an earlier stage than ``name``."""
    for earlier, link in links.items():
        if earlier == name:
            raise ConfigError(
                f"{link.method} and {method} both act at the {name} stage, and a run has one method at each stage: "
                "leave one of them out."
            )
        if STAGES.index(earlier) > STAGES.index(name):
            raise ConfigError(
                f"{method} acts at the {name} stage, before {link.method} at the {earlier} stage: name them in the "
                f"order in which a prompt passes them, {', '.join(STAGES)}."
            )
