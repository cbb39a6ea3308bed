# SPDX-License-Identifier: Apache-2.0
"""One forward pass of the worker: which request has which tokens, and what becomes of the prompts that end in it.

The life of a `Step`: the model runner makes it (`step_of`); the builder of each layer's metadata shifts the block table
of the layer (`shortened`); then the layers run in order, and each hands its queries, keys and values to
`after_attention`. The step keeps the block table of each layer as vLLM made it, because kept entries are written into
the old slots of the prompt, before the next pass begins its tables behind the empty blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from plphp.errors import PLPHPError, UnsupportedFeatureError
from plphp.kernels import decode_attention

from .reading import PrunedPart, RequestReading
from .state import Pruning

_current: ContextVar[Step | None] = ContextVar("plphp_step", default=None)


class Writer(Protocol):
    """Writes keys and values [tokens, kv_heads, dim] into the slots, int64 [tokens], of a layer's paged cache."""

    def __call__(self, keys: Tensor, values: Tensor, slots: Tensor) -> None: ...


@dataclass(frozen=True)
class Row:
    """The tokens of one request in the pass.

    Parameters
    ----------
    request : str
        Id of the request.
    reading : RequestReading
        Its prompt.
    start : int
        Index in the pass of its first token.
    tokens : int
        Number of its tokens in the pass.
    computed : int
        Position in the request of its first token in the pass.
    """

    request: str
    reading: RequestReading
    start: int
    tokens: int
    computed: int

    @property
    def of_prompt(self) -> int:
        """How many of the tokens belong to the prompt. After a preemption vLLM recomputes the answer with it."""
        return max(0, min(self.tokens, self.reading.tokens - self.computed))

    def prompt_part(self, states: Tensor) -> Tensor:
        """The states of the prompt's tokens, out of those of the pass, [tokens of the pass, ...]."""
        return states[self.start : self.start + self.of_prompt]

    def answer_part(self, states: Tensor) -> Tensor:
        """The states of the tokens behind the prompt, out of those of the pass, [tokens of the pass, ...]."""
        return states[self.start + self.of_prompt : self.start + self.tokens]


