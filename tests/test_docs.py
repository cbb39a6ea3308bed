# SPDX-License-Identifier: Apache-2.0
"""The documents' code runs, their lists are those of the package, their figures those of the results files."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import dynamic_module_utils

import plphp
from plphp import PLPHPConfig, cli
from plphp.families.registry import FAMILIES_BY_NAME
from plphp.families.unsupported import UNSUPPORTED
from plphp.inputs.loading import load_model
from plphp.inputs.sources import bundled_model_path
from plphp.methods.registry import METHODS_BY_NAME

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
MOST_WORDS = 900
LARGEST_PICTURE = 150_000
HUB_NAME = "llava-hf/llava-onevision-qwen2-7b-ov-hf"


def blocks(path: str) -> list[str]:
    """Python blocks of a document."""
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), flags=re.DOTALL)


def prose(path: str) -> str:
    """A document without its code blocks."""
    return re.sub(r"^```.*?^```", "", (ROOT / path).read_text(), flags=re.DOTALL | re.MULTILINE)


def links(path: str) -> list[str]:
    """Targets of a document's links and pictures that lie in the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(path)))
    return [target for target in targets if not target.startswith(("https://", "http://"))]


def anchors(path: Path) -> set[str]:
    """The names that GitHub gives to a document's headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def figures(name: str) -> dict[str, Any]:
    """A committed results file."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def milliseconds(row: dict[str, Any]) -> str:
    return f"{1000 * row['seconds']:.0f} ms"


def megabytes(count: int, digits: int = 0) -> str:
    return f"{count / 1e6:.{digits}f} MB"


