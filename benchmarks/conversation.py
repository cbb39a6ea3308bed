# SPDX-License-Identifier: Apache-2.0
"""A long conversation under a budget, with a new image each turn: ``python benchmarks/conversation.py --turns 300``.

The bundled model reads an image and a question about it with every turn and answers on the same cache. After each turn:
the bytes held, by the report and by the storages that are alive; the memory of the process, or of torch's allocator on
a GPU; the time; and whether the answer is right. Beside it the same question in a prompt of its own, and for the first
turns a conversation on a full cache: the bundled model was trained on short prompts and is lost after a dozen images
with any cache.

Then what the alternative costs: a message is taken out of the conversation and the rest is read again, against going on
with the cache whose images have faded.
"""

from __future__ import annotations

import argparse
import gc
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import torch
from rich.console import Console
from torch import Tensor
from transformers.cache_utils import DynamicCache

import plphp
from plphp.engines.hf.cache import PrunedCache
from plphp.engines.hf.cache_argument import passed
from plphp.evaluation import available_tasks
from plphp.evaluation.running.conversation import end_tokens, prompt_inputs
from plphp.evaluation.running.forcing import generate_greedily
from plphp.evaluation.tasks.task import Sample
from plphp.inputs.loading import load_model
from plphp.kernels.books import LayerBooks
from plphp.show.tables import human_bytes

TASK = "colour_of"
"""Its answers are short, and its questions name no image."""
LONGEST = 12
"""New tokens of an answer at most."""
FULL = plphp.PLPHPConfig(method="none")
"""Nothing is evicted."""
NOT_HELD = (type, types.ModuleType, types.FunctionType, types.MethodType, torch.nn.Module)
"""What objects of a cache refer to and does not belong to it."""


@dataclass(frozen=True)
class Turn:
    """A turn that has been made ready: tokens int64 [1, new] without the system text, and the features of its image."""

    ids: Tensor
    pixels: Tensor
    sample: Sample


