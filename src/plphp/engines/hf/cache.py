# SPDX-License-Identifier: Apache-2.0
"""`PrunedCache`: a transformers cache whose vision entries are evicted per layer and per KV head."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache as cached
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from plphp.errors import SpanError, UnsupportedFeatureError
from plphp.families.spans import VisionSpans
from plphp.kernels.precision import as_written
from plphp.methods.registry import chain_of, settled
from plphp.policy.bank import QueryBank
from plphp.pruning import too_large
from plphp.pruning.fading import Fading, fading_as
from plphp.pruning.finite import features_of
from plphp.pruning.held_state import HeldState
from plphp.pruning.leaving import Leaving
from plphp.pruning.live_bytes import books_nbytes
from plphp.pruning.packing import Packing
from plphp.pruning.reading import PromptReading
from plphp.pruning.record import LayerRecord
from plphp.pruning.report import BankProgress, PruneReport
from plphp.pruning.scoring import Attended
from plphp.settings.config import PLPHPConfig, checked, checked_mode

from .attachment import Attachment, Lease
from .contexts import Session
from .generate_call import GenerateCall
from .generation import generate
from .layer import held_bytes
from .memory_cache import MemoryCache
from .refusals import refuse_stages
from .rotation_probe import rotations_of
from .tower_watch import TowerWatch

NOTHING_EVICTED = PLPHPConfig(method="none")


class PrunedCache(MemoryCache):
    """KV cache from which vision tokens are evicted as soon as a layer has read the prompt.

    Make it with `for_inputs` or let `plphp.prune` make it. Full-attention layers are pruned; sliding-window and
    linear-attention layers hold what transformers' own ``DynamicCache`` holds for them.

    See Also
    --------
    plphp.prune : the same as a context manager.
    """

    def __init__(
        self,
        attachment: Attachment,
        config: PLPHPConfig,
        decode: str = "eager",
        *,
        own_bank: QueryBank | None = None,
        before_whole: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(attachment)
        self.config, self.decode = config, checked_mode(decode)
        self.chain = chain_of(config, len(self.layers))
        self.chain.refuse_unanswered()
        refuse_stages(self.chain, attachment.model, own_bank)
        if self.chain.acts_early:
            attachment.pack_layers()
        self._own_bank = own_bank
        self.collecting: BankProgress | None = None
        """Where the answer is not pruned as its queries are collected for a bank: how far the bank is then."""
        self._before_whole = before_whole
        if before_whole is not None:
            # Only now: what the model cannot do is refused by the first prompt.
            self.chain = chain_of(fading_as(NOTHING_EVICTED, config))
        elif own_bank is None:
            self.chain.refuse_uncollected("A PrunedCache")
        self.fading = Fading.of(self.chain.kv, own_bank)
        self.records: list[LayerRecord] = []
        self._listeners: list[Callable[[Attended], None]] = []
        self._by_mask = False  # whether the caller named the vision tokens of the plan with a mask

    @classmethod
    def for_inputs(
        cls,
        model: PreTrainedModel,
        inputs: Mapping[str, Any],
        config: PLPHPConfig | None = None,
        *,
        vision_mask: Tensor | None = None,
        decode: str = "eager",
    ) -> PrunedCache:
        """Make a cache for one batch of prompts.

        While the cache is alive the model's text layers use plphp's attention function, which treats every other
        cache as before; when it is freed the model is as it was.

        Parameters
        ----------
        model : PreTrainedModel
            A supported vision-language model.
        inputs : mapping
            What is passed to ``generate`` or to the model: ``input_ids``, ``attention_mask``, image features.
        config : PLPHPConfig, optional
            Default: every vision entry in 3 bits, ``quantized:tiers=c3``.
        vision_mask : Tensor, optional
            bool [batch, seq]; the vision tokens, if they cannot be found from ``input_ids``.
        decode : {"eager", "auto", "graph"}
            How ``generate`` runs decoding steps, see `plphp.prune`.

        Returns
        -------
        PrunedCache
            Pass it as ``past_key_values``, from transformers 5.24 on as ``cache``
            (`plphp.engines.hf.cache_argument.passed`).

        Raises
        ------
        UnsupportedModelError, UnsupportedFeatureError, ConfigError, SpanError
        """
        lease = Lease.of(model)
        try:
            cache = cls(lease.attachment, checked(config), decode)
            cache._lease = lease
            cache.plan(inputs, vision_mask=vision_mask)
        except BaseException:
            # The traceback holds this frame, so the model would stay attached as long as the error is kept.
            lease.end()
            raise
        return cache

    def plan(self, inputs: Mapping[str, Any], *, vision_mask: Tensor | None = None) -> dict[str, Any]:
        """Announce the next prompt, so that its vision tokens are pruned at its end.

        ``generate`` calls it by itself; call it before a later turn that is given to ``model(...)`` directly.

        Parameters
        ----------
        inputs : mapping
            As for `for_inputs`; for a later turn the whole conversation, with all of its images or the new ones alone.
        vision_mask : Tensor, optional
            bool [batch, seq] over the whole conversation.

        Returns
        -------
        dict
            The inputs with the features of new images alone; `model_inputs` makes of them what ``model(...)`` reads.

        Raises
        ------
        SpanError
            If the vision tokens cannot be found.
        HistoryError
            If the conversation differs from what the cache has read.
        NonFiniteAttentionError
            If the image features of a single prompt hold NaN or inf; the cache is as before.
        """
        self.check_alive()
        self._refuse_spent("be continued")
        spans, turn = self.begin_turn(inputs, vision_mask)
        self.reading = None
        self.begin_answer()
        self.forget_leaving()
        # A turn of text alone has nothing to evict: it is read like an answer, into the tail.
        if spans.vision.any():
            if self._before_whole is not None:
                self._before_whole()
            self.reading = self._reading_of(spans, features_of(turn))
            self.leaving = self.reading.leaving
            self.watch = TowerWatch.of(self.attachment.model, self.chain, turn, spans.start)
            self._by_mask = vision_mask is not None
        return turn

    def _reading_of(self, spans: VisionSpans, features: Mapping[str, Sequence[Tensor]]) -> PromptReading:
        delta = None if self._turn is None else self._turn.after
        return PromptReading(
            spans,
            self.chain,
            list(self._pruned),
            len(self.layers),
            rope_delta=delta,
            own_bank=self._own_bank,
            features=features,
            rotations=partial(rotations_of, self.attachment),
            narrows=True,
            leaving=Leaving.of(spans, self.chain, list(self._pruned), len(self.layers)),
        )

    def after_attention(self, layer_idx: int, query: Tensor, scaling: float) -> None:
        """Take in what a layer has attended to, and place the entries of the layers that can be decided now.

        Parameters
        ----------
        layer_idx : int
            Decoder layer.
        query : Tensor
            [batch, q_heads, query, dim]; post-RoPE queries of the newest tokens.
        scaling : float
            Factor on the logits.
        """
        self._guard.pending = None  # plphp's attention function has read the layer, prefix and tail
        if self.reading is None and layer_idx == self._last:
            self.after_pass()
        if self.reading is None and not self._listeners and not self.looking:  # every step comes by here
            return
        attended = Attended(layer_idx, query, self._pruned[layer_idx], scaling)
        for listener in self._listeners:
            listener(attended)
        if self.looking:
            self.look_at_images(attended)
        if (reading := self.reading) is None:
            return
        started = time.perf_counter()
        with as_written(query.device), self._ended_by_errors():
            self._repeat_rows(reading, query.shape[0])
            for part in reading.read(attended):
                layer = self._pruned[part.scores.layer]
                tokens, asked, vision = layer.tail_tokens, part.placement, part.scores.vision
                self.before_placed(tokens, part, reading.spans)
                placement = layer.compact(asked, final=part.final, coder=part.coder, vision=vision)
                if placement is not asked:
                    too_large.warn(part.scores.layer, asked, placement)
                    part = replace(part, placement=placement)
                if part.final:
                    self.records.append(LayerRecord.of(reading.spans, tokens, part))
                    self.note_placed(tokens, part, reading.spans)
            # After a whole prompt `reading` is None, which says "read": decoding scores and evicts nothing.
            if layer_idx == self._last and attended.entries.length >= reading.spans.end:
                self.reading = None
                self.end_prompt(reading.spans)
        self.pruning_seconds += time.perf_counter() - started

    @contextmanager
    def listening(self, listener: Callable[[Attended], None]) -> Iterator[None]:
        """Call ``listener`` whenever a layer has attended while the context is open, before anything of it is placed.

        Its tail holds the keys of the whole prompt then, and `reading` is None where an answer is decoded.
        """
        self._listeners.append(listener)
        try:
            yield
        finally:
            # By identity: callables may compare equal.
            self._listeners = [other for other in self._listeners if other is not listener]

    def __deepcopy__(self, memo: dict[int, Any]) -> PrunedCache:
        copied: Any = super().__deepcopy__(memo)
        copied._listeners = []  # who listens to this cache has not asked for another one
        return copied

    def leave_whole(self) -> None:
        """Read the prompt that was planned as it is: no layer is placed or packed, and listeners hear of each."""
        self.reading = None
        self.forget_leaving()

    def enter_layer(self, number: int, states: Tensor) -> tuple[Tensor, Packing | None]:
        """Say what a decoder layer gets, see `PackedCache`; an error ends the cache."""
        with self._ended_by_errors():
            if number == 0 and self.reading is not None:
                self._repeat_rows(self.reading, states.shape[0])
            return super().enter_layer(number, states)

    def report(self) -> PruneReport:
        """What was kept and evicted so far, and the bytes that the cache holds now.

        Returns
        -------
        PruneReport
        """
        return self.report_later()()

    def report_later(self) -> Callable[[], PruneReport]:
        """The report of what the cache holds now, worked out when it is called; it holds no keys and values."""
        model = self.attachment.model
        images = None if self.fading is None else self._images
        state = HeldState.of(self.records, self._pruned, images, self.left, self.attended)
        later = partial(
            PruneReport,
            model_type=model.config.model_type,
            model_class=type(model).__name__,
            config=settled(self.config).to_dict(),
            batch=max(self.batch_size, 0),
            tokens=self.get_seq_length(),
            kv_bytes_full=self.full_nbytes,
            kv_bytes=self.nbytes,
            reserved_bytes=self.reserved_nbytes,
            pruning_seconds=self.pruning_seconds,
            collecting=self.collecting,
            held=[held_bytes(number, layer) for number, layer in enumerate(self.layers)],
            book_bytes=books_nbytes(self._pruned.values()),
            **self.memory_values(),
        )
        return cached(lambda: later(prompts=state.prompt_reports(), images=state.image_memories()))

    def _blank(self) -> PrunedCache:
        """A cache of the same model that has read nothing and prunes nothing."""
        return PrunedCache(self.attachment, NOTHING_EVICTED)

    def plan_generate(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Plan the inputs of ``generate``, or compare them with what was planned from a ``vision_mask``; see `plan`.

        ``generate`` takes no ``vision_mask``: a plan that was made with one is all that knows the vision tokens.
        """
        if self.reading is None or not self._by_mask:
            return self.plan(inputs)
        self.check_alive()
        turn, valid = self.read_turn(inputs)
        planned = tuple(self.reading.spans.valid.shape)
        if tuple(valid.shape) != planned:
            raise SpanError(
                f"The cache was planned for {planned[0]} rows of {planned[1]} tokens, got {valid.shape[0]} rows of "
                f"{valid.shape[1]}: pass the inputs that it was made for, or make a new one."
            )
        return turn

    def run_generate(
        self,
        attachment: Attachment,
        session: Session | None,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the ``generate`` of an attached model with this cache, see `plphp.engines.hf.generation`."""
        call = GenerateCall.of(attachment.model, original, args, kwargs)
        if self.attachment is not attachment:
            self.check_alive()
            raise UnsupportedFeatureError("This PrunedCache was made for another model.")
        return self.answer(call, session)

    def answer(self, call: GenerateCall, session: Session | None) -> Any:
        """Run a call of ``generate`` with this cache; the session it belongs to, if any, gets the report."""
        if session is not None:
            session.note(None)
        output = generate(self, call)
        if session is not None:
            session.note(self.report_later())
        return output

    def reset(self) -> None:
        """Forget everything; the next prompt has to be planned again."""
        super().reset()
        self.records = []
