# SPDX-License-Identifier: Apache-2.0
"""What is held of each image of a chat: as the cache knows it under a budget, else by what its report says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from .images_held import images_held, images_table
from .memory_table import memory_table

if TYPE_CHECKING:
    from plphp.pruning.report import PruneReport


def image_values(report: PruneReport) -> list[dict[str, Any]]:
    """Return what is held of each image of a chat, ready for JSON."""
    return [image.values() for image in (report.images if report.budget_bytes else images_held(report))]


def image_table(report: PruneReport) -> Table | None:
    """Table of what is held of each image of a chat; None without images."""
    if report.budget_bytes:
        return memory_table(report)
    images = images_held(report)
    return images_table(images) if images else None
