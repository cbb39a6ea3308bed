# SPDX-License-Identifier: Apache-2.0
"""Quality of every method on the bundled model: ``python benchmarks/quality.py PART``.

PART is one of, in this order:

- ``bank``         queries of the bundled model's answers to development prompts, for query_bank, and codebooks from
                   the same prompts: a file beside its weights
- ``attention``    vision attention per layer and head over development prompts: benchmarks/results/attention.json
- ``calibration``  thresholds from some development prompts, measured on others: benchmarks/results/calibration.json
- ``ablation``     choices within methods on the development split: benchmarks/results/ablation.json
- ``transfer``     query_bank on each group of tasks with a bank of the other groups: benchmarks/results/transfer.json
- ``heads``        ragged heads, banks and candidates on the development split: benchmarks/results/heads.json
- ``test``         the methods of earlier years at all retentions on the test split: benchmarks/results/quality.json
- ``ladders``      ladders and rungs on the development split: benchmarks/results/ladders.json
- ``rivals``       ragged heads, banks and this year's rivals on the test split: benchmarks/results/rivals.json,
                   docs/quality/*.png
- ``tiers``        few bits in the place of eviction, on the test split: benchmarks/results/tiers.json
- ``bits``         every entry in one rung, no choice, on the test split: benchmarks/results/bits.json
- ``early``        what leaves before and inside the text model, on the test split: benchmarks/results/early.json
- ``chains``       half of the tokens before the text model, then query_bank: benchmarks/results/chains.json
- ``important``    attention of prefill among important tokens alone, on the test split:
                   benchmarks/results/important.json
- ``memory``       conversations whose images arrive over the turns, under a budget, by the rules of fading, on the test
                   split: benchmarks/results/memory.json

A part that was stopped goes on where it was (its samples are in ``--runs``). ``python docs/make_quality.py`` makes
docs/quality.md from the results. Another model needs folders of its own (``--results``, ``--runs``).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLOTS = ROOT / "docs" / "quality"
RETENTION = (0.7, 0.5, 0.4, 0.3, 0.25, 0.2, 0.1, 0.05)
METHODS = (
    "plphp",
    "query_bank_equal=query_bank:bank=bundled,heads=equal",
    "recall_rank",
    "uniform",
    "shared",
    "random1=random:seed=1",
    "random2=random:seed=2",
    "oracle",
    "snapkv",
    "snapkv_vision",
    "pyramidkv",
    "vl_cache",
    "zipvl=zipvl:attention=dense",  # the layer budgets alone, as in all figures so far
    "plphp_defaults=plphp:retention_rate=0.4",
    # These read the prompt anew for each retention; layer 2 of 8 leaves fastv a quarter at least.
    "fastv@0.5+0.25",
    "vtw@0.5+0.25+0.125",
    "downsample@0.5+0.25+0.1",
    "zero",
    "blank",
)
ABLATION_RETENTION = (0.5, 0.25, 0.1)
ABLATION = {
    "last row": "plphp",
    "last 8 rows": "plphp:query_rows=8",
    "all text after the images": "plphp:query_rows=text",
    "max over query heads": "plphp:gqa_reduction=max",
    "first layer exempt": "plphp:exempt_layers=0",
    "last layer exempt": "plphp:exempt_layers=-1",
    "quota per image": "plphp:image_quota=per_image",
    "pooled over 3 tokens": "plphp:score_pool=3",
    "delta 0.1": "plphp:retention_delta=0.1",
    "same rate in all layers": "uniform",
    "random": "random",
    "best rank of any row": "recall_rank",
    "the same, by value norm": "recall_rank:value_norm=1",
    "bank": "query_bank:bank=bundled,heads=equal",
    "bank, mean": "query_bank:bank=bundled,heads=equal,reduce=mean",
    "bank, peak": "query_bank:bank=bundled,heads=equal,reduce=peak",
    "bank, without value norm": "query_bank:bank=bundled,heads=equal,value_norm=0",
    "bank, random 0.25": "query_bank:bank=bundled,heads=equal,random_share=0.25",
}
"""Choices within plphp; what is not named is as by default: the last row, mean over query heads, no layer exempt. Then
other evidence, at the same rate in all layers."""


RIVAL_RETENTION = (0.5, 0.4, 0.25, 0.1, 0.05)
RIVALS = (
    "query_bank=query_bank:bank=bundled",
    "query_bank_own=query_bank:collect=16",
    "query_bank_text=query_bank:bank=bundled,candidates=prompt",
    # These three are in the part ``test`` too: what they score says whether both runs are over the same samples.
    "query_bank_equal=query_bank:bank=bundled,heads=equal",
    "random1=random:seed=1",
    "oracle",
    "oracle_ragged=oracle:heads=ragged",
    "adakv",
    "expected_attention",
    "expected_attention_ragged=expected_attention:heads=ragged,epsilon=0.01",
    "mixkv",
    "mixkv_bank=mixkv:host=bank,bank=bundled",
    "tgv_kv",
)
HEADS_RETENTION = (0.5, 0.25, 0.1, 0.05)
HEADS = {
    "equal heads": "query_bank:bank=bundled,heads=equal",
    "ragged": "query_bank:bank=bundled",
    "ragged, no safeguard": "query_bank:bank=bundled,head_safeguard=0",
    "ragged, safeguard 0.4": "query_bank:bank=bundled,head_safeguard=0.4",
    "ragged, mean": "query_bank:bank=bundled,reduce=mean",
    "ragged, peak": "query_bank:bank=bundled,reduce=peak",
    "ragged, without value norm": "query_bank:bank=bundled,value_norm=0",
    "own bank of 4": "query_bank:collect=4",
    "own bank of 16": "query_bank:collect=16",
    "own bank of 64": "query_bank:collect=64",
    "text may leave": "query_bank:bank=bundled,candidates=prompt",
    "text may leave, equal heads": "query_bank:bank=bundled,candidates=prompt,heads=equal",
    "plphp, ragged": "plphp:heads=ragged",
    "recall_rank, ragged": "recall_rank:heads=ragged",
    "snapkv_vision, ragged": "snapkv_vision:heads=ragged",
    "oracle, equal heads": "oracle",
    "oracle, ragged": "oracle:heads=ragged",
}
"""Choices within query_bank, and what ragged heads do for others; the first is what all are compared with."""


TIERS_RETENTION = (0.1, 0.05)
TIERS = (
    "t10=query_bank:bank=bundled,tiers=t10",
    "t7.5=query_bank:bank=bundled,tiers=t7.5",
    "t5=query_bank:bank=bundled,tiers=t5",
    "t10_read20=query_bank:bank=bundled,tiers=t10,read=0.2",
    "r15=query_bank:bank=bundled,tiers=r15",
    "p12.5=prompt_queries:books=bundled,tiers=p12.5",
    "r20=prompt_queries:tiers=r20",
    # The same bytes in whole entries.
    "query_bank=query_bank:bank=bundled",
    "random1=random:seed=1",
)
BITS = tuple(f"{rung}=quantized:tiers={rung}" for rung in ("kivi4", "c4", "c3", "kivi2", "r3", "r2"))
LADDERS_RETENTION = (0.1, 0.05)
LADDERS = {
    "t15": "query_bank:bank=bundled,tiers=t15",
    "t10": "query_bank:bank=bundled,tiers=t10",
    "t10, own bank of 16": "query_bank:collect=16,tiers=t10",
    "t7.5": "query_bank:bank=bundled,tiers=t7.5",
    "t5": "query_bank:bank=bundled,tiers=t5",
    "t5, equal heads": "query_bank:bank=bundled,tiers=t5,heads=equal",
    "t10, read 20 %": "query_bank:bank=bundled,tiers=t10,read=0.2",
    "t10, read 20 %, nothing stands in": "query_bank:bank=bundled,tiers=t10,read=0.2,rest=false",
    "t10, read 10 %": "query_bank:bank=bundled,tiers=t10,read=0.1",
    "kivi4": "quantized:tiers=kivi4",
    "kivi2": "quantized:tiers=kivi2",
    "c4": "quantized:tiers=c4",
    "c3": "quantized:tiers=c3",
    "c3, read 20 %": "quantized:tiers=c3,read=0.2",
    "r3": "quantized:tiers=r3",
    "r2": "quantized:tiers=r2",
    "rvq": "quantized:tiers=rvq,books=bundled",
    "pq": "quantized:tiers=pq,books=bundled",
    "pq16": "quantized:tiers=pq16,books=bundled",
    "r15": "query_bank:bank=bundled,tiers=r15",
    "p12.5": "prompt_queries:books=bundled,tiers=p12.5",
    "r20": "prompt_queries:tiers=r20",
    "t10 by the last row": "plphp:books=bundled,tiers=t10",
    "t10 at random": "random:books=bundled,tiers=t10",
    "whole entries": "query_bank:bank=bundled",
}
"""Ladders, single rungs for everything, and other evidence."""
STAGES = {
    "random": "encoder_random:seed=1@0.5+0.25",
    "pool": "pool@0.5+0.25",
    "downsample": "downsample@0.5+0.25",
    "DivPrune": "divprune@0.5+0.25",
    "DPP": "dpp@0.5+0.25",
    "CDPruner": "cdpruner@0.5",
    "CDPruner, positive relevance": "cdpruner:sign=positive@0.5",
    "VTC-CLS": "vtc_cls@0.5+0.25",
    "FoPru, tokens": "fopru@0.5",
    "FoPru, rows": "fopru:by=row@0.5",
    "VisionZip": "visionzip@0.5",
    # Layer 1 of 8: the layers behind it hold 43 % and 14 %.
    "FastV, layer 1": "fastv:layer=1@0.5+0.25",
    "query_bank": "query_bank:bank=bundled@0.25",
    "DivPrune 50 %, then query_bank": "divprune:retention_rate=0.5+query_bank:bank=bundled@0.5",
    "DPP 50 %, then query_bank": "dpp:retention_rate=0.5+query_bank:bank=bundled@0.5",
}
"""What leaves before and inside the text model. A chain's rate is of what its first method leaves: half of a half is a
quarter of the KV, as query_bank alone holds it."""
CHAINS = {
    "query_bank": "query_bank:bank=bundled,retention_rate=0.25",
    "DivPrune": "divprune@0.5",
    "DivPrune, Euclidean": "divprune:distance=euclidean@0.5+0.25",
    "DivPrune 50 %, then query_bank": "divprune:retention_rate=0.5+query_bank:bank=bundled@0.5",
    "DivPrune, Euclidean 50 %, then query_bank": (
        "divprune:distance=euclidean,retention_rate=0.5+query_bank:bank=bundled@0.5"
    ),
}
"""Half of the tokens before the text model, and then a quarter of the KV, beside that quarter alone."""


IMPORTANT = {"ZipVL": "zipvl@0.5+0.25", "ZipVL, the rest in 2 bits": "zipvl:unimportant=kivi2@0.25"}
"""Every layer computes every token, and attention is among some of them."""


MEMORY_SHARES = (0.25, 0.1, 0.05)
_BUDGET = "query_bank:bank=bundled,retention_rate=1,vision_budget=share"
MEMORY = {
    **{rule: f"{_BUDGET},fading={rule}" for rule in ("ranked", "oldest", "newest", "equal")},
    "no budget": "query_bank:bank=bundled",
}
"""Rules by which images fade under a budget, and the method alone, which evicts from each image as it comes. A share is
one of what the full cache holds after the last turn."""


def main() -> None:
    """Run one part."""
    parts: dict[str, Callable[[argparse.Namespace], None]] = {
        "bank": bank,
        "attention": attention,
        "calibration": calibration,
        "ablation": ablation,
        "transfer": transfer,
        "heads": heads,
        "test": test,
        "rivals": rivals,
        "ladders": ladders,
        "tiers": tiers,
        "bits": bits,
        "early": early,
        "chains": chains,
        "important": important,
        "memory": memory,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--model", help="hub id or folder, with --results; default: the bundled model")
    parser.add_argument("--results", type=Path, help="folder for figures and plots; default: the committed ones")
    parser.add_argument("--samples", type=int, help="samples of each task; default: as in the committed results")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where unfinished parts are kept")
    arguments = parser.parse_args()
    if arguments.model is not None and arguments.results is None:
        parser.error("--model needs --results FOLDER: the committed results are of the bundled model.")
    arguments.plots = arguments.results or PLOTS
    arguments.results = arguments.results or RESULTS
    arguments.results.mkdir(parents=True, exist_ok=True)
    arguments.plots.mkdir(parents=True, exist_ok=True)
    parts[arguments.part](arguments)


def _with_bank(arguments: argparse.Namespace, methods: tuple[str, ...]) -> tuple[str, ...]:
    """The methods, without those that need the bundled bank where the model is another; stop if it is outdated."""
    from plphp.policy.bank import bank_at

    if arguments.model is not None:
        return tuple(method for method in methods if "bank=bundled" not in method)
    if bank_at("bundled").record["sha256"] != _weights(None):
        raise SystemExit("The bundled query bank is of other weights: run the part bank first.")
    return methods


def _evaluate(arguments: argparse.Namespace, folder: str, methods: tuple[str, ...], **settings: Any) -> Path:
    from plphp.evaluation import EvalSettings, evaluate

    settings["methods"] = _with_bank(arguments, methods)

    def tell(task: str, done: int, total: int) -> None:
        if done % 50 == 0 or done == total:
            print(f"{task}: {done} of {total} samples", file=sys.stderr, flush=True)

    out = arguments.runs / folder
    evaluate(EvalSettings(model=arguments.model, rows=192, **settings), out, workers=arguments.workers, progress=tell)
    return out


def _table(
    arguments: argparse.Namespace,
    name: str,
    methods: tuple[str, ...],
    split: str,
    retention: tuple[float, ...],
    samples: int,
    *,
    baseline: str | None = None,
    runs: str = "",
    tasks: tuple[str, ...] = (),
) -> Path:
    """Evaluate the methods of a table and write its figures to ``name``.json; the folder of the finished run.

    ``samples`` are of each task where the command says nothing else, and ``runs`` names the folder of the unfinished
    run, if not ``name``; ``tasks`` are those that every evaluation has, where none is named.
    """
    from plphp.evaluation import write_results

    samples = arguments.samples or samples
    about: dict[str, Any] = {"split": split, "retention": retention, "samples": samples, "tasks": tasks}
    out = _evaluate(arguments, runs or name, methods, **about)
    write_results(out, arguments.results / f"{name}.json", baseline)
    return out


def _labelled(methods: Mapping[str, str]) -> tuple[str, ...]:
    """Lines of methods with their labels."""
    return tuple(f"{label}={method}" for label, method in methods.items())


def _presets(arguments: argparse.Namespace) -> Iterator[str]:
    """Methods with the fixed thresholds that the part ``calibration`` found; stop if it found them on other weights."""
    found = json.loads((arguments.results / "calibration.json").read_text(encoding="utf-8"))
    if found["sha256"] != _weights(arguments.model):
        raise SystemExit("The thresholds in calibration.json are of other weights: run the part calibration first.")
    names = ("retention_rate", "retention_delta", "attentive_threshold", "indifferent_threshold")
    for row in found["targets"]:
        settings = ",".join(f"{name}={row['config'][name]}" for name in names)
        yield f"plphp_thresholds_{row['target']}=plphp:{settings}"


def test(arguments: argparse.Namespace) -> None:
    """The methods of earlier years on the test split."""
    methods = (*METHODS, *_presets(arguments))
    _table(arguments, "quality", methods, "test", RETENTION, 500, baseline="random1", runs="test")


def rivals(arguments: argparse.Namespace) -> None:
    """Ragged heads, banks and this year's rivals on the test split, with paired differences from two lines."""
    from plphp.evaluation import read_results, save_score_plots, summarize

    out = _table(arguments, "rivals", RIVALS, "test", RIVAL_RETENTION, 500, baseline="random1")
    path = arguments.results / "rivals.json"
    paired = {baseline: _differences(summarize(out, baseline)) for baseline in ("query_bank", "query_bank_equal")}
    path.write_text(json.dumps({**read_results(path), "paired": paired}, indent=1) + "\n", encoding="utf-8")
    save_score_plots(summarize(out, "random1"), arguments.plots)


