# SPDX-License-Identifier: Apache-2.0
"""The how-to page of the server runs as it stands, but for the port and for the environment, which is this one."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import serving_load

from server_page import RIGHT, ROOT, asked, blocks, started


def test_the_page_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, install, serve = blocks("sh")
    script, folder = install.split()
    assert (ROOT / script).is_file()
    assert f"{folder}/bin/plphp" in serve
    arguments, environment = started(serve)
    monkeypatch.chdir(ROOT)
    with serving_load.running(["plphp", *arguments], {**os.environ, **environment}, tmp_path / "server.log") as port:
        for _ in range(3):  # vLLM brings its metrics up to date every ten seconds
            answer, metrics = asked(port)
            assert answer == RIGHT
            freed = sum(value for name, value in metrics.items() if name.startswith("vllm:plphp_freed_blocks_total"))
            if freed:
                break
            time.sleep(10)
    assert freed % 24 == 0  # 24 blocks of a prompt, as docs/serving.md has it
    assert freed > 0
