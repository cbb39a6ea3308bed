# SPDX-License-Identifier: Apache-2.0
"""``plphp inspect`` and ``plphp plot``: show what a run kept, from its report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from plphp.inputs.media import load_image

from ._app import app, console, print_json
from ._checks import check_in_file, check_out_folder
from ._options import AllowUrlsOption, JsonOption, argument, option

ReportArgument = Annotated[Path, argument("Report written by `plphp generate --report`.")]
RowOption = Annotated[int, option(None, "Row of the batch; default 0.", min=0)]


@app.command()
def inspect(report: ReportArgument, row: RowOption = 0, as_json: JsonOption = False) -> None:
    """Show what a run kept, layer by layer."""
    check_in_file(report, "report")
    from plphp.pruning.report import PruneReport
    from plphp.show.tables import layer_tables, report_values, summary

    kept = PruneReport.from_json(report)
    if as_json:
        print_json(report_values(kept))
        return
    tables = layer_tables(kept, row)
    print(f"{kept.model_class} ({kept.model_type})\n{summary(kept)}")
    if tables:
        console().print(*tables)


@app.command()
def plot(
    report: ReportArgument,
    out: Annotated[Path, option(None, "Folder for the PNG files; made if missing.")],
    image: Annotated[list[str] | None, option(None, "Image file of the prompt, in order.")] = None,
    allow_urls: AllowUrlsOption = False,
    layer: Annotated[int | None, option(None, "Layer whose heads are drawn; default: the first.")] = None,
    row: RowOption = 0,
    prompt: Annotated[int, option(None, "Prompt (turn of the chat); default 0.", min=0)] = 0,
    as_json: JsonOption = False,
) -> None:
    """Draw kept tokens per layer and per head over the images, and vision attention over the layers."""
    check_in_file(report, "report")
    images = [load_image(source, allow_urls=allow_urls) for source in image or ()] or None
    check_out_folder(out)
    from plphp.pruning.report import PruneReport
    from plphp.show.plots import plot_kept, plot_vision_attention
    from plphp.show.tables import layer_rows

    kept = PruneReport.from_json(report)
    shown = layer_rows(kept, prompt, row)[0][0] if layer is None else layer
    figures = {
        "kept-per-layer.png": plot_kept(kept, images, prompt=prompt, row=row),
        f"kept-per-head-layer-{shown}.png": plot_kept(kept, images, layer=shown, prompt=prompt, row=row),
        "vision-attention.png": plot_vision_attention(kept, prompt=prompt, row=row),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=150)
    files = [str(out / name) for name in figures]
    if as_json:
        print_json({"files": files})
    else:
        print("\n".join(files))
