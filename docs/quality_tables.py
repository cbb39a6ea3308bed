# SPDX-License-Identifier: Apache-2.0
"""The text of docs/quality-tables.md, from the committed results; ``docs/make_quality.py`` writes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PLOTS = FOLDER / "quality"
"""Where the plots are looked for; ``benchmarks/quality.py`` draws them."""
GLANCE = (0.5, 0.25, 0.1, 0.05)
"""Retention rates of the first table."""
BY_TASK = ("plphp", "random1", "snapkv", "query_bank_equal", "query_bank", "oracle_ragged")
"""Methods that are shown task by task."""
AIMS = {0.5: 0.46, 0.25: 1.5, 0.1: 5.0}
"""Most points that were to be lost on questions about one region, by retention rate; the first is the paper's."""
ONE_REGION = ("one_image", "several_images")
OFF = 0.015
"""Difference of the measured KV from what was asked for, as a fraction, from which on a figure is marked."""
Figures = Mapping[str, Any]

HEAD = """# Quality: the tables

Made by `docs/make_quality.py` from the files in `benchmarks/results`; do not edit. [quality.md](quality.md) has the
answer on one screen, [evaluation.md](evaluation.md) how the figures come about and what they mean. The commands that
make them, in this order:

```bash
python benchmarks/quality.py bank          # queries of the model's answers, for query_bank, development split
python benchmarks/quality.py attention     # vision attention per layer, development split
python benchmarks/quality.py calibration   # fixed thresholds on other prompts, development split
python benchmarks/quality.py ablation      # choices within plphp and other evidence, development split
python benchmarks/quality.py transfer      # query_bank with a bank of other tasks, development split
python benchmarks/quality.py heads         # ragged heads, banks and candidates, development split
python benchmarks/quality.py test          # the methods of earlier years at all retention rates, test split
python benchmarks/quality.py rivals        # ragged heads, banks and this year's rivals, test split
python docs/make_quality.py
```

"""
READING = """Scores are per cent, with 95 % intervals of the paired bootstrap over samples. *KV* is the vision KV that
was really kept, measured, in per cent of the full cache's, mean over layers and KV heads; `snapkv` evicts text, too,
and each text entry that it evicts counts like a vision entry, so that equal KV is equal memory. The columns are what
was asked for; what was kept stands behind a figure, in brackets, where the two differ by more than 1.5 points: such a
figure is not at equal KV. A difference whose interval does not hold 0 is **bold**; an interval without width (all
samples right, or none) says only that no other outcome was seen. Groups are means over their tasks with equal weight,
and are never averaged together. `query_bank` ranks by queries of the model's answers to other prompts of the same
tasks, from the development split; no other method has seen any.
"""


def tables_page(results: Mapping[str, Any], others: Mapping[str, Any] | None = None) -> str:
    """The page's text.

    Parameters
    ----------
    results : mapping
        Figures of the test split, as ``plphp eval --results`` writes them.
    others : mapping, optional
        Further results by the names of `OTHERS`.
    """
    parts = [HEAD, _origin(results), READING, _summary(results), _aims(results)]
    for group in results["groups"]:
        parts.append(_group(results, group))
    parts += ["\n## Tasks\n\n", _tasks(results)]
    if results["refused"]:
        parts += ["\n## Left out\n\n", *(f"- `{name}`: {reason}\n" for name, reason in results["refused"].items())]
    for name, more in (others or {}).items():
        parts.append(OTHERS[name](more))
    return "".join(parts)


def _group(results: Mapping[str, Any], group: str) -> str:
    values, variants, title = results["groups"][group], results["variants"], group.replace("_", " ").capitalize()
    tasks = ", ".join(f"`{name}`" for name in values["tasks"])
    plot = PLOTS / f"score-{group}.png"
    parts = [f"\n## {title}\n\nMean over {tasks}; {values['samples']} samples.\n"]
    parts += [f"\n![{title}: score against measured KV]({plot.relative_to(FOLDER)})\n"] if plot.exists() else []
    tables = {
        "": _fixed(variants, values["variants"]),
        "score": _matrix(variants, values["variants"], lambda figures: _interval(figures, "score")),
        "difference from the full cache": _matrix(
            variants, values["variants"], lambda figures: _signed(figures, "vs_full")
        ),
        f"difference from `{results['baseline']}` at the same retention": _matrix(
            variants, values["variants"], lambda figures: _signed(figures, "vs_baseline")
        ),
        "measured KV": _matrix(variants, values["variants"], _kept, marked=False),
        "agreement with the full cache (%), and KL (nats)": _matrix(variants, values["variants"], _agreement),
    }
    for name, table in tables.items():
        if table:
            parts += [f"\n### {title}: {name}\n\n" if name else "\n", table]
    return "".join(parts)


