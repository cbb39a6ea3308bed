# SPDX-License-Identifier: Apache-2.0
"""Write docs/quality.md and docs/quality-tables.md from the committed results: ``python docs/make_quality.py``."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from joined_results import joined
from quality_tables import GLANCE, OTHERS, Figures, tables_page
from tier_tables import first_table

FOLDER = Path(__file__).parents[1] / "benchmarks" / "results"
RESULTS = FOLDER / "quality.json"
PAGE = Path(__file__).parent / "quality.md"
TABLES = Path(__file__).parent / "quality-tables.md"
RIVALS = FOLDER / "rivals.json"
TIERS = FOLDER / "tiers.json"
BITS = FOLDER / "bits.json"
METHODS = {
    "query_bank": "ours: it asks with queries of the model's answers to *other* prompts of the same tasks, and the KV "
    "heads of a layer compete for its places",
    "query_bank_own": "the same with a bank that it collected itself, from the first 16 prompts of another split",
    "query_bank_text": "the same with the bundled bank, where text may leave, too",
    "random1": "the control: random draws",
    "adakv": "by a window at the end of the prompt (SnapKV), heads compete; text leaves, too",
    "expected_attention_ragged": "by how queries to come will be distributed; heads compete",
    "plphp": "the paper's rule, by the last token of the prompt",
    "oracle_ragged": "the ceiling: it asks with the queries of the answer itself, and heads compete",
}
"""What is shown on the first page, in this order: the methods with a word about each."""
RANDOM = "random1"

TITLE = "# Quality\n\n"
FEW_BITS = """**Few bits in the place of eviction** lose nothing, or little, where eviction loses answers. The same
tasks, model and samples as below; *held* is measured in bytes, scales and means counted, and *read* is what a
decoding step reads of it. Scores in per cent, differences in points with paired 95 % intervals, the mean over the
groups. [What was aimed at](quality-tables.md#few-bits-what-was-aimed-at).

"""
EVICTION = """
## Eviction

"""
HEAD = """**Asked:** how many answers survive when a part of the vision KV is evicted, and all methods keep the same
measured memory? {asked}

**Answered**, for this model alone: points lost in the worst group with {rates} % of the vision KV kept, and
comparisons with random draws, one for each group and rate, that leave 0 outside of their 95 % interval.

"""
NOT_MEASURED = """- Large models and photographs have **not been measured**; `plphp eval` scores any model and data set.

"""
END = """
Behind this screen: [all tables with their intervals, and how to make them again](quality-tables.md) ·
[how a sample is scored](evaluation.md) · [what the figures taught](findings.md) ·
[time and memory](performance.md).

Made by `docs/make_quality.py` from {sources} in `benchmarks/results`; do not edit.
"""


def page(results: Mapping[str, Any]) -> str:
    """One screen: what was asked, the answer in a line per method, and one small table.

    Parameters
    ----------
    results : mapping
        Figures of the test split, as ``plphp eval --results`` writes them.
    """
    shown = _shown(results)
    answers = (f"- `{label}` ({METHODS[label]}): {_answer(results, names)}." for label, names in shown.items())
    lines = "".join(textwrap.fill(answer, 116, subsequent_indent="  ") + "\n" for answer in answers)
    head = HEAD.format(asked=_asked(results), rates=_rates())
    few_bits = FEW_BITS + first_table(results["tiers"], results["bits"]) + EVICTION if "tiers" in results else ""
    end = END.format(sources=_sources(results))
    return TITLE + few_bits + _wrapped(head) + lines + NOT_MEASURED + _table(results, shown) + end


def committed() -> tuple[dict[str, Any], dict[str, Any]]:
    """The results of the test split, and by name those of `quality_tables.OTHERS` that there are.

    Raises
    ------
    SystemExit
        If a file was measured on other weights than the test split.
    """
    paths = {name: FOLDER / f"{name}.json" for name in OTHERS}
    others = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    if RIVALS.exists():
        rivals = json.loads(RIVALS.read_text(encoding="utf-8"))
        results = {**joined(results, rivals), "rivals": rivals}
    results |= {name: others[name] for name in ("tiers", "bits") if name in others}
    for name, more in others.items():
        weights = more["model"]["sha256"] if isinstance(more["model"], dict) else more.get("sha256")
        if weights != results["model"]["sha256"]:
            raise SystemExit(f"{name}.json was measured on other weights than {RESULTS.name}: run that part again.")
    return results, others


def _sources(results: Mapping[str, Any]) -> str:
    names = [path.name for path in (TIERS, BITS, RESULTS, RIVALS) if path is RESULTS or path.stem in results]
    return ", ".join(f"`{name}`" for name in names)


def _asked(results: Mapping[str, Any]) -> str:
    model, settings = results["model"], results["settings"]
    tasks = sum(len(group["tasks"]) for group in results["groups"].values())
    name = settings["model"] or "The bundled model"
    groups = ", ".join(group.replace("_", " ") for group in results["groups"])
    return (
        f"{name} ({model['parameters'] / 1e6:.1f} M parameters, {model['decoder_layers']} layers) on {tasks} held-out "
        f"tasks of drawn images in groups ({groups}), {settings['samples']} samples a task; exact match of whole "
        "answers."
    )


def _wrapped(text: str) -> str:
    return "\n\n".join(textwrap.fill(paragraph, 116) for paragraph in text.strip().split("\n\n")) + "\n\n"


def _rates() -> str:
    return " · ".join(f"{100 * rate:g}" for rate in GLANCE)


def _shown(results: Mapping[str, Any]) -> dict[str, dict[float, str]]:
    """By label, the names of a method's variants by retention rate: those that have all rates of ``GLANCE``."""
    by_label = {
        label: {variant["retention"]: variant["name"] for variant in results["variants"] if variant["label"] == label}
        for label in METHODS
    }
    return {label: names for label, names in by_label.items() if set(GLANCE) <= set(names)}


def _answer(results: Mapping[str, Any], names: Mapping[float, str]) -> str:
    """Loss in the worst group at each rate, and the comparisons with random draws."""
    groups = [group["variants"] for group in results["groups"].values()]
    worst = (max(-100 * group[names[rate]]["vs_full"]["mean"] for group in groups) for rate in GLANCE)
    text = f"loses {' · '.join(f'{points:.1f}' for points in worst)}"
    vision = [_mean_over_groups(groups, names[rate], "vision_kept") for rate in GLANCE]
    if None not in vision:
        text += f"; of the vision entries it keeps {' · '.join(f'{100 * share:.0f}' for share in vision)} %"
    measured = [group[names[rate]] for rate in GLANCE for group in groups]
    if results["baseline"] != RANDOM or names[GLANCE[0]].startswith(RANDOM):
        return text
    above, below = (sum(map(side, measured)) for side in (_above, _below))
    return f"{text}; above random draws in {above} of {len(measured)}, below in {below}"


def _mean_over_groups(groups: list[Mapping[str, Figures]], name: str, measure: str) -> float | None:
    """Mean of a measure over the groups, None where it was not measured in all of them."""
    values = [group[name].get(measure) for group in groups]
    return None if None in values else sum(values) / len(values)


def _above(figures: Figures) -> bool:
    return bool(figures["vs_baseline"]["low"] > 0)


def _below(figures: Figures) -> bool:
    return bool(figures["vs_baseline"]["high"] < 0)


def _table(results: Mapping[str, Any], shown: Mapping[str, Mapping[float, str]]) -> str:
    """Scores in per cent: a line per method, a column per group, a figure per retention rate."""
    groups = results["groups"]
    full = (f"{100 * group['variants']['full']['score']['mean']:.1f}" for group in groups.values())
    lines = [
        f"| % right with {_rates()} % kept | {' | '.join(name.replace('_', ' ') for name in groups)} |",
        f"|---|{'---|' * len(groups)}",
        f"| everything kept | {' | '.join(full)} |",
    ]
    for label, names in shown.items():
        scores = ([group["variants"][names[rate]]["score"]["mean"] for rate in GLANCE] for group in groups.values())
        cells = (" · ".join(f"{100 * score:.1f}" for score in of_group) for of_group in scores)
        lines.append(f"| `{label}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write both pages."""
    results, others = committed()
    PAGE.write_text(page(results), encoding="utf-8")
    TABLES.write_text(tables_page(results, others), encoding="utf-8")


if __name__ == "__main__":
    main()