class Talk:
    """A conversation on one cache.

    Parameters
    ----------
    model, processor
        The bundled model.
    config : PLPHPConfig
    """

    def __init__(self, model: Any, processor: Any, config: plphp.PLPHPConfig) -> None:
        self._model, self._processor, self._config = model, processor, config
        self._end = torch.tensor([[end_tokens(model, processor)[0], *processor.tokenizer("\n")["input_ids"]]])
        self.ids = torch.empty(1, 0, dtype=torch.int64)
        self.starts: list[int] = []
        self.cache: PrunedCache | None = None

    def inputs(self, turn: Turn) -> dict[str, Tensor]:
        """The conversation with one turn more; the features are those of the new image alone."""
        ids = torch.cat([self.ids, turn.ids], 1).to(self._model.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": turn.pixels}

    def answer(self, turn: Turn) -> str:
        """Read a turn and answer it; what comes next goes on from there."""
        inputs = self.inputs(turn)
        self.starts.append(self.ids.shape[1])
        if self.cache is None:
            self.cache = PrunedCache.for_inputs(self._model, inputs, self._config)
        output = generate_greedily(self._model, {**inputs, **passed(self.cache)}, LONGEST).cpu()
        said = output[0, inputs["input_ids"].shape[1] :]
        # An answer that was cut off has no end token.
        self.ids = torch.cat([output, self._end[:, int(bool((said == self._end[0, 0]).any())) :]], 1)
        return str(self._processor.decode(said, skip_special_tokens=True)).strip()


def turns_of(processor: Any, model: Any, count: int) -> Iterator[Turn]:
    """The first turns of a conversation; only the first has the system text."""
    for number, make in enumerate(available_tasks()[TASK].sample_makers("dev", count)):
        sample = make()
        system = None if number == 0 else ""
        inputs = prompt_inputs(processor, _with_system(sample, system))
        yield Turn(inputs["input_ids"], inputs["pixel_values"].to(model.device), sample)


def _with_system(sample: Sample, system: str | None) -> Sample:
    return Sample(sample.id, sample.task, sample.images, sample.turns, system)


def storage_bytes(cache: PrunedCache) -> int:
    """Bytes of the storages that the layers of a cache keep alive, each once, what is noted of entries among them; but
    for codebooks, which belong to the model."""
    reached = list(_reached(cache.layers))
    books = _storages(held for own in reached if isinstance(own, LayerBooks) for held in _reached([own]))
    return sum(size for place, size in _storages(reached).items() if place not in books)


def _storages(objects: Iterable[Any]) -> dict[int, int]:
    """By where it begins, the bytes of each storage of the tensors among some objects."""
    storages = (held.untyped_storage() for held in objects if isinstance(held, Tensor))
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _reached(roots: Iterable[Any]) -> Iterator[Any]:
    """Everything that some objects refer to, and they themselves."""
    seen: set[int] = set()
    left = list(roots)
    while left:
        held = left.pop()
        if id(held) not in seen and not isinstance(held, NOT_HELD):
            seen.add(id(held))
            yield held
            left += [] if isinstance(held, Tensor) else gc.get_referents(held)


def memory_bytes(device: torch.device) -> int:
    """Bytes of torch's allocator on a GPU, else those of the process that are in memory (Linux; 0 elsewhere)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)


def soak(model: Any, processor: Any, config: plphp.PLPHPConfig, count: int, beside: int) -> list[dict[str, Any]]:
    """Talk for so many turns, the first ``beside`` of them on a full cache as well; a row of figures for each turn."""
    talk, rows = Talk(model, processor, config), []
    whole = Talk(model, processor, FULL)
    for number, turn in enumerate(turns_of(processor, model, count), 1):
        right = turn.sample.turns[0].answer
        taken, answer = _timed(talk, turn)
        full: dict[str, Any] = {}
        if number <= beside:
            full["full_seconds"], said = _timed(whole, turn)
            full["right_full"] = said == right
        alone = Talk(model, processor, FULL).answer(turn)
        report = talk.cache.report()  # type: ignore[union-attr]
        rows.append(
            {
                "turn": number,
                "tokens": report.tokens,
                "vision_bytes": report.vision_bytes,
                "kv_bytes": report.kv_bytes,
                "storage_bytes": storage_bytes(talk.cache),  # type: ignore[arg-type]
                "memory_bytes": memory_bytes(model.device),
                "full_bytes": report.kv_bytes_full,
                "seconds": taken,
                "right": answer == right,
                "right_alone": alone == right,
                **full,
            }
        )
    return rows


def _timed(talk: Talk, turn: Turn) -> tuple[float, str]:
    answers: list[str] = []
    taken = measuring.seconds(lambda: answers.append(talk.answer(turn)), turn.pixels.device)
    return taken, answers[0]


def refills(model: Any, processor: Any, config: plphp.PLPHPConfig, counts: Sequence[int]) -> list[dict[str, Any]]:
    """For conversations of so many images, what reading the rest again costs, and a turn that goes on."""
    rows = []
    for count in counts:
        talk = Talk(model, processor, config)
        *turns, last = turns_of(processor, model, count + 1)
        for turn in turns:
            talk.answer(turn)
        goes_on = measuring.seconds(lambda talk=talk, last=last: talk.answer(last), model.device)
        # The first message leaves, with its image and its answer.
        ids = torch.cat([talk.ids[:, talk.starts[1] : talk.starts[count]], last.ids], 1).to(model.device)
        pixels = torch.cat([turn.pixels for turn in (*turns[1:], last)])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        again = measuring.seconds(lambda inputs=inputs: _prefill(model, inputs), model.device)
        computed = {"again_tokens": ids.shape[1], "goes_on_tokens": last.ids.shape[1]}
        rows.append({"images": count, "again_seconds": again, "goes_on_seconds": goes_on, **computed})
    return rows


def _prefill(model: Any, inputs: dict[str, Tensor]) -> None:
    cache = DynamicCache(config=model.config.get_text_config())
    generate_greedily(model, {**inputs, **passed(cache)}, LONGEST)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=300)
    parser.add_argument("--beside", type=int, default=20, help="turns with a full cache beside it")
    parser.add_argument("--images", type=int, nargs="*", default=[5, 20, 100], help="of conversations to read again")
    parser.add_argument("--config", default="query_bank:bank=bundled,retention_rate=1,vision_budget=784 tokens")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    return parser.parse_args()


def main() -> None:
    """Talk, read again, print two tables."""
    args = arguments()
    model, processor = load_model(None, args.dtype, args.device)
    config = plphp.PLPHPConfig.parse(args.config)
    rows = soak(model, processor, config, args.turns, args.beside)
    again = refills(model, processor, config, args.images)

    headings = ("turn", "tokens", "vision held", "storages", "memory", "seconds", "full cache")
    table = measuring.table(args.config, headings)
    for row in rows[:: max(1, len(rows) // 10)]:
        sizes = (human_bytes(row[name]) for name in ("vision_bytes", "storage_bytes", "memory_bytes"))
        full = f"{row['full_seconds']:.2f}" if "full_seconds" in row else ""
        table.add_row(str(row["turn"]), str(row["tokens"]), *sizes, f"{row['seconds']:.2f}", full)
    beside = [row for row in rows if "right_full" in row]
    right, whole, alone = (sum(row[name] for row in beside) for name in ("right", "right_full", "right_alone"))
    Console(width=120).print(
        table,
        f"right about the newest image, first {len(beside)} turns: {right}, with the full cache {whole}, "
        f"in prompts of their own {alone}",
    )
    table = measuring.table("A message is taken out", ("images", "again, s", "tokens", "goes on, s", "tokens"))
    for row in again:
        figures = (f"{row['again_seconds']:.2f}", row["again_tokens"], f"{row['goes_on_seconds']:.2f}")
        table.add_row(*map(str, (row["images"], *figures, row["goes_on_tokens"])))
    Console(width=120).print(table)
    measuring.write(args.out, {**measuring.origin("conversation", args), "turns": rows, "again": again})


if __name__ == "__main__":
    main()
