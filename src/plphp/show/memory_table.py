# SPDX-License-Identifier: Apache-2.0
"""What a cache with a budget holds of each image, as a table and in a few words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from .quantities import human_bytes

if TYPE_CHECKING:
    from plphp.pruning.report import PruneReport

ROOM = 0.25
"""Part of a budget that is room for more of an image; less is left where no further entry fits every layer."""


def memory_table(report: PruneReport) -> Table | None:
    """Table of the images: what is held of each, in which rungs; None without a budget.

    Parameters
    ----------
    report : PruneReport
        Report of a run.
    """
    if not report.images:
        return None
    rungs = list(dict.fromkeys(name for image in report.images for name in image.entries))
    several = report.batch > 1
    table = Table(title=memory_line(report))
    for heading in (
        "image",
        *(("row",) if several else ()),
        "turn",
        "tokens",
        "bytes",
        "held",
        "asked",
        "kept",
        *rungs,
    ):
        table.add_column(heading, justify="right", overflow="fold")
    for image in report.images:
        cells = [str(image.number), *([str(image.row)] if several else []), str(image.turn), str(image.tokens)]
        if image.forgotten:
            cells += ["forgotten"]
        else:
            asked = f"{image.attention:.2f}{' wanted' if image.wanted else ''}"
            cells += [human_bytes(image.nbytes), f"{image.held:.1%}", asked, f"{image.vision_kept:.0%}"]
            cells += [str(image.entries[name]) if name in image.entries else "" for name in rungs]
        table.add_row(*cells)
    return table


def wanted_line(report: PruneReport) -> str:
    """Line on the images that the newest answer turns to though they have faded most of the way, and on what may help;
    empty without any."""
    faded = ", ".join(f"image {image.number} (faded to {image.held:.1%} of its bytes)" for image in report.wanted)
    if not faded:
        return ""
    if restoring_may_help(report):
        return f"The answer turns to {faded}: restoring may help."
    return f"The answer turns to {faded}, and no other image is held: a larger vision_budget would hold more of it."


def restoring_may_help(report: PruneReport) -> bool:
    """Whether more could be held of an image: there is another that makes room for it, or the budget has room."""
    others = sum(image.nbytes > 0 for image in report.images) > 1
    return others or report.vision_bytes < (1 - ROOM) * report.budget_bytes


def memory_line(report: PruneReport) -> str:
    """How much the images take of their budget, in a few words; empty without a budget."""
    if not report.budget_bytes:
        return ""
    held = human_bytes(report.vision_bytes)
    host = f", {human_bytes(report.host_bytes)} in host memory" if report.host_bytes else ""
    images = "1 image" if len(report.images) == 1 else f"{len(report.images)} images"
    return f"{images} in {held} of a budget of {human_bytes(report.budget_bytes)}{host}"
