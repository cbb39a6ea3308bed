# SPDX-License-Identifier: Apache-2.0
"""Where models come from, and how soon it is known that they do not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import plphp
from plphp import BackendUnavailableError
from plphp.errors import LoadError
from plphp.inputs.loading import load_processor, load_weights
from plphp.inputs.sources import BUNDLED, check_device_name, is_bundled, reachable_source


class _Hub:
    """A hub that hangs up: it notes the first line of every request and answers none."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                self.requests.append(connection.recv(4096).decode().partition("\r\n")[0])

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def hub() -> Iterator[_Hub]:
    made = _Hub()
    yield made
    made.close()


def test_a_hub_that_does_not_answer_is_asked_once(hub: _Hub, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(plphp.__file__).parent.parent),
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    command = [sys.executable, "-m", "plphp", "estimate", "--model", "nope/nope"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    expected = "it is neither a folder here nor in the local cache, and the hub cannot be reached."
    assert done.stderr == f"error: Cannot load the model nope/nope: {expected}\n"
    requests = [request for request in hub.requests if "nope" in request]
    assert requests == ["HEAD /nope/nope/resolve/main/config.json HTTP/1.1"]


@pytest.mark.parametrize("load", [load_processor, load_weights])
def test_transformers_is_not_let_try_again(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def unreachable(url: str) -> None:
        asked.append(url)
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("plphp.inputs.loading.PretrainedConfig.get_config_dict", None)
    with pytest.raises(LoadError, match="the hub cannot be reached"):
        load("nope/nope")
    assert len(asked) == 1


def test_what_is_in_the_cache_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "/cache/config.json")
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", None)
    assert reachable_source("org/model") == "org/model"


def test_a_busy_hub_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(url: str) -> None:
        raise OSError("503 Service Unavailable")

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", busy)
    assert reachable_source("org/model") == "org/model"


def test_the_bundled_model_by_default_and_by_its_folder(tmp_path: Path) -> None:
    assert is_bundled(None)
    assert is_bundled(BUNDLED)
    assert is_bundled(os.path.relpath(BUNDLED))
    assert not is_bundled(tmp_path)
    assert not is_bundled("org/model")


@pytest.mark.parametrize("device", ["", "CUDA", "cuda:", "cuda:-1", "cuda:1:2", "nowhere", "meta"])
def test_what_is_no_device(device: str) -> None:
    with pytest.raises(BackendUnavailableError, match="There is no device"):
        check_device_name(device)
    with pytest.raises(BackendUnavailableError):
        load_weights(device=device)


@pytest.mark.parametrize("device", [None, "cpu", "cuda", "cuda:7", "mps"])
def test_what_may_be_a_device(device: str | None) -> None:
    check_device_name(device)


def test_a_package_may_bring_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "plphp.inputs.sources.entry_points", lambda group: ["theirs"] if group == "torch.backends" else []
    )
    check_device_name("theirs:0")