def _summary(results: Mapping[str, Any]) -> str:
    """A line per method, a column per group: scores at the retentions of ``GLANCE``."""
    groups = results["groups"]
    full = [f"{100 * group['variants']['full']['score']['mean']:.1f}" for group in groups.values()]
    lines = [
        f"| | {' | '.join(name.replace('_', ' ') for name in groups)} |",
        f"|---|{'---|' * len(groups)}",
        f"| `full` | {' | '.join(full)} |",
    ]
    for label in dict.fromkeys(variant["label"] for variant in results["variants"]):
        own = {variant["retention"]: variant["name"] for variant in results["variants"] if variant["label"] == label}
        if set(GLANCE) <= set(own):
            scores = ([group["variants"][own[rate]]["score"]["mean"] for rate in GLANCE] for group in groups.values())
            cells = (" · ".join(f"{100 * score:.1f}" for score in of_group) for of_group in scores)
            lines.append(f"| `{label}` | {' | '.join(cells)} |")
    asked = " · ".join(f"{100 * rate:g}" for rate in GLANCE)
    about = f"Score with {asked} % of the vision KV.\n\n"
    return "\n## At a glance\n\n" + about + "\n".join(lines) + "\n"


def _aims(results: Mapping[str, Any]) -> str:
    """What plphp and the variant with other evidence lose, beside what was aimed at; empty if not measured."""
    names = {(variant["label"], variant["retention"]): variant["name"] for variant in results["variants"]}
    needed = [(label, rate) for label in ("plphp", "query_bank", "oracle") for rate in AIMS]
    if any(pair not in names for pair in needed) or results["baseline"] != "random1":
        return ""
    lines = [
        "| | KV | `plphp` | aim | `query_bank` | of the loss of `plphp` | `query_bank` less `random1` | `oracle` |",
        f"|{'---|' * 8}",
    ]
    for group, values in results["groups"].items():
        for rate, aim in AIMS.items():
            faithful, variant, ceiling = (
                values["variants"][names[label, rate]] for label in ("plphp", "query_bank", "oracle")
            )
            lost = variant["vs_full"]["mean"] / faithful["vs_full"]["mean"] if faithful["vs_full"]["mean"] else 0.0
            cells = (
                group.replace("_", " "),
                f"{100 * rate:g}",
                _signed(faithful, "vs_full"),
                f"-{aim:g}" if group in ONE_REGION else "",
                _signed(variant, "vs_full"),
                f"{100 * lost:.0f} %",
                _signed(variant, "vs_baseline"),
                _signed(ceiling, "vs_full"),
            )
            lines.append(f"| {' | '.join(cells)} |")
    about = (
        "Difference in score from the full cache. The aim for `plphp` on questions about one region is the paper's "
        "figure at 50 %, and 1.5 and 5 points at 25 and 10 %; the aim for `query_bank` is at most half of the loss of "
        "`plphp` on several regions and in dialogues at 50 and 25 %, and to be nowhere below random draws, here "
        "`random1`.\n\n"
    )
    return "\n## What was aimed at\n\n" + about + "\n".join(lines) + "\n" + _ahead(results)


def _ahead(results: Mapping[str, Any]) -> str:
    """Which methods score higher than plphp at the same retention."""
    lines = []
    for group, values in results["groups"].items():
        for rate in AIMS:
            at_rate = [variant for variant in results["variants"] if variant["retention"] == rate]
            scores = {variant["label"]: values["variants"][variant["name"]]["score"]["mean"] for variant in at_rate}
            higher = [f"`{label}`" for label, score in scores.items() if score > scores["plphp"]]
            lines.append(f"- {group.replace('_', ' ')}, {100 * rate:g} %: {', '.join(higher) or 'none'}\n")
    about = "\nMethods that score higher than `plphp`, which was to be below none that needs no training:\n\n"
    return about + "".join(lines)


