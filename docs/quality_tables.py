# SPDX-License-Identifier: Apache-2.0
"""The text of docs/quality-tables.md, from the committed results; ``docs/make_quality.py`` writes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from memory_tables import memory_section
from stage_tables import chains_section, important_section, stages_section
from tier_tables import bits_section, ladders_section, section

FOLDER = Path(__file__).parent
PLOTS = FOLDER / "quality"
"""Where the plots are looked for; ``benchmarks/quality.py`` draws them."""
GLANCE = (0.5, 0.25, 0.1, 0.05)
"""Retention rates of the first table."""
BY_TASK = ("plphp", "random1", "snapkv", "query_bank_equal", "query_bank", "oracle_ragged")
"""Methods that are shown task by task."""
OVER_EQUAL = {0.1: 12, 0.05: 15}
"""Points by which ragged heads were to be above equal ones, by retention rate."""
BELOW_FULL = {0.5: 1, 0.25: 4}
"""Most points below the full cache that were aimed at."""
OWN_BANK_RATES, OWN_BANK_OFF = (0.25, 0.1, 0.05), 4
"""Where the bank of 16 prompts was to be within so many points of the bundled one."""
CLEAR_FROM = 0.25
"""From this rate down query_bank was to be above every rival by more than the intervals."""
RIVALS = (
    *("snapkv", "snapkv_vision", "pyramidkv", "vl_cache", "zipvl", "fastv", "vtw", "plphp", "uniform", "random1"),
    *("adakv", "expected_attention", "expected_attention_ragged", "mixkv", "tgv_kv", "downsample"),
)
"""What query_bank is held against there: methods that have seen no other prompt, which ``mixkv_bank`` has."""
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
python benchmarks/quality.py ladders       # ladders and rungs, development split
python benchmarks/quality.py test          # the methods of earlier years at all retention rates, test split
python benchmarks/quality.py rivals        # ragged heads, banks and this year's rivals, test split
python benchmarks/quality.py tiers         # few bits in the place of eviction, test split
python benchmarks/quality.py bits          # every entry in one rung, test split
python benchmarks/quality.py early --samples 80   # what leaves before and inside the text model, test split
python benchmarks/quality.py chains --samples 125 # half of the tokens, then a quarter of the KV, test split
python benchmarks/quality.py important --samples 125 # attention of prefill among important tokens, test split
python benchmarks/quality.py memory --samples 40  # rules by which images fade under a budget, test split
python docs/make_quality.py
```

In commands and tables `zipvl` is `zipvl:attention=dense`, the layer budgets alone: at the time there was no more of it.
`ZipVL` is the method in full.

"""
READING = """Scores are per cent, with 95 % intervals of the paired bootstrap over samples. *KV* is the vision KV that
was really kept, measured, in per cent of the full cache's, mean over layers and KV heads; `snapkv`, `adakv` and
`query_bank_text` evict text, too, and each text entry that they evict counts like a vision entry, so that equal KV is
equal memory. The columns are what was asked for; what was kept stands behind a figure, in brackets, where the two
differ by more than 1.5 points: such a figure is not at equal KV. A difference whose interval does not hold 0 is
**bold**; an interval without width (all samples right, or none) says only that no other outcome was seen. Groups are
means over their tasks with equal weight, and are never averaged together but in "What was aimed at". The lines of
`query_bank` rank by queries of the model's answers to other prompts of the same tasks, from the development split
(`query_bank_own` by those of 16 prompts), and so does `mixkv_bank`; no other method has seen any. Heads are ragged for
`query_bank`, `query_bank_own`, `query_bank_text`, `adakv` and what is named so, and equal for all others.
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
        "measured KV, and in brackets the vision entries alone where text left": _matrix(
            variants, values["variants"], _kept, marked=False
        ),
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
    """What ragged heads, a bank of 16 prompts and the rivals came to, beside what was aimed at; empty if not run."""
    if "rivals" not in results:
        return ""
    paired, full = results["rivals"]["paired"], results["rivals"]["overall"]["variants"]
    over_equal = paired["query_bank_equal"]
    lines = ["| aim | measured | |", "|---|---|---|"]
    for rate, points in OVER_EQUAL.items():
        gain = over_equal["overall"][f"query_bank@{rate:g}"]
        worst = min(over_equal[group][f"query_bank@{rate:g}"]["mean"] for group in results["groups"])
        text = f"ragged heads at least {points} points above equal ones at {100 * rate:g} %, and above in every group"
        met = gain["mean"] >= points / 100 and worst > 0
        lines.append(_aim(text, f"{_points(gain)}; least in a group {100 * worst:+.1f}", met))
    for rate, points in BELOW_FULL.items():
        loss = full[f"query_bank@{rate:g}"]["vs_full"]
        text = f"at most {points} points below the full cache at {100 * rate:g} %"
        lines.append(_aim(text, _points(loss), loss["mean"] >= -points / 100))
    for rate in OWN_BANK_RATES:
        off = paired["query_bank"]["overall"][f"query_bank_own@{rate:g}"]
        text = f"the bank of 16 prompts within {OWN_BANK_OFF} points of the bundled one at {100 * rate:g} %"
        lines.append(_aim(text, _points(off), off["mean"] >= -OWN_BANK_OFF / 100))
    for rate in GLANCE:
        lines.append(_above_rivals(results, rate))
    about = (
        "Means over the groups, each with equal weight, with paired 95 % intervals. Rivals are methods that have seen "
        "no other prompt, so `mixkv_bank` is none; the intervals of different runs are not paired.\n\n"
    )
    groups, tasks = (f"{100 * results['apart'][part]:.1f}" for part in ("groups", "tasks"))
    joint = (
        "\nTwo runs stand in these tables, on two processors, which round otherwise: the lines that both hold (`full`, "
        f"`random1`, `oracle`, `query_bank_equal`) differ by at most {groups} points in a group and {tasks} on a "
        "task.\n"
    )
    return "\n## What was aimed at\n\n" + about + "\n".join(lines) + "\n" + joint


def _above_rivals(results: Mapping[str, Any], rate: float) -> str:
    """Whether query_bank scores higher than every rival in every group, and from 25 % down by more than the intervals.

    What is met by the means over the groups and not in each of them is said to be so.
    """
    known = {variant["name"] for variant in results["variants"]}
    rivals = [f"{label}@{rate:g}" for label in RIVALS if f"{label}@{rate:g}" in known]
    own, strict = f"query_bank@{rate:g}", rate <= CLEAR_FROM
    best = max(rivals, key=lambda rival: _over_groups(results, rival))
    margins = {
        (rival, group): _margin(values["variants"][own]["score"], values["variants"][rival]["score"], strict)
        for group, values in results["groups"].items()
        for rival in rivals
    }
    (rival, group), least = min(margins.items(), key=lambda item: item[1])
    ahead = _over_groups(results, own) > _over_groups(results, best)
    text = f"above every rival at {100 * rate:g} %{', by more than the intervals' if strict else ''}"
    measured = (
        f"{100 * _over_groups(results, own):.1f} against {100 * _over_groups(results, best):.1f} of `{best}`; least "
        f"{'between the intervals' if strict else 'difference'} of a group: {100 * least:+.1f}, `{rival}`, "
        f"{group.replace('_', ' ')}"
    )
    outcome = "met" if ahead and least > 0 else "in the mean alone" if ahead else "**missed**"
    return f"| {text} | {measured} | {outcome} |"


def _margin(own: Figures, rival: Figures, strict: bool) -> float:
    """By how much the first is above the second: the means, or ``strict`` the ends of the intervals that face."""
    return float(own["low"] - rival["high"] if strict else own["mean"] - rival["mean"])


def _over_groups(results: Mapping[str, Any], name: str) -> float:
    scores = [values["variants"][name]["score"]["mean"] for values in results["groups"].values()]
    return float(sum(scores) / len(scores))


def _points(interval: Figures) -> str:
    return f"{100 * interval['mean']:+.1f} ({100 * interval['low']:+.1f}, {100 * interval['high']:+.1f})"


def _aim(text: str, measured: str, met: bool) -> str:
    return f"| {text} | {measured} | {'met' if met else '**missed**'} |"


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
    """The measured KV, and in brackets the vision entries alone where text left, too."""
    vision = f" ({100 * figures['vision_kept']:.1f})" if "vision_kept" in figures else ""
    return f"{100 * figures['kept']:.1f}{vision}"


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


def _heads(results: Mapping[str, Any]) -> str:
    settings, variants = results["settings"], results["variants"]
    parts = [
        "\n## Heads, banks and candidates\n\nChoices within `query_bank`, and what ragged heads do for others: "
        f"{settings['samples']} samples a task, split `{settings['split']}`. Score, and difference from "
        f"`{results['baseline']}` at the same retention, mean over the groups.\n"
    ]
    figures = results["overall"]["variants"]
    parts += ["\n", _matrix(variants, figures, lambda own: _interval(own, "score"))]
    parts += ["\n", _matrix(variants, figures, lambda own: _signed(own, "vs_baseline"))]
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
    "tiers": section,
    "bits": bits_section,
    "ladders": ladders_section,
    "early": stages_section,
    "chains": chains_section,
    "important": important_section,
    "memory": memory_section,
    "heads": _heads,
    "ablation": _ablation,
    "transfer": _transfer,
    "attention": _attention,
    "calibration": _calibration,
}
"""Further results by the name of their file: what they add to the page."""
