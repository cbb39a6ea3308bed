# SPDX-License-Identifier: Apache-2.0
"""The command line that settings stand for."""

from __future__ import annotations

from typing import Any

import pytest

from plphp.evaluation import EvalSettings
from plphp.evaluation.results.compact import command_of


@pytest.mark.parametrize(
    ("settings", "command"),
    [
        ({}, "plphp eval --out DIR"),
        (
            {"methods": ("plphp", "random:seed=1"), "retention": (0.5, 0.25)},
            "plphp eval --methods plphp,random:seed=1 --target-retention 0.5,0.25 --out DIR",
        ),
        (
            {"data": ("a b.jsonl", "some/set:split=val,name=x"), "allow_urls": True},
            "plphp eval --data 'a b.jsonl' --data some/set:split=val,name=x --allow-urls --out DIR",
        ),
        ({"mode": "label-free", "max_new_tokens": 9}, "plphp eval --label-free --max-new-tokens 9 --out DIR"),
        ({"mode": "generate", "batch": 2}, "plphp eval --mode generate --batch 2 --out DIR"),
    ],
)
def test_the_command_of_settings(settings: dict[str, Any], command: str) -> None:
    assert command_of(EvalSettings(**settings).to_dict()) == command
