# SPDX-License-Identifier: Apache-2.0
"""A repository as the hub's client keeps it in its cache once it is downloaded."""

from __future__ import annotations

from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def repository_in_cache(cache: Path, repository: str) -> Path:
    """Make the folder of the files of a repository, which is empty."""
    kept = cache / f"models--{repository.replace('/', '--')}"
    snapshot = kept / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(COMMIT)
    return snapshot
