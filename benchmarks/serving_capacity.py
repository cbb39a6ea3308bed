# SPDX-License-Identifier: Apache-2.0
"""One engine of vLLM, whose steps are counted: ``serving_capacity.py JOB RESULT``, of serving.py."""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from serving_load import OFF


def main() -> None:
    """Do what the job says."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the scheduler is in this process
    job, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps(count(json.loads(job.read_text()))))


def count(job: dict[str, Any]) -> dict[str, Any]:
    """Send all requests at once and count."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    from plphp import PLPHPConfig

    options = {**job["engine"], "seed": 0}
    if job["variant"] != OFF:
        options["additional_config"] = {"plphp": PLPHPConfig.parse(job["variant"]).to_dict()}
        options["kv_transfer_config"] = KVTransferConfig(kv_connector="PLPHPConnector", kv_role="kv_producer")
    llm = LLM(model=job["model"], **options)
    watch = Watch(llm)
    chance = random.Random(0)
    pictures = [[noise(job["side"], chance) for _ in range(job["images"])] for _ in range(job["requests"])]
    conversations: list[Any] = [
        [{"role": "user", "content": [*map(part, some), {"type": "text", "text": f"What is in row {number}?"}]}]
        for number, some in enumerate(pictures)
    ]
    sampling = SamplingParams(temperature=0.0, max_tokens=job["new_tokens"], ignore_eos=True)
    llm.chat(conversations, sampling, use_tqdm=False)
    counted = {
        "variant": job["variant"],
        "retention": statistics.mean(watch.retention) if watch.retention else None,
        "running_mean": statistics.mean(watch.running),
        "running_most": max(watch.running),
        "steps": len(watch.running),
        "preempted": watch.preempted,
        "freed_blocks": watch.freed,
    }
    return {**counted, **({} if job["questions"] is None else answered(llm, Path(job["questions"])))}


def answered(llm: Any, file: Path) -> dict[str, Any]:
    """Answer the questions of a file beside its images; how many there are, and how many answers are right."""
    from vllm import SamplingParams

    questions = json.loads(file.read_text(encoding="utf-8"))
    conversations: list[Any] = []
    for one in questions:
        images = [part(Image.open(file.parent / name).convert("RGB")) for name in one["images"]]
        conversations.append([{"role": "user", "content": [*images, {"type": "text", "text": one["question"]}]}])
    outputs = llm.chat(conversations, SamplingParams(temperature=0.0, max_tokens=128), use_tqdm=False)
    texts = [output.outputs[0].text.strip() for output in outputs]
    right = sum(text == one["answer"].strip() for text, one in zip(texts, questions, strict=True))
    return {"questions": len(questions), "right": right}


def noise(side: int, chance: random.Random) -> Image.Image:
    """A square image."""
    return Image.frombytes("RGB", (side, side), chance.randbytes(3 * side * side))


def part(image: Image.Image) -> dict[str, Any]:
    """An image in a message."""
    return {"type": "image_pil", "image_pil": image}


class Watch:
    """Notes what the scheduler of an engine in this process does.

    Attributes
    ----------
    running : list of int
        Requests that run, after each step.
    retention : list of float
        Of each pruned prompt.
    preempted, freed : int
        Requests that were preempted; blocks that pruning gave back.
    """

    def __init__(self, llm: Any) -> None:
        self.engine = llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.running: list[int] = []
        self.retention: list[float] = []
        self.preempted = self.freed = 0
        step, preempt, connector = self.engine.step, self.scheduler._preempt_request, self.scheduler.connector

        def noted_step() -> Any:
            outputs = step()
            self.note_step()
            return outputs

        def noted_preempt(*args: Any, **named: Any) -> Any:
            self.preempted += 1
            return preempt(*args, **named)

        self.engine.step, self.scheduler._preempt_request = noted_step, noted_preempt
        if connector is not None:
            free = connector._free

            def noted_free(request_id: str, prompt: Any) -> None:
                before = self.pool.get_num_free_blocks()
                free(request_id, prompt)
                self.note_pruned(request_id, prompt, self.pool.get_num_free_blocks() - before)

            connector._free = noted_free

    def note_step(self) -> None:
        """After a step."""
        self.running.append(len(self.scheduler.running))

    def note_pruned(self, request_id: str, prompt: Any, freed: int) -> None:
        """After the blocks of a prompt, a `plphp.engines.vllm.pruned_prompt.PrunedPrompt`, were freed."""
        self.retention.append(prompt.retention)
        self.freed += freed


if __name__ == "__main__":
    main()