def _differences(metrics: dict[str, Any]) -> dict[str, Any]:
    """Differences from the baseline by group, and over all groups, of every variant."""
    parts = {**metrics["groups"], "overall": metrics["overall"]}
    return {
        name: {variant: own["vs_baseline"] for variant, own in part["variants"].items() if "vs_baseline" in own}
        for name, part in parts.items()
    }


def heads(arguments: argparse.Namespace) -> None:
    """Choices about heads, banks and candidates on the development split."""
    _table(arguments, "heads", _labelled(HEADS), "dev", HEADS_RETENTION, 40, baseline=next(iter(HEADS)))


def ladders(arguments: argparse.Namespace) -> None:
    """Ladders and rungs on the development split."""
    _table(arguments, "ladders", _labelled(LADDERS), "dev", LADDERS_RETENTION, 40)


def tiers(arguments: argparse.Namespace) -> None:
    """Few bits in the place of eviction on the test split."""
    _table(arguments, "tiers", TIERS, "test", TIERS_RETENTION, 500)


def bits(arguments: argparse.Namespace) -> None:
    """Every entry in one rung on the test split."""
    _table(arguments, "bits", BITS, "test", TIERS_RETENTION, 500)


def early(arguments: argparse.Namespace) -> None:
    """What leaves before and inside the text model, on the test split; each line reads every prompt anew."""
    _table(arguments, "early", _labelled(STAGES), "test", TIERS_RETENTION, 500)


