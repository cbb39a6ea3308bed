# SPDX-License-Identifier: Apache-2.0
"""``plphp profile``: how much of its attention each layer and head gives to the image."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from plphp.errors import ConfigError
from plphp.inputs.image_source import located_image

from ._app import app, console, print_json, progress
from ._checks import check_in_file, check_model, check_out_folder, check_text
from ._models import processor_for_prompts, weights_of
from ._options import AllowUrlsOption, DeviceOption, DtypeOption, JsonOption, ModelOption, option


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
    with progress("loading plphp", quiet=as_json) as show:
        from plphp.inputs.prompts_file import Prompt, prompt_inputs, read_prompts
        from plphp.show.measurement_tables import profile_table
        from plphp.show.plots import new_figure
        from plphp.show.profile_plots import plot_heads, plot_profile
        from plphp.studies.profiling import profile as measure

        if plots:
            new_figure()  # says now, not after the measurement, that matplotlib is missing
        questions = [Prompt(images, question)] if prompts is None else read_prompts(prompts, allow_urls=allow_urls)
        out.mkdir(parents=True, exist_ok=True)
        processor = processor_for_prompts(model, questions, show)
    weights = weights_of(model, dtype, device, quiet=as_json)
    with progress("profiling", quiet=as_json) as show:
        inputs = prompt_inputs(processor, questions, weights.device)
        measured = measure(weights, inputs, rows, progress=lambda step: show(f"{step} of {len(questions)}"))
    files = [out / "profile.json"]
    measured.to_json(files[0])
    if plots:
        for name, figure in (("vision-attention.png", plot_profile(measured)), ("heads.png", plot_heads(measured))):
            files.append(out / name)
            figure.savefig(files[-1], dpi=150)
    if as_json:
        statements = {str(choice): dataclasses.asdict(measured.re_attention(choice)) for choice in rows}
        names = [str(file) for file in files]
        print_json({"files": names, "prompts": len(measured.prompts), "re_attention": statements})
        return
    console().print(profile_table(measured))
    for choice in rows:
        print(measured.re_attention(choice))
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
