# SPDX-License-Identifier: Apache-2.0
"""The server: metrics, and many clients at once with all that clients do."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server import Server, noise_url, running
from tiny_checkpoint import LAYERS

SIZES = ((57, 391), (300, 31), (640, 480), (29, 29), (448, 448), (101, 203), (1000, 60), (333, 777))
BROKEN = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAA"
NO_IMAGE = "data:image/png;base64,bm8gaW1hZ2U="


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    settings = ("--config", "uniform:retention_rate=0.3", "--limit-mm-per-prompt", '{"image": 3, "video": 0}')
    with running(folder, checkpoint, *settings, "--max-num-seqs", "16") as found:
        yield found


def idle(server: Server) -> dict[str, float]:
    """The metrics, once no request is running or waiting."""
    for _ in range(120):
        metrics = server.metrics()
        if metrics["vllm:num_requests_running"] == metrics["vllm:num_requests_waiting"] == 0:
            return metrics
        time.sleep(0.5)
    raise AssertionError("requests go on for a minute after their clients have left")


def test_metrics_and_log(server: Server) -> None:
    before = server.metrics()
    status, body = server.ask([noise_url(448, 448, 1)], "What is it?")
    assert status == 200, body
    assert json.loads(body)["usage"]["completion_tokens"] == 16
    after = idle(server)
    difference = {name: value - before.get(name, 0) for name, value in after.items()}
    # 256 vision tokens: 77 stay by the rate, 179 leave, 5 blocks of 32 in each layer.
    assert difference["vllm:plphp_prompts_total"] == 1
    assert difference["vllm:plphp_vision_tokens_total"] == 256
    assert difference["vllm:plphp_freed_blocks_total"] == 5 * LAYERS
    assert difference["vllm:plphp_kept_vision_tokens_total"] == (256 - 5 * 32) * LAYERS
    assert difference["vllm:plphp_retention_sum"] == pytest.approx((256 - 5 * 32) / 256)
    assert f"{5 * LAYERS} blocks freed" in server.log.read_text()


def good(server: Server, number: int) -> None:
    """An answer of full length, streamed or not."""
    images = [noise_url(*SIZES[(number + part) % len(SIZES)], number, "PNG") for part in range(number % 4)]
    stream = number % 3 == 0
    status, body = server.ask(images, f"What is in {number}?", stream=stream)
    assert status == 200, body
    if stream:
        events = [line for line in body.splitlines() if line.startswith("data: ")]
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2][len("data: ") :])["choices"][0]["finish_reason"] == "length"
    else:
        assert json.loads(body)["usage"]["completion_tokens"] == 16


def bad(server: Server, number: int) -> None:
    """A client's mistake, told with a reason."""
    cases = (
        ([BROKEN], "broken"),
        ([NO_IMAGE], "no image"),
        ([], "long " * 2000),
        ([noise_url(56, 56)] * 4, "too many"),
        (["data:text/plain;base64,bm8="], "text"),
    )
    status, body = server.ask(*cases[number % len(cases)])
    assert 400 <= status < 500, (number, status, body)
    assert json.loads(body)["error"]["message"]


def leave(server: Server, number: int) -> None:
    """Send a question and go away, at once or in the middle of the answer."""
    connection = server.connect()
    server.send(connection, [noise_url(448, 448, number)], "Tell me all.", max_tokens=400, stream=True)
    if number % 2:
        connection.getresponse().read(200)
    connection.close()


def test_a_hundred_clients(server: Server) -> None:
    before = idle(server)
    actions = [good] * 60 + [bad] * 25 + [leave] * 15
    order = sorted(range(100), key=lambda number: number * 37 % 100)
    with ThreadPoolExecutor(100) as clients:
        done = [clients.submit(actions[number], server, number) for number in order]
    for one in done:
        one.result()
    after = idle(server)
    assert after["vllm:kv_cache_usage_perc"] == 0
    assert after["vllm:plphp_prompts_total"] - before["vllm:plphp_prompts_total"] >= 45
    good(server, 3)