def chains(arguments: argparse.Namespace) -> None:
    """Half of the tokens and a quarter of the KV on the test split, with paired differences from that quarter alone."""
    _table(arguments, "chains", _labelled(CHAINS), "test", TIERS_RETENTION, 500, baseline="query_bank")


def important(arguments: argparse.Namespace) -> None:
    """Attention among important tokens on the test split; each line reads every prompt anew."""
    _table(arguments, "important", _labelled(IMPORTANT), "test", TIERS_RETENTION, 500)


def memory(arguments: argparse.Namespace) -> None:
    """Rules of fading under a budget on the test split; each line reads every conversation anew."""
    tasks, baseline = ("arriving_images",), next(iter(MEMORY))
    _table(arguments, "memory", _labelled(MEMORY), "test", MEMORY_SHARES, 100, baseline=baseline, tasks=tasks)


def ablation(arguments: argparse.Namespace) -> None:
    """Choices within the methods on the development split."""
    _table(arguments, "ablation", _labelled(ABLATION), "dev", ABLATION_RETENTION, 40, baseline=next(iter(ABLATION)))


def transfer(arguments: argparse.Namespace) -> None:
    """Each group of tasks with a bank that was collected on the other groups alone, on the development split."""
    import plphp
    from plphp.evaluation import GROUPS, summarize
    from plphp.inputs.loading import load_model
    from plphp.studies.provenance import provenance

    model, processor = load_model(arguments.model, "float32", None)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    groups = {}
    for group in GROUPS:
        bank = arguments.runs / f"bank-without-{group}.safetensors"
        plphp.collect_query_bank(model, _prompts(processor, 8, seed=3, without=group)).save(bank)
        methods = {
            "bank of the other groups": f"query_bank:bank={bank},heads=equal",
            "bank of all groups": "query_bank:bank=bundled,heads=equal",
            "random": "random",
        }
        out = _evaluate(
            arguments,
            f"transfer-{group}",
            tuple(f"{label}={method}" for label, method in methods.items()),
            tasks=(group,),
            split="dev",
            retention=ABLATION_RETENTION,
            samples=arguments.samples or 40,
        )
        figures = summarize(out, "bank of all groups")
        groups[group] = {"variants": figures["variants"], "figures": figures["groups"][group]["variants"]}
    about = {**provenance(model), "samples": arguments.samples or 40, "split": "dev"}
    about["bank_dtype"] = about.pop("dtype")  # the answers are given in the model's own
    _write(arguments, "transfer.json", {**about, "groups": groups})