def _origin(results: Mapping[str, Any]) -> str:
    model, settings, hardware = results["model"], results["settings"], results["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    rows = {
        "model": f"{settings['model'] or 'the bundled model'}: {model['model_class']}, "
        f"{model['parameters'] / 1e6:.1f} M parameters, {model['decoder_layers']} layers, {model['dtype']}",
        "weights": f"SHA-256 `{model['sha256']}`",
        "samples": f"{settings['samples']} a task, split `{settings['split']}`, seed {settings['seed']}",
        "command": f"`{results['command']}`",
        "hardware": f"{hardware['device']}, {hardware['cores']} cores",
        "versions": versions,
        "date": results["date"],
    }
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items()) + "\n"


def _interval(figures: Figures, name: str) -> str:
    mean, low, high = (100 * figures[name][key] for key in ("mean", "low", "high"))
    return f"{mean:.1f} ({low:.1f}, {high:.1f})"


def _signed(figures: Figures, name: str) -> str:
    if name not in figures:
        return ""
    mean, low, high = (100 * figures[name][key] for key in ("mean", "low", "high"))
    mark = "**" if low > 0 or high < 0 else ""
    return f"{mark}{mean:+.1f}{mark} ({low:+.1f}, {high:+.1f})"


def _kept(figures: Figures) -> str:
    return f"{100 * figures['kept']:.1f}"


def _agreement(figures: Figures) -> str:
    return f"{100 * figures['agreement']:.1f}; {figures['kl']:.4f}" if "agreement" in figures else ""


def _fixed(variants: list[Figures], figures: Mapping[str, Figures]) -> str:
    """The full cache, the controls, and methods whose settings say how much they keep."""
    lines = ["| | KV | score | difference from full | agreement (%); KL |", "|---|---|---|---|---|"]
    for variant in variants:
        if variant["retention"] is None:
            own = figures[variant["name"]]
            cells = (_kept(own), _interval(own, "score"), _signed(own, "vs_full"), _agreement(own))
            lines.append(f"| `{variant['label']}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _matrix(
    variants: list[Figures], figures: Mapping[str, Figures], cell: Callable[[Figures], str], *, marked: bool = True
) -> str:
    """A line per method, a column per retention; empty where no cell says anything."""

    def shown(measured: Figures, rate: float) -> str:
        text = cell(measured)
        return f"{text} [{_kept(measured)}]" if text and marked and abs(measured["kept"] - rate) > OFF else text

    asked = [variant for variant in variants if variant["retention"] is not None]
    rates = sorted({variant["retention"] for variant in asked}, reverse=True)
    lines = [f"| | {' | '.join(f'{100 * rate:g} %' for rate in rates)} |", f"|---|{'---|' * len(rates)}"]
    rows = {}
    for label in dict.fromkeys(variant["label"] for variant in asked):
        own = {variant["retention"]: figures[variant["name"]] for variant in asked if variant["label"] == label}
        rows[label] = [shown(own[rate], rate) if rate in own else "" for rate in rates]
    if not any(map(any, rows.values())):
        return ""
    return "\n".join([*lines, *(f"| `{label}` | {' | '.join(cells)} |" for label, cells in rows.items())]) + "\n"


def _tasks(results: Mapping[str, Any]) -> str:
    """The full cache beside what can be had without seeing, which a task must not survive."""
    labels = {variant["label"]: variant["name"] for variant in results["variants"] if variant["retention"] is None}
    shown = [label for label in ("full", "zero", "blank") if label in labels]
    lines = [
        f"| task | group | metric | chance | {' | '.join(shown)} | in the mean |",
        f"|---|---|---|---|{'---|' * (len(shown) + 1)}",
    ]
    for name, task in results["tasks"].items():
        scores = [f"{100 * task['variants'][labels[label]]['score']['mean']:.1f}" for label in shown]
        known = (f"`{name}`", task["group"], task["metric"].replace("_", " "), f"{100 * task['chance']:.1f}")
        lines.append(f"| {' | '.join((*known, *scores, 'yes' if task['scored'] else 'no'))} |")
    about = (
        "`full`: the full cache. `zero`: every vision token evicted after prefill. `blank`: uniform grey images.\n\n"
    )
    return about + "\n".join(lines) + "\n" + _by_task(results)


