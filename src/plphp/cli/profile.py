# SPDX-License-Identifier: Apache-2.0
"""``plphp profile``: how much of its attention each layer and head gives to the image."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plphp.errors import ConfigError

from ._app import JsonOption, app, console, loading_bars, print_json, progress
from ._prompts import fitting_processor

if TYPE_CHECKING:
    from plphp.prompts_file import Prompt


@app.command()
def profile(
    out: Annotated[Path, typer.Option(help="Folder for profile.json and the plots; made if missing.")],
    model: Annotated[str | None, typer.Option(help="Hub id or folder; default: the bundled model.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='JSON Lines: {"images": [paths], "question": text}, or "turns".')
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Image file of a single prompt; may be repeated.")] = None,
    question: Annotated[str | None, typer.Option(help="Question of the single prompt.")] = None,
    query_rows: Annotated[
        str, typer.Option(help="Whose attention: the last n prompt tokens, or text (after the images).")
    ] = "1,text",
    plots: Annotated[bool, typer.Option(help="Draw plots, which needs matplotlib.")] = True,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure vision attention per layer and head over prompts: does it fall and rise again with depth?"""
    rows = _rows(query_rows)
    with progress("loading plphp", quiet=as_json) as tell:
        from plphp.loading import load_weights
        from plphp.measurement_tables import profile_table
        from plphp.plots import new_figure
        from plphp.profile_plots import plot_heads, plot_profile
        from plphp.profiling import profile as measure
        from plphp.prompts_file import prompt_inputs

        if plots:
            new_figure()  # says now, not after the measurement, that matplotlib is missing
        given = _prompts(prompts, image, question)
        out.mkdir(parents=True, exist_ok=True)
        processor = fitting_processor(model, given, tell)
    with loading_bars(quiet=as_json):
        weights = load_weights(model, dtype, device)
    with progress("profiling", quiet=as_json) as tell:
        inputs = prompt_inputs(processor, given, weights.device)
        found = measure(weights, inputs, rows, progress=lambda step: tell(f"{step} of {len(given)}"))
    files = [out / "profile.json"]
    found.to_json(files[0])
    if plots:
        for name, figure in (("vision-attention.png", plot_profile(found)), ("heads.png", plot_heads(found))):
            files.append(out / name)
            figure.savefig(files[-1], dpi=150)
    if as_json:
        statements = {str(one): dataclasses.asdict(found.re_attention(one)) for one in rows}
        print_json({"files": [str(file) for file in files], "prompts": len(found.prompts), "re_attention": statements})
        return
    console().print(profile_table(found))
    for one in rows:
        print(found.re_attention(one))
    print(*files, sep="\n")


def _rows(text: str) -> tuple[Any, ...]:
    """Query rows from text such as ``1,8,text``."""
    rows = [part.strip() for part in text.split(",")]
    return tuple(int(part) if part.isdecimal() else part for part in rows)


def _prompts(path: Path | None, images: list[Path] | None, question: str | None) -> list[Prompt]:
    from plphp.prompts_file import Prompt, read_prompts

    if (path is None) == (question is None):
        raise ConfigError("Give either --prompts, or --question with --image.")
    if path is None:
        return [Prompt(tuple(images or ()), question)]
    if images:
        raise ConfigError("--image goes with --question: a prompts file names its images itself.")
    return read_prompts(path)
