# SPDX-License-Identifier: Apache-2.0
"""``plphp collect``: queries of the model's own answers, for the method ``query_bank``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._app import JsonOption, app, loading_bars, print_json, progress
from ._prompts import check_out_file, fitting_processor


@app.command()
def collect(
    prompts: Annotated[Path, typer.Option(help='JSON Lines: {"images": [paths], "question": text}, or "turns".')],
    out: Annotated[Path, typer.Option(help="safetensors file to write the query bank to.")],
    model: Annotated[str | None, typer.Option(help="Hub id or folder; default: the bundled model.")] = None,
    samples: Annotated[int, typer.Option(help="Tokens of answers whose queries are kept.", min=1)] = 400,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=2)] = 128,
    seed: Annotated[int, typer.Option(help="Of the sample.", min=0)] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """Let the model answer prompts like yours, unpruned, and keep a sample of the queries of its answers."""
    check_out_file(out, "query bank")
    with progress("loading plphp", quiet=as_json) as tell:
        from plphp.collecting import collect_query_bank
        from plphp.loading import load_weights
        from plphp.prompts_file import prompt_inputs, read_prompts

        given = read_prompts(prompts)
        processor = fitting_processor(model, given, tell)
    with loading_bars(quiet=as_json):
        weights = load_weights(model, dtype, device)
    with progress("answering", quiet=as_json) as tell:
        found = collect_query_bank(
            weights,
            prompt_inputs(processor, given, weights.device),
            samples=samples,
            max_new_tokens=max_new_tokens,
            seed=seed,
            progress=lambda step: tell(f"{step} of {len(given)}"),
        )
    found.save(out)
    if as_json:
        print_json({"file": str(out), **found.record})
        return
    tokens = f"{found.record['samples']} of {found.record['answer_tokens']} tokens"
    print(f"queries of {tokens} in {found.record['prompts']} answer(s)")
    print(out)