def _prompts(processor: Any, each: int, seed: int, without: str = "") -> Iterator[dict[str, Any]]:
    """Inputs of the first questions of all tasks, those of one group left out, from the development split."""
    from plphp.evaluation import available_tasks
    from plphp.evaluation.running.conversation import prompt_inputs

    for task in available_tasks().values():
        if task.group != without:
            for sample in task.samples("dev", each, seed):
                yield prompt_inputs(processor, sample)


def bank(arguments: argparse.Namespace) -> None:
    """Queries of answers to prompts that no other part uses, and codebooks from the same prompts."""
    import plphp
    from plphp.inputs.loading import load_model
    from plphp.policy.bank import BUNDLED

    if arguments.model is not None:
        raise SystemExit("This part is for the bundled model: use plphp collect for another one.")
    model, processor = load_model(None, "float32", None)
    prompts = _prompts(processor, arguments.samples or 8, seed=3)
    found = plphp.collect_query_bank(
        model,
        prompts,
        book_tokens=2**16,  # all of them: codebooks of few heads are soon learned
        progress=lambda step: print(step, file=sys.stderr),
    )
    record = {**found.record, "sha256": _weights(None)}
    dataclasses.replace(found, record=record).save(BUNDLED)


def attention(arguments: argparse.Namespace) -> None:
    """Vision attention per layer and head, for three choices of query rows."""
    import plphp
    from plphp.inputs.loading import load_model
    from plphp.show.profile_plots import plot_heads, plot_profile

    model, processor = load_model(arguments.model, "auto", None)
    found = plphp.profile(model, list(_prompts(processor, arguments.samples or 10, seed=4)), (1, 8, "text"))
    summary = {str(rows): found.summary(rows) for rows in found.query_rows}
    statements = {str(rows): str(found.re_attention(rows)) for rows in found.query_rows}
    about = {**found.provenance, "prompts": len(found.prompts)}
    _write(arguments, "attention.json", {**about, "re_attention": statements, **summary})
    plot_profile(found).savefig(arguments.plots / "vision-attention.png", dpi=120)
    plot_heads(found).savefig(arguments.plots / "heads.png", dpi=120)


