# SPDX-License-Identifier: Apache-2.0
"""`PrunedCache`: a transformers cache whose vision entries are evicted per layer and per KV head."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from plphp.engines.hf.conversation.cache import ConversationCache
from plphp.errors import CacheMemoryError, CacheStateError, PLPHPError, UnsupportedFeatureError, UnsupportedModelError
from plphp.kernels.precision import as_written
from plphp.methods.registry import method_for
from plphp.pruning.finite import features_of
from plphp.pruning.plan import PromptPlan
from plphp.pruning.record import LayerRecord, prompt_reports
from plphp.pruning.report import PruneReport
from plphp.settings.config import PLPHPConfig, checked, checked_mode

from .attachment import Attachment, Lease
from .layer import PrunedLayer, layer_nbytes
from .passes import PassGuard
from .refusals import refuse_prompt_stage, refuse_unanswered


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
        self.method = method_for(config, len(layers))
        refuse_unanswered(self.method)
        self.records: list[LayerRecord] = []
        self.pruning_seconds = 0.0
        self._pruned = {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, PrunedLayer)}
        if not self._pruned:
            raise UnsupportedModelError(
                f"No text layer of this {attachment.model.config.model_type!r} model has full attention (all have a "
                "sliding window, chunks or no KV cache), so there is nothing to prune."
            )
        self._first, self._last = min(self._pruned), max(self._pruned)
        refuse_prompt_stage(self.method, attachment.model, len(self._pruned) == len(layers))
        dummy = getattr(self, "is_dummy", [False] * len(layers))
        updated = [i for i in range(len(layers)) if not dummy[i]]
        self._guard = PassGuard(max(updated))
        self._can_take_back = all(i in self._pruned for i in updated)
        self._before = 0
        self._plan: PromptPlan | None = None
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
        self._plan = None
        # Text alone: nothing to evict, so nothing to compact either.
        if spans.vision.any():
            evidence = self.method.evidence(self.config)
            delta = None if self._turn is None else self._turn.after
            custom = vision_mask is not None
            self._plan = PromptPlan.of(spans, self.config, evidence, custom=custom, rope_delta=delta)
            self._plan.features = features_of(turn)
        return turn

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens, see `transformers.Cache.update`."""
        self._begin(layer_idx)
        layer = self._pruned.get(layer_idx)
        if layer is not None and layer_idx == self._first:
            self._before = layer.get_seq_length()
            if self._plan is not None:
                self._plan.check_length(self._before + key_states.shape[2])
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
        return self._plan is None

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
        """Score, allocate, select and compact, once a layer has attended to the end of the prompt.

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
        plan, layer = self._plan, self._pruned[layer_idx]
        if plan is None:
            return
        if query.shape[0] != plan.batch:
            times, rest = divmod(query.shape[0], plan.batch)
            if rest:
                self._kill(f"it was planned for {plan.batch} rows and read {query.shape[0]}")
            plan.repeat(times)
        plan.gather(layer_idx, query, layer.get_seq_length() - query.shape[2])
        if layer.get_seq_length() < plan.spans.end:
            if self.method.stage is not None:
                reason = f"{self.method.name} ranks inside prefill and needs the prompt in one piece: leave out chunks"
                self._kill(reason, UnsupportedFeatureError)
            return
        started = time.perf_counter()
        with as_written(query.device):
            plan.score(layer_idx, layer, scaling)
            plan.withdraw(layer_idx, self.method, self.config, len(self.layers))
            if layer_idx == self._last or not self.method.needs_all_layers(self.config):
                self._evict(plan)
        if layer_idx == self._last:
            self._plan = None
        self.pruning_seconds += time.perf_counter() - started

    def _evict(self, plan: PromptPlan) -> None:
        """Allocate rates over the scored layers, select and compact in each of them."""
        try:
            for scores, [rows], [keep], _ in plan.choose(self.method, [self.config], self.judged(self.config)):
                layer = self._pruned[scores.layer]
                self.records.append(LayerRecord.of(plan.spans, layer.prefix_length, scores, rows, keep))
                layer.compact(keep)
        except PLPHPError as error:
            self._kill(str(error), type(error))
        plan.scores.clear()

    def judged(self, config: PLPHPConfig) -> list[int]:
        """The layers that share the budget of a config: those that are pruned and not exempt."""
        exempt = {layer % len(self.layers) for layer in config.exempt_layers}
        return [layer for layer in self._pruned if layer not in exempt]

    def hidden(self, layer_idx: int) -> Tensor | None:
        """Which entries of a layer's tail have left the prompt before it, bool [batch, tail]; None if none has."""
        plan = self._plan
        if plan is None or plan.hidden is None or layer_idx < plan.hidden_from:
            return None
        return plan.hidden[:, self._pruned[layer_idx].prefix_length :]

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
        if self._plan is None or not self._plan.custom:
            return self.plan(inputs)
        self.check_alive()
        turn, real = self.read_turn(inputs)
        self._plan.check_shape(*real.shape)
        return turn

    def after_failure(self) -> None:
        """Make the cache whole again after an exception; if it cannot be, mark it as dead."""
        half_read = self._plan is not None and self._pruned[self._last].get_seq_length() > self._plan.spans.start
        if not self._dead and (self._guard.cut_off or half_read) and not self._take_back():
            self._bury("an error stopped the model in the middle of a step")

    def reset(self) -> None:
        """Forget everything; the next prompt has to be planned again."""
        super().reset()
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):  # transformers 5.17 zeroes the entries and goes on behind them
                layer.keys = layer.values = None
                layer.is_initialized = False
        self.records, self._plan = [], None
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
        if self._plan is not None or not self._can_take_back:
            return False
        for layer in self._pruned.values():
            layer.crop(self._before - layer.get_seq_length())
        self.history.cut(self._before)
        self._guard.reset()
        return True