@dataclass
class Step:
    """One pass of the worker, made before the metadata of the layers are built.

    Parameters
    ----------
    pruning : Pruning
        The state of the worker.
    rows : list of Row
        The requests, in the order of the pass.
    """

    pruning: Pruning
    rows: list[Row]
    _tables: dict[int, Tensor] = field(default_factory=dict)
    _writers: dict[int, Writer] = field(default_factory=dict)

    def shortened(self, layer_idx: int, block_size: int, common: Any) -> Any:
        """Begin the block tables of a layer behind the empty blocks.

        Parameters
        ----------
        layer_idx : int
            Decoder layer.
        block_size : int
            Tokens of a block of the attention kernel.
        common : vllm.v1.attention.backend.CommonAttentionMetadata
            What vLLM made for the layer's KV cache group.

        Returns
        -------
        CommonAttentionMetadata
            With shorter sequences and shifted tables for the rows that were pruned. Query lengths, positions and the
            slots of new tokens stay: they count from the beginning of the request.

        Raises
        ------
        UnsupportedFeatureError
            If the kernel's blocks are not those of the pool.
        """
        pool_block_size = self.pruning.setup.block_size
        if block_size != pool_block_size:
            raise UnsupportedFeatureError(
                f"The attention kernel reads blocks of {block_size} tokens and the pool holds blocks of "
                f"{pool_block_size}: start with --block-size {block_size}."
            )
        table = self._tables[layer_idx] = common.block_table_tensor
        dropped = [row.reading.dropped.get(layer_idx, 0) for row in self.rows]
        if not any(dropped):
            return common
        # A table has as many rows as the largest pass; those behind the requests are not shifted.
        shift = torch.zeros(table.shape[0], dtype=torch.int64)
        shift[: len(dropped)] = torch.tensor(dropped)
        shift = shift.to(table.device)
        columns = torch.arange(table.shape[1], device=table.device) + shift[:, None]
        lengths = common.seq_lens - (shift * block_size).to(common.seq_lens.dtype)
        # The last columns repeat the last block: they are behind the end of the shortened sequence and never read.
        table = table.gather(1, columns.clamp(max=table.shape[1] - 1))
        return common.replace(seq_lens=lengths, block_table_tensor=table)

    def after_attention(
        self, layer_idx: int, states: tuple[Tensor, Tensor, Tensor], output: Tensor, scaling: float, write: Writer
    ) -> None:
        """Take in the prompts of the pass, and prune those that end in it.

        Parameters
        ----------
        layer_idx : int
            Decoder layer.
        states : tuple of Tensor
            Queries, keys and values of the pass, [tokens, heads, dim].
        output : Tensor
            [tokens, q_heads * dim] or [tokens, q_heads, dim]; the attention of the pass, changed in place for tokens
            behind the end of a prompt: they see the pruned prompt, as when they were generated.
        scaling : float
            Factor on the logits.
        write : callable
            Writes into the paged cache of the layer.
        """
        self._writers[layer_idx] = write
        self._hear(layer_idx, states[0])
        for row_idx, row in enumerate(self.rows):
            if row.reading.prompt is None or not row.of_prompt:
                continue
            try:
                self._read(row_idx, layer_idx, states, output, scaling)
            except PLPHPError as error:  # a request must not end the server
                self.pruning.give_up(row.request, row.reading, str(error))

    def _hear(self, layer_idx: int, query: Tensor) -> None:
        """Let the answers be heard from which a query bank is collected."""
        own_bank = self.pruning.own_bank
        if own_bank is not None:
            for row in self.rows:
                own_bank.hear(row.request, layer_idx, row.computed + row.of_prompt, row.answer_part(query))

    def _read(
        self, row_idx: int, layer_idx: int, states: tuple[Tensor, Tensor, Tensor], output: Tensor, scaling: float
    ) -> None:
        """Take in the prompt of a request; write what is kept of it in the layers that can be decided now."""
        row, pruning = self.rows[row_idx], self.pruning
        query, keys, values = map(row.prompt_part, states)
        for part in row.reading.read(layer_idx, query, keys, values, scaling):
            pruning.note(row.request, row.reading, part)
            self._compact(row_idx, part)
            if part.layer == layer_idx and row.tokens > row.of_prompt:
                self._attend_again(row, part, states, output, scaling)
        if row.reading.is_last(layer_idx) and row.computed + row.of_prompt >= row.reading.tokens:
            pruning.done(row.request, row.reading)

    def _compact(self, row_idx: int, part: PrunedPart) -> None:
        """Write what a layer keeps right-aligned into the slots of the prompt."""
        if part.entries is None or part.entries.dense is None:
            return
        keys, values = (states[0].transpose(0, 1).contiguous() for states in part.entries.dense)
        # From the first block that stays to the end of the prompt: as many slots as entries, by `evict_whole_blocks`.
        # The layer may be an earlier one, if all layers were awaited: then its table and writer are kept from its turn.
        size, table = self.pruning.setup.block_size, self._tables[part.layer]
        position = torch.arange(part.blocks * size, self.rows[row_idx].reading.tokens, device=table.device)
        slots = table[row_idx, position // size].long() * size + position % size
        self._writers[part.layer](keys, values, slots)

    def _attend_again(
        self, row: Row, part: PrunedPart, states: tuple[Tensor, Tensor, Tensor], output: Tensor, scaling: float
    ) -> None:
        """Let the tokens behind the prompt see what is kept of it."""
        if part.entries is None:
            return
        query, keys, values = (row.answer_part(state).transpose(0, 1)[None] for state in states)
        attended = decode_attention(query, part.entries, keys, values, None, scaling)
        target = row.answer_part(output)
        target.copy_(attended[0].reshape(target.shape))


@contextmanager
def running(step: Step) -> Iterator[None]:
    """While open, `current` is ``step``."""
    token = _current.set(step)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Step | None:
    """The pass whose metadata are being built, None where nothing is pruned."""
    return _current.get()


def step_of(runner: Any, pruning: Pruning, tokens: dict[str, int]) -> Step:
    """Describe a pass of vLLM's model runner.

    Parameters
    ----------
    runner : vllm.v1.worker.gpu_model_runner.GPUModelRunner
        Knows the requests of the pass and their order.
    pruning : Pruning
        The state of the worker.
    tokens : dict
        Tokens of each request in the pass.
    """
    rows, start = [], 0
    pruning.forget_all_but(runner.requests)
    for row_idx, request in enumerate(runner.input_batch.req_ids):
        computed = int(runner.input_batch.num_computed_tokens_cpu[row_idx])
        reading = pruning.reading(request, runner.requests[request], computed)
        rows.append(Row(request, reading, start, tokens[request], computed))
        start += tokens[request]
    return Step(pruning, rows)
