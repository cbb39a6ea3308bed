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
    return {
        "variant": job["variant"],
        "retention": statistics.mean(watch.retention) if watch.retention else None,
        "running_mean": statistics.mean(watch.running),
        "running_most": max(watch.running),
        "steps": len(watch.running),
        "preempted": watch.preempted,
        "freed_blocks": watch.freed,
    }


def noise(side: int, chance: random.Random) -> Image.Image:
    """A square image."""
    return Image.frombytes("RGB", (side, side), chance.randbytes(3 * side * side))


def part(image: Image.Image) -> dict[str, Any]:
    """An image in a message."""
    return {"type": "image_pil", "image_pil": image}


class Watch:
    """Counts what the scheduler of an engine in this process does."""

    def __init__(self, llm: Any) -> None:
        engine = llm.llm_engine
        scheduler = engine.engine_core.engine_core.scheduler
        self.running: list[int] = []
        self.retention: list[float] = []
        self.preempted = self.freed = 0
        step, preempt = engine.step, scheduler._preempt_request

        def counted_step() -> Any:
            outputs = step()
            self.running.append(len(scheduler.running))
            return outputs

        def counted_preempt(*args: Any, **named: Any) -> Any:
            self.preempted += 1
            return preempt(*args, **named)

        engine.step, scheduler._preempt_request = counted_step, counted_preempt
        if scheduler.connector is not None:
            connector, free = scheduler.connector, scheduler.connector._free
            pool = scheduler.kv_cache_manager.block_pool

            def counted_free(request_id: str, prompt: Any) -> None:
                before = pool.get_num_free_blocks()
                self.retention.append(prompt.retention)
                free(request_id, prompt)
                self.freed += pool.get_num_free_blocks() - before

            connector._free = counted_free


if __name__ == "__main__":
    main()