def _by_task(results: Mapping[str, Any]) -> str:
    """What the means over groups hide: some methods, task by task."""
    names = {(variant["label"], variant["retention"]): variant["name"] for variant in results["variants"]}
    labels = [label for label in BY_TASK if all((label, rate) in names for rate in GLANCE)]
    if not labels:
        return ""
    lines = [
        f"| task | {' | '.join(f'`{label}`' for label in labels)} |",
        f"|---|{'---|' * len(labels)}",
    ]
    for task, values in results["tasks"].items():
        cells = []
        for label in labels:
            scores = [values["variants"][names[label, rate]]["score"]["mean"] for rate in GLANCE]
            cells.append(" · ".join(f"{100 * score:.1f}" for score in scores))
        lines.append(f"| {' | '.join((f'`{task}`', *cells))} |")
    rates = " · ".join(f"{100 * rate:.0f}" for rate in GLANCE)
    return f"\nTask by task, at {rates} % of the vision KV:\n\n" + "\n".join(lines) + "\n"


def _ablation(results: Mapping[str, Any]) -> str:
    settings, variants = results["settings"], results["variants"]
    parts = [
        "\n## Ablation\n\nChoices within plphp, one at a time, and other evidence than its last row: "
        f"{settings['samples']} samples a task, split `{settings['split']}`. Difference in score from "
        f"`{results['baseline']}` at the same retention.\n"
    ]
    for group, values in results["groups"].items():
        table = _matrix(variants, values["variants"], lambda figures: _signed(figures, "vs_baseline"))
        parts += [f"\n### Ablation: {group.replace('_', ' ')}\n\n", table]
    return "".join(parts)


def _transfer(results: Mapping[str, Any]) -> str:
    parts = [
        "\n## Does the bank carry over?\n\n`query_bank` on each group with a bank that was collected on the tasks of "
        f"the other groups alone, beside the bank of all groups: {results['samples']} samples a task, split "
        f"`{results['split']}`. Score, and difference from the bank of all groups at the same retention.\n"
    ]
    for group, values in results["groups"].items():
        scores = _matrix(values["variants"], values["figures"], lambda figures: _interval(figures, "score"))
        signed = _matrix(values["variants"], values["figures"], lambda figures: _signed(figures, "vs_baseline"))
        parts += [f"\n### {group.replace('_', ' ').capitalize()} with a bank of other groups\n\n", scores, "\n", signed]
    return "".join(parts)


def _attention(results: Mapping[str, Any]) -> str:
    lines = [f"- {statement}" for statement in results["re_attention"].values()]
    plots = [
        f"\n![{title}]({(PLOTS / name).relative_to(FOLDER)})\n"
        for name, title in (("vision-attention.png", "vision attention by layer"), ("heads.png", "by layer and head"))
        if (PLOTS / name).exists()
    ]
    about = f"Over {results['prompts']} prompts of the development split; see [calibration.md](calibration.md).\n\n"
    return "".join(["\n## Vision attention\n\n", about, "\n".join(lines), "\n", *plots])


def _calibration(results: Mapping[str, Any]) -> str:
    names = [name for name in results["targets"][0] if name not in ("target", "config")]
    lines = [f"| target | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for row in results["targets"]:
        cells = [f"{row[name]['retention_mean']:.3f} ± {row[name]['retention_std']:.3f}" for name in names]
        lines.append(f"| {row['target']} | {' | '.join(cells)} |")
    first = results["targets"][0][names[0]]
    about = (
        f"Retention measured from the caches, mean and standard deviation over {first['prompts']} prompts of "
        f"the development split ({first['vision_tokens_min']} to {first['vision_tokens_max']} vision "
        "tokens): thresholds that `plphp.calibrate` found on some prompts, on those and on others; beside it "
        "`target_retention`, which takes the quantiles of each prompt.\n\n"
    )
    return "\n## Calibration\n\n" + about + "\n".join(lines) + "\n"


OTHERS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "ablation": _ablation,
    "transfer": _transfer,
    "attention": _attention,
    "calibration": _calibration,
}
"""Further results by the name of their file: what they add to the page."""
