# SPDX-License-Identifier: Apache-2.0
"""``plphp serve``, as far as it goes without vLLM; tests/engines/vllm runs the server."""

from __future__ import annotations

import importlib.util
import socket
from typing import Any

import pytest
from command_line import error, run

from plphp import PLPHPConfig
from plphp.serving.options import Limits, Listening

WITHOUT_VLLM = pytest.mark.skipif(importlib.util.find_spec("vllm.config") is not None, reason="vLLM is installed")


@WITHOUT_VLLM
def test_vllm_is_missing() -> None:
    assert "plphp serve needs vLLM" in error("serve", "model", "--engine", "vllm", "--port", "8000")


@WITHOUT_VLLM
@pytest.mark.parametrize("engine", ["auto", "transformers"])
def test_the_packages_of_a_server_are_missing(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plphp.cli._engines.PACKAGES", ("no_such_package",))
    line = error("serve", "--engine", engine)
    assert "needs no_such_package: pip install 'plphp[serve]'" in line
    assert ("vLLM, which is not installed either" in line) == (engine == "auto")


def test_settings_are_read_first() -> None:
    assert "contradict each other" in error("serve", "model", "--method", "plphp", "--config", "plphp")
    assert "Unknown setting 'retention'" in error("serve", "model", "--config", "plphp:retention=0.4")


@pytest.mark.parametrize("model", [(), ("org/model",), ("--port", "8000")], ids=" ".join)
def test_the_bundled_model_has_settings_of_its_own(model: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def server_arguments(config: PLPHPConfig, options: list[str], *, for_bundled: PLPHPConfig) -> str:
        asked.append((config, options, for_bundled))
        return "arguments"

    monkeypatch.setattr("plphp.engines.vllm.server.server_arguments", server_arguments)
    monkeypatch.setattr("plphp.engines.vllm.server.serve", asked.append)
    done = run("serve", *model, "--engine", "vllm")
    assert done.exit_code == 0, done.output
    assert all(config.tiers is None for config in (asked[0][0], asked[0][2]))  # vLLM holds entries whole
    asked.clear()
    done = run("serve", *model, "--target-retention", "0.3", "--engine=vllm", "--enforce-eager")
    assert done.exit_code == 0, done.output
    bank = PLPHPConfig(method="query_bank", options={"bank": "bundled"}, target_retention=0.3, heads="equal")
    assert asked == [(PLPHPConfig(target_retention=0.3), [*model, "--enforce-eager"], bank), "arguments"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a server on transformers was to be started with; it is not started."""
    monkeypatch.setattr("plphp.cli._engines.PACKAGES", ())
    calls: list[Any] = []
    monkeypatch.setattr("plphp.cli._serving.serve_with_transformers", lambda *arguments: calls.append(arguments))
    return calls


@WITHOUT_VLLM
def test_transformers_serves_where_vllm_is_not_installed(started: list[Any]) -> None:
    done = run("serve")
    assert done.exit_code == 0, done.output
    ((model, limits, listening),) = started
    assert (model.name, model.served_name, model.dtype, model.device) == (None, "bundled", "auto", None)
    assert model.settings.tiers == "t10"  # held in few bits, as `plphp generate` does
    assert (limits, listening) == (Limits(), Listening())


def test_options_of_transformers(started: list[Any]) -> None:
    options = ["--port", 80, "--host", "0.0.0.0", "--served-model-name", "name", "--dtype", "float32", "--max-queue", 3]
    options += ["--limit-mm-per-prompt", '{"image": 2, "video": 0}', "--allow-urls", "--max-model-len", 500]
    options += ["--conversations", 4, "--conversation-bytes", "1.5MB"]
    done = run("serve", "--engine", "transformers", "org/model", *options, "--method", "plphp")
    assert done.exit_code == 0, done.output
    ((model, limits, listening),) = started
    assert (model.name, model.served_name, model.dtype) == ("org/model", "name", "float32")
    assert model.settings == PLPHPConfig(target_retention=0.4)
    numbers = {"conversations": 4, "conversation_bytes": 1_500_000}
    assert limits == Limits(max_images=2, allow_urls=True, max_model_len=500, max_queue=3, **numbers)
    assert listening == Listening("0.0.0.0", 80)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--enforce-eager"], "The engine transformers has no option --enforce-eager"),
        (["model", "--block-size", "32"], "has no option --block-size"),
        (["--limit-mm-per-prompt", "3"], """must be like '{"image": 3}', got '3'"""),
        (["--limit-mm-per-prompt", '{"image": 1, "video": 1}'], "serves images alone, not video"),
        (["--limit-mm-per-prompt", '{"image": -1}'], "must be an integer of at least 0"),
        (["--conversation-bytes", "much"], "--conversation-bytes must be a number of bytes such as '200MB'"),
        (["--decode", "graf"], "decode must be"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_that_transformers_refuses(options: list[str], part: str, started: list[Any]) -> None:
    assert part in error("serve", "--engine", "transformers", *options)
    assert started == []


def test_there_is_no_such_engine() -> None:
    assert "There is no engine 'vlm'. Did you mean 'vllm'?" in error("serve", "--engine", "vlm")


def test_the_help_has_the_options_of_the_engine() -> None:
    assert "--max-image-pixels" in run("serve", "--engine", "transformers", "--help").stdout
    assert "--max-image-pixels" not in run("serve", "--engine", "vllm", "--help").stdout


def test_a_port_that_is_taken() -> None:
    pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    pytest.importorskip("prometheus_client")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = error("serve", "--engine", "transformers", "--port", taken.getsockname()[1])
    assert "Cannot listen at port" in line
    assert "Choose another with --host and --port" in line
