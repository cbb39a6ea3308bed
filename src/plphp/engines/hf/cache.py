# SPDX-License-Identifier: Apache-2.0
"""`PrunedCache`: a transformers cache whose vision entries are evicted per layer and per KV head."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from plphp.engines.hf.conversation.cache import ConversationCache
from plphp.errors import CacheMemoryError, CacheStateError, PLPHPError, UnsupportedFeatureError, UnsupportedModelError
from plphp.families.spans import VisionSpans
from plphp.kernels.precision import as_written
from plphp.methods.registry import chain_of
from plphp.pruning.finite import features_of
from plphp.pruning.reading import PromptReading
from plphp.pruning.record import LayerRecord, prompt_reports
from plphp.pruning.report import PruneReport
from plphp.pruning.scoring import Attended
from plphp.settings.config import PLPHPConfig, checked, checked_mode

from .attachment import Attachment, Lease
from .contexts import Session
from .generation import GenerateCall, generate
from .layer import PrunedLayer, layer_nbytes
from .passes import PassGuard
from .refusals import refuse_stages


@dataclass(frozen=True)
class PendingUpdate:
    """Rides on the keys that `PrunedCache.update` returns, so that the attention function finds its cache."""

    cache: PrunedCache
    layer: int


class PrunedCache(ConversationCache):
    """KV cache from which vision tokens are evicted as soon as a layer has read the prompt.

    Make it with `for_inputs` or let `plphp.prune` make it. Full-attention layers are pruned; sliding-window and
    linear-attention layers hold what transformers' own ``DynamicCache`` holds for them.

    See Also
    --------
    plphp.prune : the same as a context manager.
    """

    def __init__(self, attachment: Attachment, config: PLPHPConfig, decode: str = "eager") -> None:
        text_config = attachment.model.config.get_text_config(decoder=True)
        layers = DynamicCache(config=text_config).layers
        pruned = [PrunedLayer() if type(layer) is DynamicLayer else layer for layer in layers]
        super().__init__(attachment, pruned)
        self.config, self.decode = config, checked_mode(decode)
        self.chain = chain_of(config, len(layers))
        self.chain.refuse_unanswered()
        self.records: list[LayerRecord] = []
        self.pruning_seconds = 0.0
        self._pruned = {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, PrunedLayer)}
        if not self._pruned:
            raise UnsupportedModelError(
                f"No text layer of this {attachment.model.config.model_type!r} model has full attention (all have a "
                "sliding window, chunks or no KV cache), so there is nothing to prune."
            )
        self._first, self._last = min(self._pruned), max(self._pruned)
        refuse_stages(self.chain, attachment.model, len(self._pruned) == len(layers))
        dummy = getattr(self, "is_dummy", [False] * len(layers))
        updated = [i for i in range(len(layers)) if not dummy[i]]
        self._guard = PassGuard(max(updated))
        self._can_take_back = all(i in self._pruned for i in updated)
        self._before = 0
        self.reading: PromptReading | None = None
        self._listeners: list[Callable[[Attended], None]] = []
        self._lease: Lease | None = None
        self._dead = self._spent = ""
        self.tail_bias: Tensor | None = None

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
            Default: ``PLPHPConfig()``.
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
        """Say what the next prompt is, so that its vision tokens are pruned at its end.

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
        if self._spent and self.get_seq_length():
            raise UnsupportedFeatureError(f"This PrunedCache cannot be continued: {self._spent}. Make a new one.")
        spans, turn = self.begin_turn(inputs, vision_mask)
        self.reading = None
        # Text alone: nothing to evict, so nothing to compact either.
        if spans.vision.any():
            self.reading = self._reading_of(spans, features_of(turn), custom=vision_mask is not None)
        return turn

    def _reading_of(self, spans: VisionSpans, features: Mapping[str, Sequence[Tensor]], custom: bool) -> PromptReading:
        delta = None if self._turn is None else self._turn.after
        return PromptReading(
            spans,
            self.chain,
            list(self._pruned),
            len(self.layers),
            custom=custom,
            rope_delta=delta,
            features=features,
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens, see `transformers.Cache.update`."""
        self._begin(layer_idx)
        layer = self._pruned.get(layer_idx)
        if layer is not None and layer_idx == self._first:
            self._before = layer.get_seq_length()
            if self.reading is not None:
                self.reading.check_length(self._before + key_states.shape[2])
        self._guard.enter(layer_idx)
        if layer is None:
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return keys, values
        if layer.batch_size not in (-1, key_states.shape[0]):
            self._kill(f"it holds {layer.batch_size} rows and was given {key_states.shape[0]}")
        try:
            keys, values = layer.update(key_states, value_states)
        except CacheMemoryError as error:
            if not self._take_back():
                self._kill(str(error), CacheMemoryError)
            raise CacheMemoryError(f"{error} The cache holds {self._before} tokens as before.") from error
        keys.plphp_pending = PendingUpdate(self, layer_idx)  # type: ignore[attr-defined]
        self._guard.pending = layer_idx
        return keys, values

    @property
    def is_read(self) -> bool:
        """Whether there is no prompt that has been planned and not been read to its end."""
        return self.reading is None

    def forget_pass(self) -> None:
        """Be between two passes again, after one that was not counted."""
        self._guard.reset()

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Update a linear-attention layer, see `transformers.Cache.update_conv_state`."""
        self._begin(layer_idx)
        self._guard.enter_conv(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Update a linear-attention layer, see `transformers.Cache.update_recurrent_state`."""
        if not self._guard.in_conv(layer_idx):  # decoding may write the conv state in place
            self._begin(layer_idx)
            self._guard.enter(layer_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

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
        self._guard.pending = None
        attended = Attended(layer_idx, query, self._pruned[layer_idx], scaling)
        for listener in self._listeners:
            listener(attended)
        reading = self.reading
        if reading is None:
            return
        started = time.perf_counter()
        with as_written(query.device), self._ended_by_errors():
            self._repeat_rows(reading, query.shape[0])
            for part in reading.read(attended):
                layer = self._pruned[part.scores.layer]
                self.records.append(LayerRecord.of(reading.spans, layer.prefix_length, part))
                layer.place(part.placement)
            if layer_idx == self._last and attended.entries.length >= reading.spans.end:
                self.reading = None
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
            self._listeners.remove(listener)

    def leave_whole(self) -> None:
        """Read the prompt that was planned as it is, with nothing placed and so nothing packed; listeners hear it."""
        self.reading = None

    def hidden(self, layer_idx: int) -> Tensor | None:
        """Which entries of a layer's tail have left the prompt before it, bool [batch, tail]; None if none has."""
        hidden = None if self.reading is None else self.reading.hidden_at(layer_idx)
        return None if hidden is None else hidden[:, self._pruned[layer_idx].prefix_length :]

    def report(self) -> PruneReport:
        """What was kept and evicted so far, and the bytes that the cache holds now.

        Returns
        -------
        PruneReport
        """
        model = self.attachment.model
        return PruneReport(
            model_type=model.config.model_type,
            model_class=type(model).__name__,
            config=self.config.to_dict(),
            batch=max(self.batch_size, 0),
            tokens=self.get_seq_length(),
            kv_bytes_full=self.full_nbytes,
            kv_bytes=self.nbytes,
            reserved_bytes=self.reserved_nbytes,
            pruning_seconds=self.pruning_seconds,
            prompts=prompt_reports(self.records),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all key and value tensors that are alive in the cache, reserved room included."""
        return sum(layer_nbytes(layer) for layer in self.layers)

    @property
    def reserved_nbytes(self) -> int:
        """Those of them that hold no entry yet: room for tokens to come."""
        return sum(layer.reserved_nbytes for layer in self._pruned.values())

    @property
    def full_nbytes(self) -> int:
        """Bytes that a dynamic cache would hold for the same tokens."""
        return sum(
            layer.full_nbytes if isinstance(layer, PrunedLayer) else layer_nbytes(layer) for layer in self.layers
        )

    def check_alive(self) -> None:
        """Raise `CacheStateError` if the cache cannot be used any more."""
        if self._dead:
            raise CacheStateError(f"This PrunedCache cannot be used any more: {self._dead}. Make a new one.")
        if not self.attachment.active:
            raise CacheStateError(
                "This PrunedCache is used outside the session that made it, where the model would read it wrongly: "
                "keep `with plphp.prune(model)` open, or make the cache with PrunedCache.for_inputs."
            )

    def check_reader(self, module: nn.Module) -> None:
        """Raise `UnsupportedFeatureError` if a layer of another model reads the cache."""
        if not self.attachment.reads(module):
            self._kill("a model read it for which it was not made", UnsupportedFeatureError)

    def end_here(self, reason: str) -> None:
        """Refuse further turns, for a reason that completes "cannot be continued: "."""
        self._spent = reason

    def check_read(self) -> None:
        """Raise `CacheStateError` if the last layer to be updated was not read as it has to be."""
        if self._guard.pending is not None:
            self._kill(
                f"layer {self._guard.pending} did not read it through plphp's attention function (is this model class "
                "a supported one, and was it compiled or changed while the cache was in use?)"
            )

    def plan_generate(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Plan what ``generate`` is given, or compare it with what was planned from a ``vision_mask``; see `plan`."""
        if self.reading is None or not self.reading.custom:
            return self.plan(inputs)
        self.check_alive()
        turn, real = self.read_turn(inputs)
        self.reading.check_shape(*real.shape)
        return turn

    def run_generate(
        self,
        attachment: Attachment,
        session: Session | None,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the ``generate`` of an attached model that was given this cache, see `plphp.engines.hf.generation`."""
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
            session.note(self.report())
        return output

    def after_failure(self) -> None:
        """Make the cache whole again after an exception; if it cannot be, mark it as dead."""
        half_read = self.reading is not None and self._pruned[self._last].get_seq_length() > self.reading.spans.start
        if not self._dead and (self._guard.cut_off or half_read) and not self._take_back():
            self._bury("an error stopped the model in the middle of a step")

    def reset(self) -> None:
        """Forget everything; the next prompt has to be planned again."""
        super().reset()
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):  # transformers 5.17 zeroes the entries and goes on behind them
                layer.keys = layer.values = None
                layer.is_initialized = False
        self.records, self.reading = [], None
        self.pruning_seconds, self._spent = 0.0, ""
        self._guard.reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> PrunedCache:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedFeatureError(
            "A PrunedCache belongs to its model and cannot be pickled, sent to another process or copied in part: "
            "copy.deepcopy makes another one for the same model, and cache.report().to_json() can be stored."
        )

    def _repeat_rows(self, reading: PromptReading, rows: int) -> None:
        """Follow ``generate``, which repeats the rows of a prompt for beams and for several returned sequences."""
        times, rest = divmod(rows, reading.batch)
        if rest:
            self._kill(f"it was planned for {reading.batch} rows and read {rows}")
        if times > 1:
            reading.repeat(times)

    @contextmanager
    def _ended_by_errors(self) -> Iterator[None]:
        """End the cache with an error in a prompt's flow: some layers are placed by then, and others are not."""
        try:
            yield
        except PLPHPError as error:
            if not self._dead:
                self._kill(str(error), type(error))
            raise

    def _kill(self, reason: str, error: type[Exception] = CacheStateError) -> NoReturn:
        reason = reason.rstrip(".")
        self._bury(reason)
        raise error(f"{reason[0].upper()}{reason[1:]}; this PrunedCache cannot be used any more.")

    def _bury(self, reason: str) -> None:
        """Mark the cache as dead and free its entries."""
        self.reset()
        self._dead = reason

    def _begin(self, layer_idx: int) -> None:
        """Look before the update of a layer whether the last one was read, and the last pass came to its end."""
        self.check_alive()
        if self._guard.begins_anew(layer_idx):  # too late to take it back: the mask of this pass is made
            self._kill("an error stopped the model in the middle of a step")
        self.check_read()

    def _take_back(self) -> bool:
        """Forget the tokens of a pass that was cut off; return whether it can be done, as while decoding."""
        if self.reading is not None or not self._can_take_back:
            return False
        for layer in self._pruned.values():
            layer.crop(self._before - layer.get_seq_length())
        self.history.cut(self._before)
        self._guard.reset()
        return True
