# SPDX-License-Identifier: Apache-2.0
"""The query bank that a session collects by itself, from the first answers, which are not pruned."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from plphp.errors import UnsupportedFeatureError, UnsupportedModelError
from plphp.inputs.weight_values import kept_weights_values_hash
from plphp.inputs.weights import kept_weights_hash
from plphp.policy.bank import VALUES_HASH, QueryBank
from plphp.policy.bank_folder import BankModel
from plphp.policy.evidence import OwnBank
from plphp.pruning.own_bank import BankCollection

from .answer_queries import AnswerQueries
from .attachment import Attachment
from .cache import PrunedCache
from .contexts import Session
from .generate_call import GenerateCall
from .generation import generate
from .rotation_probe import rotations_of


class SessionBank:
    """The bank of one session. Threads may share it.

    Parameters
    ----------
    model : PreTrainedModel
        The model that answers. With a folder its weights are hashed now, see
        `plphp.inputs.weights.kept_weights_hash`: the first session reads them all.
    wanted : OwnBank
        What the method asks for.

    Raises
    ------
    ConfigError
        If the folder or the file in it cannot be used.
    """

    def __init__(self, model: PreTrainedModel, wanted: OwnBank) -> None:
        self.collection = BankCollection(wanted, bank_model(model, hashed=bool(wanted.folder)), model.device)
        self._checked: QueryBank | None = None

    def newest(self) -> QueryBank | None:
        """The bank, if it is complete by now, here or in another process that shares the folder."""
        self.collection.refresh()
        return self.collection.bank

    def ready(self, attachment: Attachment) -> QueryBank | None:
        """The complete bank, once it is known that the model turns its queries as the bank says.

        Raises
        ------
        ConfigError
            If it does not.
        """
        bank = self.newest()
        if bank is not None and bank is not self._checked:
            bank.check_rotations(rotations_of(attachment))
            self._checked = bank
        return bank

    def answer(self, attachment: Attachment, call: GenerateCall, session: Session) -> Any:
        """Run a call of ``generate`` with nothing evicted, and collect from its answers once it has come to its end.

        Under a ``vision_budget`` the images of its prompt fade only then; in later turns of this conversation as under
        the method ``none``.

        Decoding runs step by step, whatever the session asks for: a CUDA graph replays without anyone who listens.
        A warning comes before the prompt is read, whose full cache may not fit into memory.

        Raises
        ------
        UnsupportedFeatureError
            If it asks for beams.
        UnsupportedModelError
            If it is not known how the model rotates its queries.
        """
        _refuse_beams(call.config)
        cache = PrunedCache(attachment, session.config, before_whole=self.collection.warn_unpruned)
        rotations = rotations_of(attachment)
        session.note(None)
        heard = AnswerQueries(cache)
        with cache.fading_later(), cache.listening(heard):
            output = generate(cache, call)
        answers = heard.answers(output, call.config, rotations)
        about = partial(values_record, attachment.model)
        cache.collecting = self.collection.add(answers, rotations, heard.entries(), about)
        session.note(cache.report_later())
        return output


def bank_model(model: PreTrainedModel, *, hashed: bool) -> BankModel:
    """What a bank says of the model that it is of, with the hash of the weights where a folder is to keep it."""
    return BankModel(
        model.config.model_type,
        model.config.get_text_config(decoder=True).num_hidden_layers,
        kept_weights_hash(model) if hashed else "",
    )


def values_record(model: PreTrainedModel) -> dict[str, str]:
    """What a bank says of the weights that wrote it, JSON-ready; nothing where they have no hash."""
    try:
        return {VALUES_HASH: kept_weights_values_hash(model)}
    except UnsupportedModelError:
        return {}


def _refuse_beams(config: GenerationConfig) -> None:
    if (config.num_beams or 1) > 1:
        raise UnsupportedFeatureError(
            "There is no query bank yet, and beams cannot collect one, as an answer is put together from several of "
            "them: answer the first prompts with num_beams=1, or collect a bank with plphp collect and give its file "
            "(bank=FILE)."
        )
