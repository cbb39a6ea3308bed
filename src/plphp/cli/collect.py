# SPDX-License-Identifier: Apache-2.0
"""``plphp collect``: queries of the model's own answers, for the method ``query_bank``, and codebooks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ._app import app, print_json, progress
from ._checks import check_in_file, check_model, check_out_file
from ._models import processor_for_prompts, weights_of
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


@app.command()
def collect(
    prompts: PromptsOption,
    out: Annotated[Path, option(None, "safetensors file to write the query bank to.")],
    model: ModelOption = None,
    samples: Annotated[int, option(None, "Tokens of answers whose queries are kept.", min=1, show_default=True)] = 400,
    book_tokens: Annotated[
        int, option(None, "Vision tokens that codebooks are learned from.", min=1, show_default=True)
    ] = 4096,
    max_new_tokens: Annotated[int, option(None, "Longest answer.", min=2, show_default=True)] = 128,
    allow_urls: AllowUrlsOption = False,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let the model answer prompts like yours, unpruned, and keep queries of its answers, and codebooks."""
    check_in_file(prompts, "prompts")
    check_out_file(out, "query bank")
    check_model(model, dtype, device)
    with progress("loading plphp", quiet=as_json) as show:
        from plphp.inputs.prompts_file import prompt_inputs, read_prompts
        from plphp.studies.bank_collecting import collect_query_bank

        questions = read_prompts(prompts, allow_urls=allow_urls)
        processor = processor_for_prompts(model, questions, show)
    weights = weights_of(model, dtype, device, quiet=as_json)
    with progress("answering", quiet=as_json) as show:
        bank = collect_query_bank(
            weights,
            prompt_inputs(processor, questions, weights.device),
            samples=samples,
            book_tokens=book_tokens,
            max_new_tokens=max_new_tokens,
            seed=seed,
            progress=lambda step: show(f"{step} of {len(questions)}"),
        )
    bank.save(out)
    if as_json:
        print_json({"file": str(out), **bank.record})
        return
    tokens = f"{bank.record['samples']} of {bank.record['answer_tokens']} tokens"
    print(f"queries of {tokens} in {bank.record['prompts']} answer(s)")
    if bank.books is None:
        print("no codebooks: no product code fits the heads of this model, or no prompt had finite keys and values")
    else:
        print(f"codebooks from {bank.record['book_tokens']} vision tokens of {bank.record['book_prompts']} prompt(s)")
    print(out)
