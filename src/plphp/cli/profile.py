# SPDX-License-Identifier: Apache-2.0
"""``plphp profile``: how much of its attention each layer and head gives to the image."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from plphp.errors import ConfigError
from plphp.inputs.image_source import located_image

from ._app import app, console, loading_bars, note_on_bundled, print_json, progress
from ._checks import check_in_file, check_model, check_out_folder, check_text
from ._options import AllowUrlsOption, DeviceOption, DtypeOption, JsonOption, ModelOption, option
from ._prompts import fitting_processor


@app.command()
def profile(
    out: Annotated[Path, option(None, "Folder for profile.json and the plots; made if missing.")],
    model: ModelOption = None,
    prompts: Annotated[
        Path | None, option(None, 'JSON Lines: {"images": [paths], "question": text}, or "turns".')
    ] = None,
    image: Annotated[list[str] | None, option(None, "Image file of a single prompt; may be repeated.")] = None,
    question: Annotated[str | None, option(None, "Question of the single prompt.")] = None,
    allow_urls: AllowUrlsOption = False,
    query_rows: Annotated[
        str, option(None, "Whose attention: the last n prompt tokens, or text (after the images).", show_default=True)
    ] = "1,text",
    plots: Annotated[bool, option(None, "Draw plots, which needs matplotlib.", show_default=True)] = True,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure vision attention per layer and head over prompts: does it fall and rise again with depth?"""
    rows = _rows(query_rows)
    _check_prompts(prompts, image, question)
    images = tuple(located_image(source, allow_urls=allow_urls) for source in image or ())
    check_out_folder(out)
    check_model(model, dtype, device)
    with progress("loading plphp", quiet=as_json) as tell:
        from plphp.inputs.loading import load_weights
        from plphp.inputs.prompts_file import Prompt, prompt_inputs, read_prompts
        from plphp.show.measurement_tables import profile_table
        from plphp.show.plots import new_figure
        from plphp.show.profile_plots import plot_heads, plot_profile
        from plphp.studies.profiling import profile as measure

        if plots:
            new_figure()  # says now, not after the measurement, that matplotlib is missing
        given = [Prompt(images, question)] if prompts is None else read_prompts(prompts, allow_urls=allow_urls)
        out.mkdir(parents=True, exist_ok=True)
        processor = fitting_processor(model, given, tell)
    note_on_bundled(model, quiet=as_json)
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


def _check_prompts(path: Path | None, images: list[str] | None, question: str | None) -> None:
    if (path is None) == (question is None):
        raise ConfigError("Give either --prompts, or --question with --image.")
    if path is not None and images:
        raise ConfigError("--image goes with --question: a prompts file names its images itself.")
    check_in_file(path, "prompts")
    check_text(question, "--question")
