# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine in a process of its own: ``python engine.py JOB.json RESULT.json``.

An engine cannot be undone within a process, so each test module asks for the engines that it needs, through `run`.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import serving_capacity

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
ENGINE = {
    "block_size": 32,
    "dtype": "float32",
    "enable_prefix_caching": False,
    "enforce_eager": True,
    "limit_mm_per_prompt": {"image": 4, "video": 0},
    "max_model_len": 2048,
    "max_num_batched_tokens": 4096,
    "max_num_seqs": 8,
    "seed": 0,
}
CONNECTOR = {"kv_connector": "PLPHPConnector", "kv_role": "kv_producer"}

Request = dict[str, Any]
"""``text`` with marks, ``images`` as for `pictures.load`, ``videos`` as for `pictures.frames`, ``max_tokens``, and
whether it ``stops`` at the end of the answer."""


class EngineError(Exception):
    """The process ended with an error; the text is the end of what it wrote."""


def run(folder: Path, model: Path, environment: dict[str, str] | None = None, **job: Any) -> dict[str, Any]:
    """Run a job in a new process and return its result, with what it wrote under ``log``."""
    given, result = folder / "job.json", folder / "result.json"
    result.unlink(missing_ok=True)
    given.write_text(json.dumps({"model": str(model), **job}), encoding="utf-8")
    command = [sys.executable, str(HERE / "engine.py"), str(given), str(result)]
    places = (HERE.parents[2] / "src", HERE.parents[1], HERE, HERE.parents[2] / "benchmarks")
    paths = os.pathsep.join(map(str, places))
    env = {**os.environ, "PYTHONPATH": paths, **ENVIRONMENT, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env, check=False)
    log = done.stdout + done.stderr
    if done.returncode or not result.exists():
        raise EngineError(log[-8000:])
    return {**json.loads(result.read_text(encoding="utf-8")), "log": log}


def make(job: dict[str, Any]) -> Any:
    """Start the engine of a job."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    if job.get("flash", False):
        import emulated_flash

        emulated_flash.install()
    options = {**ENGINE, **job.get("engine", {})}
    if job.get("settings") is not None:
        options.setdefault("additional_config", {"plphp": job["settings"]})
    if job.get("connector", job.get("settings") is not None):
        options["kv_transfer_config"] = KVTransferConfig(**CONNECTOR)
    return LLM(model=job["model"], **options)


def video_metadata(frames: int) -> dict[str, Any]:
    """What vLLM wants to know of a video whose frames are all used, two per second."""
    return {
        "fps": 2.0,
        "duration": frames / 2,
        "total_num_frames": frames,
        "frames_indices": list(range(frames)),
    }


def prompt_of(request: Request) -> dict[str, Any]:
    """A prompt as vLLM takes it."""
    from pictures import frames, load

    media = {
        "image": [load(one) for one in request["images"]],
        "video": [(frames(*one), video_metadata(one[0])) for one in request.get("videos", ())],
    }
    given = {kind: some for kind, some in media.items() if some}
    return {"prompt": request["text"], **({"multi_modal_data": given} if given else {})}


def sampling(request: Request) -> Any:
    """Greedy; of a fixed length, but where the request stops at the end of the answer."""
    from vllm import SamplingParams

    ignore_eos = not request.get("stops", False)
    return SamplingParams(temperature=0.0, max_tokens=request["max_tokens"], ignore_eos=ignore_eos)


class Watch(serving_capacity.Watch):
    """And what becomes of blocks.

    Attributes
    ----------
    free, held : list of int
        Blocks after each step: free ones, and those in the block tables of requests.
    pruned : dict
        By request, what the worker told of its prompt; again for every time that it was pruned.
    """

    def __init__(self, llm: Any) -> None:
        super().__init__(llm)
        self.total = self.pool.get_num_free_blocks()
        self.free: list[int] = []
        self.held: list[int] = []
        self.pruned: dict[str, list[dict[str, Any]]] = {}

    def note_step(self) -> None:
        """After a step."""
        super().note_step()
        self.free.append(self.pool.get_num_free_blocks())
        self.held.append(self.in_tables())

    def note_pruned(self, request_id: str, prompt: Any, freed: int) -> None:
        """After the blocks of a prompt were freed."""
        super().note_pruned(request_id, prompt, freed)
        told = {
            "tokens": prompt.tokens,
            "vision_tokens": prompt.vision_tokens,
            "kept": [prompt.kept[layer] for layer in sorted(prompt.kept)],
            "blocks": [prompt.blocks[layer] for layer in sorted(prompt.blocks)],
            "classes": [prompt.allocation[layer].layer_class for layer in sorted(prompt.allocation)],
        }
        self.pruned.setdefault(request_id.split("-")[0], []).append(told)

    def in_tables(self) -> int:
        """Blocks in the block tables of requests."""
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        tables = [table for manager in managers for table in manager.req_to_blocks.values()]
        return sum(not block.is_null for table in tables for block in table)

    def result(self) -> dict[str, Any]:
        """All of it."""
        return {
            "total": self.total,
            "free": self.free,
            "held": self.held,
            "free_now": self.pool.get_num_free_blocks(),
            "running": self.running,
            "preempted": self.preempted,
            "pruned": self.pruned,
            "known_to_worker": self.known_to_worker(),
        }

    def known_to_worker(self) -> int:
        """Requests that the worker still holds something of; those that ended last count until the next pass."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

        pruning = getattr(get_kv_transfer_group(), "pruning", None) if has_kv_transfer_group() else None
        return 0 if pruning is None else len(pruning._readings)


