# SPDX-License-Identifier: Apache-2.0
"""A file of a query bank that somebody has written otherwise is refused where it is read, by what is wrong in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from plphp import ConfigError, QueryBank
from plphp.policy.bank import LayerBank
from plphp.policy.rotation import Rotation

Change = Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], object]
"""What is done to the tensors, the record and the rotations of a file."""


def tampered(path: Path, change: Change) -> Path:
    """The file of a bank of the layers 1 and 3 of a model with four, changed."""
    layer = LayerBank(torch.ones(2, 5, 8), Rotation(torch.ones(4)))
    QueryBank({1: layer, 3: layer}, torch.arange(5), {"decoder_layers": 4, "model_type": "tiny"}).save(path)
    with safe_open(path, "pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    parts = {name: json.loads(about[name]) for name in ("record", "interleaved")}
    parts.update(change(tensors, *parts.values()) or {})  # type: ignore[arg-type, call-overload]
    save_file(tensors, path, {**about, **{name: json.dumps(part) for name, part in parts.items()}})
    return path


def test_a_file_that_nobody_has_changed_is_read(tmp_path: Path) -> None:
    assert QueryBank.load(tampered(tmp_path / "bank", lambda *_: None)).decoder_layers == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, r, i: r.pop("decoder_layers") and None, "the model has None decoder layers"),
        (lambda t, r, i: r.update(decoder_layers="4"), "the model has '4' decoder layers"),
        (lambda t, r, i: r.update(decoder_layers=True), "the model has True decoder layers"),
        (lambda t, r, i: r.update(decoder_layers=3), "layer 3 is none of a model with 3 decoder layers"),
        (lambda t, r, i: {"record": [1]}, r"its record is \[1\]"),
        (lambda t, r, i: {"record": None}, "its record is None"),
        (lambda t, r, i: {"interleaved": [False]}, r"the rotations of its layers are \[False\]"),
        (lambda t, r, i: i.update({"1": "no"}), "the rotations of its layers are"),
        (lambda t, r, i: {"interleaved": {}}, "it has no layer"),
        (lambda t, r, i: t.update(ahead=torch.arange(5.0)), "how far ahead"),
        (lambda t, r, i: t.update(ahead=torch.arange(4)), "the queries of layer 1 are torch.bfloat16"),
        (lambda t, r, i: t.pop("ahead") is None, "KeyError"),
        (lambda t, r, i: t.update({"3.queries": torch.ones(2, 8)}), "the queries of layer 3 are"),
        (lambda t, r, i: t.update({"3.queries": torch.ones(2, 5, 8).int()}), "the queries of layer 3 are torch.int32"),
        (lambda t, r, i: t.update({"3.queries": torch.full((2, 5, 8), torch.nan)}), "NaN or inf"),
        (lambda t, r, i: t.update({"1.frequencies": torch.ones(5)}), "the rotation of layer 1 is"),
        (lambda t, r, i: t.update({"1.frequencies": torch.full((4,), torch.inf)}), "NaN or inf"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(change: Change, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"The query bank .* is broken \(.*{message}.*plphp collect"):
        QueryBank.load(tampered(tmp_path / "bank", change))
