# SPDX-License-Identifier: Apache-2.0
"""What works on this machine: versions, devices, what plphp supports here, what it does not and why."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from plphp._version import __version__
from plphp.engines.hf.attachment import Lease
from plphp.engines.hf.attention import PREFIX, SUPPORTED_BASES
from plphp.engines.hf.cache import PrunedCache
from plphp.engines.hf.layer import PrunedLayer
from plphp.errors import PLPHPError
from plphp.families.registry import available_families, family_of
from plphp.families.unsupported import UNSUPPORTED
from plphp.inputs.loading import empty_model, load_model
from plphp.inputs.sources import bundled_model_path
from plphp.io.quoting import one_line
from plphp.kernels import TRIALS, choice
from plphp.settings.config import PLPHPConfig

PACKAGES = ("torch", "transformers", "numpy", "pillow", "triton")
"""Packages whose versions are shown."""
EXTRAS = {
    "matplotlib": "plots (pip install 'plphp[plots]')",
    "starlette": "a server on transformers (pip install 'plphp[serve]')",
    "accelerate": "models that are spread over several devices",
    "torchvision": "video inputs, and the processors of some families",
    "av": "video files (pip install av)",
}
"""Packages that plphp does without, with what needs them."""
BUNDLED_NAME = "the bundled model"
HEAD_DIM = 128
"""Head dimension with which the kernels are tried."""
_REASONS = {
    "flex_attention": "compiles a single mask for all layers, and pruned layers differ in length",
    "paged": "shares a block table between all layers and heads",
}


@dataclass(frozen=True)
class Check:
    """Whether something can be used here.

    Parameters
    ----------
    name : str
        Name of a package, device, kernel, model type or model.
    ok : bool
        Whether it can be used.
    detail : str
        Version, size, or the reason why it cannot be used.
    """

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Diagnosis:
    """What works on a machine; made by `diagnose`.

    Parameters
    ----------
    versions, devices, attention, kernels, extras : list of Check
        What this machine has. ``kernels`` are those of plphp, with the reason where the reference takes their place.
    families, unsupported : list of Check
        Model types that plphp prunes, and those it refuses, with the reason.
    model : Check
        The model that was asked about; by default the bundled model.
    """

    versions: list[Check]
    devices: list[Check]
    attention: list[Check]
    kernels: list[Check]
    extras: list[Check]
    families: list[Check]
    unsupported: list[Check]
    model: Check

    @property
    def usable(self) -> bool:
        """Whether plphp works here with the model that was asked about."""
        return self.model.ok

    @property
    def verdict(self) -> str:
        """Line that says whether plphp works here, on what, and with how many of its kernels; or why not."""
        if not self.usable:
            return f"plphp cannot be used with {self.model.name}: {self.model.detail}"
        devices = ", ".join(check.name for check in self.devices if check.ok)
        kernels = f"{sum(check.ok for check in self.kernels)} of its {len(self.kernels)} kernels"
        return (
            f"plphp works here with {self.model.name}, on {devices}; {kernels} are used and torch stands in for the "
            "rest."
        )


def diagnose(model: str | Path | None = None) -> Diagnosis:
    """Look at this machine, and at a model.

    Parameters
    ----------
    model : str or Path, optional
        A folder or hub id; only its configuration is read. Default: the bundled model, which is loaded.

    Returns
    -------
    Diagnosis
        What works here, and what does not and why.
    """
    return Diagnosis(
        versions=[
            Check("python", True, platform.python_version()),
            Check("plphp", True, __version__),
            *_versions(PACKAGES),
        ],
        devices=_devices(),
        attention=_attention(),
        kernels=_kernels(),
        extras=[Check(check.name, check.ok, f"{check.detail}: {EXTRAS[check.name]}") for check in _versions(EXTRAS)],
        families=[
            Check(family.name, True, _family(family.model_types, family.notes))
            for family in available_families().values()
        ],
        unsupported=[Check(name, False, reason) for name, reason in UNSUPPORTED.items()],
        model=_bundled() if model is None else check_model(model),
    )


def check_model(model: str | Path) -> Check:
    """Say whether a model would be pruned and in which layers, or why not; its weights are not read.

    Parameters
    ----------
    model : str or Path
        A folder or hub id.
    """
    try:
        empty = empty_model(model)
        lease = Lease.of(empty)
        layers = PrunedCache(lease.attachment, PLPHPConfig()).layers
        lease.end()
    except PLPHPError as error:
        return Check(str(model), False, str(error))
    pruned = [number for number, layer in enumerate(layers) if isinstance(layer, PrunedLayer)]
    if not pruned:
        return Check(str(model), False, f"none of its {len(layers)} layers has full attention to prune")
    which = "all" if len(pruned) == len(layers) else ", ".join(map(str, pruned))
    family = family_of(empty.config)
    detail = f"{type(empty).__name__}, family {family.name}; layers pruned: {which} (of {len(layers)})"
    return Check(str(model), True, f"{detail}. {family.notes}".rstrip(". ") + ".")


def _bundled() -> Check:
    try:
        model, _ = load_model()
    except PLPHPError as error:
        return Check(BUNDLED_NAME, False, str(error))
    count = sum(weight.numel() for weight in model.parameters())
    return Check(
        BUNDLED_NAME,
        True,
        f"{type(model).__name__}, {count / 1e6:.1f} M parameters, {bundled_model_path()}",
    )


def _versions(packages: Iterable[str]) -> list[Check]:
    checks = []
    for package in packages:
        try:
            checks.append(Check(package, True, version(package)))
        except PackageNotFoundError:
            checks.append(Check(package, False, "not installed"))
    return checks


def _devices() -> list[Check]:
    checks = [Check("cpu", True, f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        checks.append(Check(f"cuda:{index}", True, f"{device.name}, {device.total_memory / 2**30:.0f} GiB"))
    if not torch.cuda.is_available():
        checks.append(Check("cuda", False, "no CUDA device, or a torch without CUDA"))
    if torch.backends.mps.is_available():
        checks.append(Check("mps", True, "Apple GPU"))
    return checks


def _attention() -> list[Check]:
    missing = {
        "flash_attention_2": not is_flash_attn_2_available(),
        "flash_attention_3": not is_flash_attn_3_available(),
    }
    checks = [
        Check(name, not missing.get(name, False), "not installed" if missing.get(name) else "supported")
        for name in SUPPORTED_BASES
    ]
    for name in sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()):
        if name not in SUPPORTED_BASES and not name.startswith(PREFIX):
            reason = next((why for key, why in _REASONS.items() if key in name), "plphp does not stand in for it")
            checks.append(Check(name, False, f"not supported: {reason}"))
    return checks


def _kernels() -> list[Check]:
    cpu, gpus = torch.device("cpu"), [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    checks = []
    for ((operation, language), trial), dtype in itertools.product(TRIALS.items(), choice.TOLERANCE):
        for device in [cpu] if language == "C++" else gpus or [cpu]:  # without a GPU, Triton's answer is why not
            name = f"{operation}, {language}, {device}, {str(dtype).removeprefix('torch.')}"
            try:
                states = torch.empty(1, 1, 1, HEAD_DIM, dtype=dtype, device=device)
            except RuntimeError as error:
                checks.append(Check(name, False, f"the device cannot be used now: {one_line(error)}"))
                continue
            reason = choice.UNSUPPORTED[language](states)
            reason = reason or choice.trouble(trial, device, dtype, HEAD_DIM, HEAD_DIM)
            used = f"used: it agrees with the reference here, at head dimension {HEAD_DIM}"
            checks.append(Check(name, reason is None, f"not used: {reason}" if reason else used))
    return checks


def _family(model_types: tuple[str, ...], notes: str) -> str:
    return f"{', '.join(model_types)}. {notes}".rstrip(". ") + "."