def generate(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Answer all requests at once."""
    requests = job["requests"]
    watch = Watch(llm) if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" else None
    outputs = llm.generate([prompt_of(one) for one in requests], [sampling(one) for one in requests], use_tqdm=False)
    return {
        "prompts": [list(output.prompt_token_ids) for output in outputs],
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        **({} if watch is None else watch.result()),
    }


def disorder(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Add, abort and go on at random, schedule by schedule; then answer each request that was not aborted alone.

    A schedule has ``requests``, a ``seed`` and the chance of an ``abort`` before a step.
    """
    watch = Watch(llm)
    schedules = [_schedule(watch, one) for one in job["schedules"]]
    preempted = watch.preempted
    for given, done in zip(job["schedules"], schedules, strict=True):
        done["alone"] = {}
        for name in done["finished"]:
            request = given["requests"][int(name)]
            [output] = llm.generate([prompt_of(request)], [sampling(request)], use_tqdm=False)
            done["alone"][name] = list(output.outputs[0].token_ids)
    return {**watch.result(), "preempted": preempted, "schedules": schedules}


def _schedule(watch: Watch, given: dict[str, Any]) -> dict[str, Any]:
    """One schedule to its end."""
    from vllm.exceptions import VLLMValidationError

    engine, chance = watch.engine, random.Random(given["seed"])
    waiting = list(enumerate(given["requests"]))
    internal: dict[str, str] = {}
    finished, aborted, refused, alive = {}, [], [], []
    while waiting or engine.has_unfinished_requests():
        if waiting and chance.random() < 0.3:
            number, request = waiting.pop(0)
            name = str(number)
            try:
                internal[name] = engine.add_request(name, prompt_of(request), sampling(request))
                alive.append(name)
            except VLLMValidationError:
                refused.append(name)
        elif alive and chance.random() < given["abort"]:
            name = alive.pop(chance.randrange(len(alive)))
            engine.abort_request([internal[name]], internal=True)
            aborted.append(name)
        elif engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    name = output.request_id.split("-")[0]
                    finished[name] = list(output.outputs[0].token_ids)
                    alive.remove(name)
    return {"finished": finished, "aborted": aborted, "refused": refused, "free": watch.pool.get_num_free_blocks()}


def main() -> None:
    """Do what the job says."""
    given, result = map(Path, sys.argv[1:])
    job = json.loads(given.read_text(encoding="utf-8"))
    llm = make(job)
    found = {"generate": generate, "disorder": disorder}[job.get("do", "generate")](llm, job)
    result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
