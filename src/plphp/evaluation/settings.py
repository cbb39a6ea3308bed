# SPDX-License-Identifier: Apache-2.0
"""What an evaluation does: model, methods, retentions, tasks; everything that its numbers depend on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from plphp.errors import ConfigError, did_you_mean
from plphp.evaluation.tasks.choices import SPLITS, Split, check_choice
from plphp.evaluation.tasks.metrics import get_metric
from plphp.settings.checks import check_int

FULL = "full"
"""Name of the full cache, which every evaluation compares with."""
Mode = Literal["auto", "verify", "decode", "generate", "label-free"]
MODES: tuple[Mode, ...] = get_args(Mode)
ROWS = 64
"""Variants whose caches are alive at a time."""
RETENTION = (1.0, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
METHODS = ("plphp", "uniform", "shared", "random", "zero", "blank")


@dataclass(frozen=True)
class EvalSettings:
    """Settings of an evaluation.

    Parameters
    ----------
    model : str, optional
        Hub id or folder; default: the bundled model.
    methods : tuple of str
        Methods with their settings and labels, see `plphp.evaluation.running.variants.make_variants`.
    retention : tuple of float
        Fractions of the vision tokens to keep.
    tasks : tuple of str
        Built-in tasks and groups of tasks; empty for all that are scored, unless ``data`` or ``prompts`` are given.
    data : tuple of str
        The user's own data, see `plphp.evaluation.tasks.datasets.read_data`.
    metric : str
        Metric of ``data``.
    prompts : str, optional
        File of prompts without answers, see `plphp.inputs.prompts_file.read_prompts`; for ``mode="label-free"``.
    allow_urls : bool
        Whether images of ``data`` and ``prompts`` that http and https addresses name are fetched.
    split : {"dev", "test"}
        Split of the built-in tasks.
    samples : int
        Samples of each task.
    seed : int
        Seed of the samples.
    mode : {"auto", "verify", "decode", "generate", "label-free"}
        How samples are scored: "verify" from one pass over the reference (exact match), "decode" from greedy answers
        of all variants side by side, "generate" from the model's own ``generate``, variant by variant.
        "auto" verifies where it can and decodes elsewhere. "label-free" compares with the full cache, and reads no
        answers.
    dtype, device : str
        See `plphp.inputs.loading.load_model`; a device of None is a GPU if there is one.
    rows : int
        Variants whose caches are alive at a time.
    batch : int
        Samples in a batch, for ``mode="generate"``.
    max_new_tokens : int, optional
        Longest answer. Default: by the reference's length; 128 for ``mode="label-free"``.

    Raises
    ------
    ConfigError
        If a setting has a value that it cannot have.
    """

    model: str | None = None
    methods: tuple[str, ...] = METHODS
    retention: tuple[float, ...] = RETENTION
    tasks: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    metric: str = "exact_match"
    prompts: str | None = None
    allow_urls: bool = False
    split: Split = "dev"
    samples: int = 500
    seed: int = 0
    mode: Mode = "auto"
    dtype: str = "auto"
    device: str | None = None
    rows: int = ROWS
    batch: int = 8
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("methods", "retention", "tasks", "data"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, known in (("split", SPLITS), ("mode", MODES)):
            check_choice(name, getattr(self, name), known)
        for name in ("samples", "rows", "batch", "max_new_tokens"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), minimum=1)
        check_int("seed", self.seed, minimum=0)
        get_metric(self.metric)
        if self.prompts is not None and self.mode != "label-free":
            raise ConfigError("A file of prompts has no answers to score: use the label-free mode with it.")

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as JSON-ready values."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EvalSettings:
        """Make settings from what `to_dict` returned.

        Raises
        ------
        ConfigError
            If a key is unknown or a value is not valid.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise ConfigError(f"Unknown setting {key!r} of an evaluation.{did_you_mean(str(key), known)}")
        return cls(**values)
