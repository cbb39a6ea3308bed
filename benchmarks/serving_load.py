# SPDX-License-Identifier: Apache-2.0
"""A server of vLLM and the clients of vLLM's benchmark tool, for serving.py."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

OFF = "off"
"""The variant without the plugin."""
FIGURES = ("duration", "request_throughput", "output_throughput", "median_ttft_ms", "median_tpot_ms", "p99_ttft_ms")
STARTS_WITHIN = 600
"""Seconds."""


@contextmanager
def server(
    model: str, variant: str, engine: dict[str, Any], environment: dict[str, str], folder: Path
) -> Iterator[int]:
    """Run a server with an engine's options, and give its port."""
    # The command of vLLM looks for its package under another name than the CPU build has; this is what it runs.
    command = ["vllm.entrypoints.openai.api_server", "--model", model]
    if variant != OFF:
        command = ["plphp", "serve", model, "--config", variant]
    command += ["--served-model-name", "model"]
    for name, value in engine.items():
        flag = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
        command += [flag] if isinstance(value, bool) else [flag, value if isinstance(value, str) else json.dumps(value)]
    with running(command, environment, folder / f"{variant}.log") as port:
        yield port


@contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[int]:
    """Run a Python module that serves over HTTP, once it answers; give the free port that it got by ``--port``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    whole = [sys.executable, "-m", *command, "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen(whole, stdout=out, stderr=out, env=environment, start_new_session=True)
        try:
            wait(port, process, log)
            yield port
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server answers."""
    end = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"The server does not answer:\n{log.read_text()[-4000:]}")


def load(port: int, model: str, shape: tuple[int, int, int, int], folder: Path, seed: int) -> dict[str, Any]:
    """Let as many clients as there are requests send images, and wait for all answers."""
    requests, images, side, new_tokens = shape
    result = folder / "load.json"
    options = {
        "backend": "openai-chat",
        "endpoint": "/v1/chat/completions",
        "base-url": f"http://127.0.0.1:{port}",
        "model": model,
        "served-model-name": "model",
        "dataset-name": "random-mm",
        "num-prompts": requests,
        "random-input-len": 32,
        "random-output-len": new_tokens,
        "random-mm-base-items-per-request": images,
        "random-mm-limit-mm-per-prompt": json.dumps({"image": images, "video": 0}),
        "random-mm-bucket-config": f"{{({side}, {side}, 1): 1.0}}",
        "seed": seed,
        "result-dir": str(folder),
        "result-filename": result.name,
    }
    given = [str(one) for name, value in options.items() for one in (f"--{name}", value)]
    code = (
        "from vllm.benchmarks.serve import add_cli_args, main\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "parser = FlexibleArgumentParser()\n"
        "add_cli_args(parser)\n"
        "main(parser.parse_args())\n"
    )
    command = [sys.executable, "-c", code, *given, "--ignore-eos", "--save-result", "--disable-tqdm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"vLLM's benchmark tool: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    found = json.loads(result.read_text())
    if found["completed"] != requests:
        raise SystemExit(f"{found['completed']} of {requests} requests were answered: {found.get('errors')}")
    return {name: found[name] for name in FIGURES}
