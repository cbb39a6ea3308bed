# SPDX-License-Identifier: Apache-2.0
"""``plphp methods``, ``plphp families`` and ``plphp doctor``: what plphp supports, and what works here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from ._app import app, console, print_json, progress
from ._options import JsonOption, option

UNUSABLE = 1


@app.command()
def methods(as_json: JsonOption = False) -> None:
    """List the pruning methods: what each keeps, when to take it, and its options; the ladders and rungs of tiers."""
    from plphp.methods.registry import methods_by_stage
    from plphp.settings.ladder import LADDERS, PLAIN_RUNGS, PRODUCT_RUNGS

    known = methods_by_stage()
    options = {method.name: {name: option.default for name, option in method.options.items()} for method in known}
    if as_json:
        names = ("name", "summary", "when", "paper")
        print_json(
            [
                {"stage": ", ".join(method.stages), "options": options[method.name]}
                | {name: getattr(method, name) for name in names}
                for method in known
            ]
        )
        return
    rows = []
    for method in known:
        about = [f"{method.summary}.", f"Take it {method.when}."]
        values = ", ".join(f"{name}={default}" for name, default in options[method.name].items())
        about += [f"Options: {values}."] if values else []
        columns = {"name": method.name, "stage": ", ".join(method.stages), "what it does": " ".join(about)}
        rows.append({**columns, "paper": method.paper})
    _print(rows, as_json=False)
    _print([{"ladder (tiers=...)": name, "rungs and shares": text} for name, text in LADDERS.items()], as_json=False)
    rungs = [
        {"rung": name, "bits a channel, head dimension 128": f"{bits:g}", "needs codebooks": needed}
        for names, needed in ((PLAIN_RUNGS, "no"), (PRODUCT_RUNGS, "yes"))
        for name, bits in names.items()
    ]
    _print(rungs, as_json=False)


@app.command()
def families(as_json: JsonOption = False) -> None:
    """List the model families that can be pruned."""
    from plphp.families.registry import available_families

    known = available_families().values()
    rows = [{"name": family.name, "model types": list(family.model_types), "notes": family.notes} for family in known]
    _print(rows, as_json)


@app.command()
def doctor(
    model: Annotated[str | None, option(None, "Check this hub id or folder.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show versions, devices, and what is unsupported here and why; exit code 1 if plphp cannot be used.

    The last line is the verdict.
    """
    with progress("looking around", quiet=as_json):
        from plphp.studies.doctor import diagnose

        diagnosis = diagnose(model)
    if as_json:
        print_json({**dataclasses.asdict(diagnosis), "usable": diagnosis.usable, "verdict": diagnosis.verdict})
    else:
        out = console()
        for field in dataclasses.fields(diagnosis):
            checks = getattr(diagnosis, field.name)
            table = Table(title=field.name, title_justify="left", show_header=False, box=None)
            for check in checks if isinstance(checks, list) else [checks]:
                table.add_row("yes" if check.ok else "no ", Text(check.name), Text(check.detail))
            out.print(table, "")
        print(diagnosis.verdict)
    if not diagnosis.usable:
        raise typer.Exit(UNUSABLE)


def _print(rows: Sequence[Mapping[str, object]], as_json: bool) -> None:
    if as_json:
        print_json([{key.replace(" ", "_"): value for key, value in row.items()} for row in rows])
        return
    first, *others = rows[0]
    table = Table(Column(first, no_wrap=True), *others, show_lines=True)
    for row in rows:
        texts = (", ".join(value) if isinstance(value, list) else str(value) for value in row.values())
        table.add_row(*map(Text, texts))
    console().print(table)