def calibration(arguments: argparse.Namespace) -> None:
    """Thresholds from some prompts, and what they keep of others."""
    import plphp
    from plphp.inputs.loading import load_model
    from plphp.studies.provenance import provenance

    model, processor = load_model(arguments.model, "auto", None)
    each = arguments.samples or 5
    rows = []
    for target in (0.5, 0.4, 0.25, 0.1):
        asked = plphp.PLPHPConfig(target_retention=target)
        config = plphp.calibrate(model, _prompts(processor, each, seed=1), asked)
        measured = {
            "thresholds, same prompts": plphp.measure_retention(model, _prompts(processor, each, seed=1), config),
            "thresholds, other prompts": plphp.measure_retention(model, _prompts(processor, each, seed=2), config),
            "quantiles of each prompt": plphp.measure_retention(model, _prompts(processor, each, seed=2), asked),
        }
        rows.append({"target": target, "config": config.to_dict(), **{k: v.summary() for k, v in measured.items()}})
    _write(arguments, "calibration.json", {**provenance(model), "targets": rows})


@functools.cache
def _weights(model: str | None) -> str:
    from plphp.inputs.loading import load_model
    from plphp.inputs.weights import weights_hash

    return weights_hash(load_model(model)[0])


def _write(arguments: argparse.Namespace, name: str, values: dict[str, Any]) -> None:
    """Write a part's figures, with the hash of the weights that they are of."""
    record = {**values, "sha256": _weights(arguments.model)}
    (arguments.results / name).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
