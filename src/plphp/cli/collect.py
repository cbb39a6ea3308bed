# SPDX-License-Identifier: Apache-2.0
"""``plphp collect``: queries of the model's own answers, for the method ``query_bank``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ._app import app, loading_bars, note_on_bundled, print_json, progress
from ._checks import check_in_file, check_model, check_out_file
from ._options import (
    AllowUrlsOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    PromptsOption,
    SeedOption,
    option,
)
from ._prompts import fitting_processor


@app.command()
def collect(
    prompts: PromptsOption,
    out: Annotated[Path, option(None, "safetensors file to write the query bank to.")],
    model: ModelOption = None,
    samples: Annotated[int, option(None, "Tokens of answers whose queries are kept.", min=1, show_default=True)] = 400,
    max_new_tokens: Annotated[int, option(None, "Longest answer.", min=2, show_default=True)] = 128,
    allow_urls: AllowUrlsOption = False,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let the model answer prompts like yours, unpruned, and keep a sample of the queries of its answers."""
    check_in_file(prompts, "prompts")
    check_out_file(out, "query bank")
    check_model(model, dtype, device)
    with progress("loading plphp", quiet=as_json) as tell:
        from plphp.inputs.loading import load_weights
        from plphp.inputs.prompts_file import prompt_inputs, read_prompts
        from plphp.studies.bank_collecting import collect_query_bank

        given = read_prompts(prompts, allow_urls=allow_urls)
        processor = fitting_processor(model, given, tell)
    note_on_bundled(model, quiet=as_json)
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
