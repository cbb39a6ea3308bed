# SPDX-License-Identifier: Apache-2.0
"""The weights of a model that vLLM runs by the hash of the files that they were loaded from.

Not of the weights in memory: vLLM joins, splits and packs them for the processor that it runs on, and gives some of
their tensors up. So the hash is another than that of the same checkpoint in transformers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from plphp.errors import UnsupportedFeatureError

THREADS = 8


def weight_files(runner: Any) -> list[Path]:
    """The files that vLLM has loaded the weights of its model from.

    Parameters
    ----------
    runner : vllm.v1.worker.gpu_model_runner.GPUModelRunner
        Holds the model.

    Raises
    ------
    UnsupportedFeatureError
        If the weights are not those of a checkpoint of the hub's form.
    """
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    config, model = runner.model_config, runner.get_model()
    loader = get_model_loader(runner.vllm_config.load_config)
    if not isinstance(loader, DefaultModelLoader):
        raise UnsupportedFeatureError(
            f"A query bank is kept by the weights that it is of, and those of --load-format "
            f"{loader.load_config.load_format} are in no files of a checkpoint: leave out the option 'folder', or give "
            "the file of a bank with 'bank'."
        )
    primary = DefaultModelLoader.Source(
        config.model,
        config.revision,
        fall_back_to_pt=getattr(model, "fall_back_to_pt_during_load", True),
        allow_patterns_overrides=getattr(model, "allow_patterns_overrides", None),
    )
    files: list[Path] = []
    for source in (primary, *getattr(model, "secondary_weights", ())):
        _, names, _, _ = loader._prepare_weights(
            source.model_or_path,
            source.subfolder,
            source.revision,
            source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )
        files += map(Path, names)
    return files


def files_hash(files: Iterable[Path]) -> str:
    """SHA-256 over the names, sizes and bytes of files, in the order of their names; wherever they lie.

    Parameters
    ----------
    files : iterable of Path
        Several are read at once.
    """
    ordered = sorted(files, key=lambda file: file.name)
    digest = hashlib.sha256()
    with ThreadPoolExecutor(THREADS) as threads:
        for file, own in zip(ordered, threads.map(_file_hash, ordered), strict=True):
            digest.update(f"{file.name} {file.stat().st_size} {own};".encode())
    return digest.hexdigest()


def _file_hash(file: Path) -> str:
    with file.open("rb", buffering=0) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