@pytest.fixture
def scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A folder with photo.png, and what a document's code may take for granted."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(next((ROOT / "examples" / "images").glob("grid*.png")), tmp_path / "photo.png")
    monkeypatch.setattr(METHODS_BY_NAME, "registered", {})
    monkeypatch.setattr(FAMILIES_BY_NAME, "registered", {})
    model, processor = load_model()
    content = [{"type": "image", "image": Image.open("photo.png")}, {"type": "text", "text": "What is in row 1?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    yield {"model": model, "inputs": inputs}
    assert "generate" not in model.__dict__


def run_with_the_bundled_model(path: str) -> dict[str, Any]:
    """The names after all Python blocks of a document.

    The hub cannot be reached from the tests; the bundled model stands in for the model that the document names.
    """
    code = "\n".join(blocks(path))
    assert HUB_NAME in code
    names: dict[str, Any] = {}
    exec(code.replace(HUB_NAME, str(bundled_model_path())), names)
    return names


def test_readme_runs(scope: dict[str, Any]) -> None:
    names = run_with_the_bundled_model("README.md")
    assert names["run"].report.retention == 1.0
    assert 0.3 < names["run"].report.kv_reduction < 0.8
    assert names["answer"][0]["generated_text"]


def test_api_runs(scope: dict[str, Any]) -> None:
    names = run_with_the_bundled_model("docs/api.md")
    assert names["run"].report.retention == pytest.approx(0.4, abs=0.05)
    assert names["session"].report.retention == pytest.approx(0.4, abs=0.05)
    del names["cache"], names["model"]


@pytest.mark.parametrize("index", [0, 1, 2], ids=["method", "early", "family"])
def test_extending_runs(scope: dict[str, Any], index: int) -> None:
    exec(blocks("docs/extending.md")[index], scope)


def test_calibration_runs(scope: dict[str, Any]) -> None:
    prompts = [{"images": ["photo.png"], "question": f"What is in row {row}?"} for row in (1, 2, 3, 4)]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    thresholds, bank, own_bank = blocks("docs/calibration.md")
    exec(thresholds, scope)
    assert scope["config"] == plphp.PLPHPConfig.from_toml("preset.toml")
    assert len(scope["measured"].retentions) == 2
    exec(bank, scope)
    with plphp.prune(scope["model"], scope["config"]) as run:
        scope["model"].generate(**scope["inputs"][0], max_new_tokens=2)
    assert run.report.retention == pytest.approx(0.25, abs=0.01)
    exec(own_bank, scope)
    assert scope["run"].report.collecting is None
    assert scope["run"].report.retention == pytest.approx(0.25, abs=0.01)
    assert plphp.QueryBank.load("shared.safetensors").record["prompts"] == 3
    assert list(Path("banks").glob("*.safetensors"))


def test_hub_runs(scope: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(Path.cwd() / "modules"))
    monkeypatch.syspath_prepend(str(Path.cwd() / "modules"))
    shutil.copytree(ROOT / "hub", "hub")
    folders, recipe = blocks("docs/hub.md")
    exec(folders, scope)
    assert scope["config"].options["bank"] == "bundled"
    exec(recipe, scope)
    with plphp.prune(scope["model"], scope["by_folder"]):
        expected = scope["model"].generate(**scope["inputs"], max_new_tokens=30)
    assert scope["output"].tolist() == expected.tolist()


def test_families_page_lists_what_is_registered() -> None:
    page = (ROOT / "docs" / "families.md").read_text()
    for family in plphp.available_families().values():
        assert f"| {family.name} | {', '.join(f'`{name}`' for name in family.model_types)} | {family.notes} |" in page
    for name, reason in UNSUPPORTED.items():
        assert f"| `{name}` | {reason} |" in page


def test_concepts_page_names_every_method() -> None:
    page = (ROOT / "docs" / "concepts.md").read_text()
    assert all(f"| `{name}` |" in page for name in plphp.available_methods())


def test_which_method_page_says_when_to_take_every_method() -> None:
    page = (ROOT / "docs" / "which-method.md").read_text(encoding="utf-8")
    places = {"encoder": "before the text model", "prefill": "inside prefill", "kv": "from the KV cache"}
    places["attention"] = "from the attention of prefill"
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| (.+) \|$", page, re.MULTILINE)
    methods = plphp.available_methods().values()
    assert sorted(rows) == sorted(
        (method.name, ", ".join(places[stage] for stage in method.stages), method.when) for method in methods
    )


def test_settings_of_the_which_method_page_can_be_parsed() -> None:
    page = (ROOT / "docs" / "which-method.md").read_text(encoding="utf-8").partition("## All methods")[0]
    settings = re.findall(r"`(\w+:[^`]+)`", page)
    assert len(settings) >= 6
    for text in settings:
        PLPHPConfig.parse(text)


def test_api_page_names_everything_public() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    assert [name for name in plphp.__all__ if f"`{name}" not in page and name != "Session"] == []


def test_command_line_page_names_every_command() -> None:
    commands = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    named = set(re.findall(r"(?:^|; )plphp ([a-z]+)", (ROOT / "docs" / "command-line.md").read_text(), re.MULTILINE))
    assert named == commands


def test_readme_is_one_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= MOST_WORDS
    assert text.index("make demo") < text.index("make test") < text.index("![")
    assert len(re.findall(r"!\[", text)) == 1
    assert len(re.findall(r"^\|[-:|]+\|$", text, flags=re.MULTILINE)) == 1


@pytest.mark.parametrize("path", PAGES)
def test_links_lead_somewhere(path: str) -> None:
    for target in links(path):
        file, _, anchor = target.partition("#")
        there = ROOT / path if not file else (ROOT / path).parent / file
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = {"README.md"}, ["README.md"]
    while waiting:
        page = waiting.pop()
        targets = {os.path.normpath(Path(page).parent / link.partition("#")[0]) for link in links(page)}
        waiting += (targets & set(PAGES)) - reached
        reached |= targets
    assert [page for page in PAGES if page not in reached] == []


def test_every_page_stands_in_the_navigation_of_the_site() -> None:
    """A new page is put into the sections of zensical.toml by hand, where its readers would look for it."""
    sections = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]
    listed = [f"docs/{page}" for section in sections for pages in section.values() for page in pages]
    assert sorted(listed) == PAGES[1:]


@pytest.mark.parametrize("path", PAGES)
def test_scripts_that_a_page_names_are_there(path: str) -> None:
    for script in re.findall(r"(?:benchmarks|docs|examples|tests)/[\w/]+\.(?:py|sh)", (ROOT / path).read_text()):
        assert (ROOT / script).exists(), script


def test_the_picture_is_small() -> None:
    (picture,) = (link for link in links("README.md") if link.endswith(".png"))
    assert (ROOT / picture).stat().st_size < LARGEST_PICTURE


@pytest.mark.parametrize("path", ["README.md", "docs/index.md"])
def test_first_pages_have_the_figures_of_the_results(path: str) -> None:
    page, quality, tiers = (ROOT / path).read_text(encoding="utf-8"), figures("quality"), figures("tiers")
    bits = figures("bits")
    lines = [
        ("full", tiers, 1.0),
        ("c3", bits, 0.21),
        ("t10", tiers, 0.1),
        ("t5", tiers, 0.05),
        ("query_bank@0.1", tiers, 0.1),
        ("query_bank@0.05", tiers, 0.05),
        ("snapkv@0.1", quality, 0.1),
        ("plphp@0.1", quality, 0.1),
        ("random1@0.1", tiers, 0.1),
    ]
    if path != "README.md":
        lines = [line for line in lines if line[0] in ("full", "c3", "t10", "query_bank@0.1", "plphp@0.1")]
    table = re.findall(r"^\| [^|]+ \| ([\d.]+) % \| ([\d. ·]+) \|$", page, flags=re.MULTILINE)
    assert len(table) == len(lines)
    for (held, scores), (name, results, about) in zip(table, lines, strict=True):
        groups = [group["variants"][name] for group in results["groups"].values()]
        assert scores == " · ".join(f"{100 * group['score']['mean']:.1f}" for group in groups)
        assert held == f"{100 * statistics.fmean(group['kept'] for group in groups):.1f}"
        assert float(held) == pytest.approx(100 * about, abs=0.5)


def test_performance_page_says_what_a_step_costs() -> None:
    page, results = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8"), figures("scaling_cpu")
    rows = {row["variant"]: row for row in results["results"] if (row["batch"], row["vision_tokens"]) == (4, 16000)}
    for name, variant in (
        ("transformers' `DynamicCache`", "DynamicCache"),
        ("plphp, all kept", "plphp 1"),
        ("plphp, 40 % kept", "plphp 0.4"),
        ("plphp, 10 % kept", "plphp 0.1"),
        ("`t10`", "t10"),
        ("`t10`, a fifth of it read", "t10, read 20%"),
        ("`c3`", "c3"),
    ):
        row = rows[variant]
        assert (
            f"| {name} | {megabytes(row['kv_bytes'])} | {megabytes(row['read_bytes'])} | {milliseconds(row)} |" in page
        )
    assert set(rows) == {"DynamicCache", "plphp 1", "plphp 0.4", "plphp 0.1", "t10", "t10, read 20%", "c3"}
    lines = results["lines"]
    rate = {name: f"{1e-9 / fit['seconds_per_byte']:.1f}" for name, fit in lines.items()}
    fixed = {name: f"{1000 * fit['fixed_seconds']:.0f} ms" for name, fit in lines.items()}
    own = "plphp, all retentions"
    assert f"costs {fixed[own]} and the bytes that it *reads* at {rate[own]} GB/s" in page
    assert f"explains\n{100 * lines[own]['explained']:.0f} % of" in page
    assert f"`DynamicCache`, {fixed['DynamicCache']} and {rate['DynamicCache']} GB/s" in page
    assert f"{rate['t10']} GB/s for `t10`, {rate['c3']} for `c3`" in page
    assert f"look\nfor, {rate['t10, read 20%']} (" in page


def test_performance_page_has_the_figures_of_the_results() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    by_case: dict[tuple[int, int], dict[str, Any]] = {}
    for row in figures("decode_cpu")["results"]:
        by_case.setdefault((row["batch"], row["vision_tokens"]), {})[row["variant"]] = row
    for (batch, tokens), variants in by_case.items():
        full, kept = variants["DynamicCache"], variants["plphp 0.4"]
        times = " | ".join(map(milliseconds, (full, variants["plphp 1"], kept)))
        floor = f"{1000 * kept['floor_seconds']:.0f} ms"
        assert f"| {batch} | {tokens} | {times} | {full['seconds'] / kept['seconds']:.2f} | {floor} |" in page
    memory = figures("prefill_memory_cpu")["results"]
    bare = memory["no cache (activations alone)"]["peak"]
    for line, name in (
        ("transformers' `DynamicCache`", "DynamicCache"),
        ("plphp, every layer at 0.4", "plphp uniform 0.4"),
        ("plphp, every layer at 0.2", "plphp uniform 0.2"),
        ("plphp, 3 bits for every vision entry", "plphp 3 bits"),
        ("plphp, `target_retention=0.4`", "plphp target 0.4"),
        ("the same, all layers held until the last is scored", "plphp target 0.4, all layers held"),
    ):
        sizes = (memory[name]["peak"], memory[name]["peak"] - bare, memory[name]["kv_bytes"])
        assert f"| {line} | {' | '.join(megabytes(size, 1) for size in sizes)} |" in page
    works = ("decoding step", "attention of a step", "scores of a second turn", "second turn")
    ratios: dict[tuple[float, float], dict[str, float]] = {}
    for row in figures("ragged_cpu")["results"]:
        ratios.setdefault((row["retention"], row["largest_head"]), {})[row["work"]] = row["ratio"]
    for (retention, largest), by_work in ratios.items():
        cells = " | ".join(f"{by_work[work]:.2f}" for work in works)
        assert f"| {100 * retention:.0f} % | {largest:g} | {cells} |" in page
        assert by_work["decoding step"] <= 1.05  # what was aimed at
    capacity = {row["variant"]: row["largest_batch"] for row in figures("capacity_cpu")["results"]}
    assert f"| {capacity['DynamicCache']} | {capacity['plphp 0.4']} | [7,000 vision tokens" in page


def test_performance_page_has_the_figures_of_tiers() -> None:
    page, results = (ROOT / "docs" / "performance.md").read_text(), figures("tiers_cpu")
    rows = {row["variant"]: row for row in results["results"]}
    named = {
        "transformers' `DynamicCache`": "DynamicCache",
        "plphp, 40 % whole": "whole 0.4",
        "`t10`": "t10",
        "`t10`, a fifth of it read": "t10, read 20%",
        "`c3`": "c3",
    }
    for name, variant in named.items():
        row = rows[variant]
        cells = re.search(rf"^\| {re.escape(name)} \| (\d+) MB \| (\d+) ms \| ([\d.]+) \|$", page, re.MULTILINE)
        assert cells is not None, name
        held, step, ratio = cells.groups()
        assert (int(held), int(step)) == (round(row["kv_bytes"] / 1e6), round(1000 * row["seconds"]))
        assert float(ratio) == pytest.approx(row["ratio_to_whole"], rel=0.01)
    encoding = {row["ladder"]: f"{100 * row['share_of_prefill']:.1f} % " for row in results["encoding"]}
    assert (
        f"Encoding takes {encoding['t10']}of the\nprefill of 2,000 vision tokens for `t10` and {encoding['c3']}for"
        in page
    )
    held = {row["variant"]: row["largest_batch"] for row in figures("capacity_cpu")["results"]}
    words = f"{held['DynamicCache']} sequences fit into 1 GiB with `DynamicCache`, {held['plphp 0.4']} with 40 % kept, "
    assert f"{words}{held['c3']} in 3 bits" in page
    assert f"and {held['t10']} with `t10`" in page


def test_performance_page_has_the_figures_of_the_first_token() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    cells: dict[str, list[str]] = {}
    for name in ("first_token_cpu", "first_token_4096_cpu"):
        stock, *rows = figures(name)["results"]
        assert stock["of_dynamic_cache"] == stock["computed_share"] == 1
        for row in rows:
            cells.setdefault(row["variant"], []).extend(
                f"{row[key]:.2f}" for key in ("of_dynamic_cache", "computed_share")
            )
    for row in figures("first_token_tower_cpu")["results"][1:]:
        cells[f"{row['variant']}, tower"] = [f"{row[key]:.2f}" for key in ("of_dynamic_cache", "computed_share")]
    for variant, own in cells.items():
        assert f"| {variant.removesuffix(', tower')} | {' | '.join(own)} |" in page


def test_the_page_on_other_caches_has_the_figures_of_the_results() -> None:
    page = (ROOT / "docs" / "other-caches.md").read_text(encoding="utf-8")

    def line(row: dict[str, Any]) -> str:
        of_stock = row["difference"]
        difference = f"{100 * of_stock['mean']:+.1f} ({100 * of_stock['low']:+.1f}, {100 * of_stock['high']:+.1f})"
        name = row["variant"] if "," in row["variant"] else f"`{row['variant']}`"
        return f"| {name} | {100 * row['score']['mean']:.1f} | {difference} | {100 * row['share']:.1f} % |"

    steps: dict[tuple[str, int], float] = {}
    for row in figures("quantized_steps_cpu")["speed"]:
        if "seconds" in row:
            steps[row["variant"], row["batch"]] = row["seconds"]
    scores = figures("quantized_scores_cpu")["quality"]
    for row in scores["results"]:
        ratios = [f"{steps[row['variant'], batch] / steps['DynamicCache', batch]:.2f}" for batch in (1, 8)]
        assert f"{line(row)} {100 * row['vision_share']:.1f} % | {ratios[0]} | {ratios[1]} |" in page
    for name, failure in scores["failed"].items():
        assert f"`{name}` fails on {failure['prompts']} of {failure['of']} prompts" in page
    presses = figures("kvpress_cpu")
    assert all(line(row) in page for row in presses["results"])
    assert len(presses["results"]) == 7
    assert {(failure["prompts"], failure["of"]) for failure in presses["failed"].values()} == {(1, 180)}
    assert "an error on 1 of 180 prompts" in page


def test_findings_on_leaving_early_have_the_figures_of_the_results() -> None:
    page, results = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8"), figures("early")
    section = " ".join(page.split("## Leaving before and inside the text model")[1].split("\n## ")[0].split())

    def score(name: str, part: dict[str, Any] = results["overall"]) -> float:
        return 100 * part["variants"][name]["score"]["mean"]

    def said(text: str, *scores: float) -> bool:
        return text.format(*(f"{own:.1f}" for own in scores)) in section

    regions = results["groups"]["several_regions"]
    assert said("of {} with the full cache", score("full"))
    assert said("(`pool`) reach {} and random tokens {}", score("pool@0.5"), score("random@0.5"))
    assert said("diversity {} (`divprune`) to {} (`dpp`)", score("DivPrune@0.5"), score("DPP@0.5"))
    assert said("attention {} to {} (`fopru`", score("FoPru, rows@0.5"), score("VTC-CLS@0.5"))
    assert said("At a quarter diversity has {} and", score("DivPrune@0.25"))
    assert said("the tower's attention {}:", score("VTC-CLS@0.25"))
    assert said("lost first ({} against {})", score("VTC-CLS@0.25", regions), score("DivPrune@0.25", regions))
    assert said("`cdpruner` has {} with the sign", score("CDPruner@0.5"))
    assert said("stays, and {} with the other", score("CDPruner, positive relevance@0.5"))
    assert said("of above: {} at a mean of a half", score("FastV, layer 1@0.5"))
    chains = ["DivPrune 50 %, then query_bank@0.5", "DPP 50 %, then query_bank@0.5"]
    lost = [
        [score("query_bank@0.25", part) - score(chain, part) for part in (results["overall"], regions)]
        for chain in chains
    ]
    assert said("cost {} points more than `query_bank` alone at a quarter of the KV, and {} where", *lost[0])
    assert said("With `dpp` it is {} and {}.", *lost[1])
    more = figures("chains")
    chain = "DivPrune{} 50 %, then query_bank@0.5"
    whole, region = more["overall"], more["groups"]["several_regions"]
    assert f"with [{more['settings']['samples']} samples a task]" in section
    both = score(chain.format(", Euclidean"), whole), score("query_bank", whole)
    assert said("score {}, above the {} of `query_bank` alone", *both)
    below = [score("query_bank", region) - score(chain.format(kind), region) for kind in (", Euclidean", "")]
    assert said("and {} points below it where answers are about several regions (by cosine: {})", *below)


def test_findings_on_conversations_have_the_figures_of_the_results() -> None:
    page, results = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8"), figures("memory")
    section = " ".join(page.split("## Conversations under a budget")[1].split("\n## ")[0].split())

    def score(task: str, name: str) -> float:
        return 100 * results["tasks"][task]["variants"][name]["score"]["mean"]

    def behind(name: str) -> float:
        return -100 * results["overall"]["variants"][name]["vs_baseline"]["mean"]

    assert f"{results['settings']['samples']} conversations a task" in section
    old = [score("old_image", name) for name in ("oldest@0.1", "ranked@0.1", "full")]
    said = "a tenth of the bytes {:.0f} % of these answers are right when the oldest leave first, and {:.0f} % when"
    assert said.format(*old) in section
    assert f"with the full cache {old[2]:.0f} %" in section
    lost = [score("newest_image", "full") - score("newest_image", f"ranked@{share}") for share in ("0.1", "0.05")]
    assert lost[0] == 0
    assert f"nothing at a tenth of the bytes, and {lost[1]:.0f} points at a twentieth" in section
    assert behind("equal@0.25") == 0
    equal = [behind(f"equal@{share}") for share in ("0.1", "0.05")]
    assert (
        f"level at a quarter, {-equal[0]:.1f} points above at a tenth and {equal[1]:.1f} below at a twentieth"
        in section
    )
    assert [score(task, "ranked@0.25") for task in results["tasks"]] == [score(t, "full") for t in results["tasks"]]
    alone = [f"{behind(f'no budget@{share}'):.1f}" for share in ("0.1", "0.05")]
    assert f"{alone[0]} points below at a tenth and {alone[1]} at a twentieth" in section


def test_memory_page_has_the_figures_of_a_long_conversation() -> None:
    page, results = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8"), figures("conversation_cpu")
    section = page.split("## A long conversation")[1].split("\n## ")[0]
    turns = results["turns"]
    for first, last in ((1, 10), (11, 20), (21, 50), (51, 100), (101, 200), (201, 300)):
        own = turns[first - 1 : last]
        held, alive = (max(turn[name] for turn in own) / 1e6 for name in ("vision_bytes", "storage_bytes"))
        taken = statistics.median(turn["seconds"] for turn in own)
        sizes = f"{held:.2f} | {alive:.1f} | {own[-1]['full_bytes'] / 1e6:.0f} | {taken:.2f} |"
        assert f"| {first} to {last} | {sizes}" in section
    for row in results["again"]:
        goes_on = f"{row['goes_on_seconds']:.2f} | {row['goes_on_tokens']}"
        assert f"| {row['images']} | {goes_on} | {row['again_seconds']:.2f} | {row['again_tokens']} |" in section
    beside = [turn for turn in turns if "right_full" in turn]
    right = [sum(turn[name] for turn in beside) for name in ("right", "right_full", "right_alone")]
    memory = [
        f"{turn['memory_bytes'] / 1e9:.1f}" for turn in (turns[0], max(turns, key=lambda turn: turn["memory_bytes"]))
    ]
    assert f"more than that, from {memory[0]} to {memory[1]} GB" in " ".join(section.split())
    said = "Of the first {} answers about the newest image {} are right, with a full cache {}, and {} of the same"
    assert said.format(len(beside), *right) in " ".join(section.split())


def test_guarantees_page_has_the_figures_of_the_results() -> None:
    page, results = (ROOT / "docs" / "guarantees.md").read_text(), figures("exactness_cpu")["results"]
    for line, name in (
        ("everything kept against stock", "kept_all_against_stock"),
        ("pruned against a masked full cache", "pruned_against_masked"),
        ("padded against alone", "padded_against_alone"),
        ("stock padded against stock alone", "stock_padded_against_alone"),
    ):
        worst = (max(model[name] for model in results[dtype].values()) for dtype in ("float64", "float32"))
        assert f"| {line} | {' | '.join(f'{difference:.1e}' for difference in worst)} |" in page
