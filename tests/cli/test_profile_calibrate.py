# SPDX-License-Identifier: Apache-2.0
"""``plphp profile``, ``plphp calibrate`` and ``plphp collect``: their files, what they print, and mistakes."""

from __future__ import annotations

import itertools
import json
import sys
import tomllib
from pathlib import Path

import pytest
from command_line import error, ok, run
from PIL import Image

import tiny_hub
from plphp import AttentionProfile, PLPHPConfig, QueryBank
from plphp.cli.calibrate import split
from plphp.inputs.prompts_file import read_prompts

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "images"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    lines = []
    for number in range(10):
        tiny_hub.picture(folder / f"{number}.png", seed=20 * number)
        lines.append(json.dumps({"images": [f"{number}.png"] * (1 + number % 2), "question": f"What is {number}?"}))
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines))
    return path


class TestProfile:
    def test_files(self, folder: Path, prompts: Path, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        out = tmp_path / "new" / "profile"
        ask = ("profile", "--model", folder, "--prompts", prompts, "--query-rows", "1, 3,text", "--out", out)
        values = json.loads(ok(*ask, "--json"))
        assert [Path(file).name for file in values["files"]] == ["profile.json", "vision-attention.png", "heads.png"]
        profile = AttentionProfile.from_json(out / "profile.json")
        assert profile.query_rows == (1, 3, "text")
        assert [prompt.vision_tokens for prompt in profile.prompts] == [16, 32] * 5
        assert profile.provenance["model"] == str(folder)
        assert values["re_attention"]["text"]["prompts"] == 10
        for file in values["files"][1:]:
            with Image.open(file) as drawn:
                assert drawn.size[0] > 500
        text = ok(*ask)
        assert "last 3" in text
        assert sum("re-attention" in line for line in text.splitlines()) == 3

    def test_one_prompt_and_no_plots(self, folder: Path, prompts: Path, tmp_path: Path) -> None:
        images = ("--image", prompts.parent / "1.png", "--image", prompts.parent / "2.png")
        text = ok("profile", "--model", folder, *images, "--question", "What?", "--out", tmp_path, "--no-plots")
        assert "too few prompts" in text
        assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]
        assert AttentionProfile.from_json(tmp_path / "profile.json").prompts[0].vision_tokens == 32

    def test_the_bundled_model(self, tmp_path: Path) -> None:
        ok("profile", "--prompts", EXAMPLES / "questions.json", "--out", tmp_path, "--no-plots")
        profile = AttentionProfile.from_json(tmp_path / "profile.json")
        assert profile.provenance["model"] == "the bundled model"
        assert {prompt.vision_tokens for prompt in profile.prompts} == {196, 392, 588}
        assert profile.layer_scores(1).shape == (12, profile.provenance["decoder_layers"])

    @pytest.mark.parametrize(
        ("options", "part"),
        [
            ((), "either --prompts, or --question"),
            (("--prompts", "none.jsonl"), "none.jsonl"),
            (("--prompts", "none.jsonl", "--question", "a"), "either --prompts, or --question"),
            (("--prompts", "none.jsonl", "--image", "a.png"), "--image goes with --question"),
            (("--question", "a"), "no image slot"),
            (("--question", "a", "--image", "none.png"), "There is no image file none.png"),
            (("--question", "a", "--image", EXAMPLES / "grid-1.png", "--query-rows", "1,all"), "query_rows"),
            (("--question", "a", "--image", EXAMPLES / "grid-1.png", "--query-rows", "0"), "query_rows"),
            (("--question", "a", "--image", EXAMPLES / "grid-1.png", "--query-rows", "1,1"), "different choices"),
            (("--question", "a", "--image", EXAMPLES / "grid-1.png", "--model", "/none"), "/none"),
        ],
    )
    def test_mistakes(self, folder: Path, tmp_path: Path, options: tuple[object, ...], part: str) -> None:
        assert part in error("profile", "--model", folder, "--out", tmp_path, *options)

    def test_matplotlib_is_missed_before_the_work(
        self, folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        ask = ("profile", "--model", folder, "--prompts", prompts, "--out", tmp_path / "new")
        assert "plphp[plots]" in error(*ask)
        assert not (tmp_path / "new").exists()
        ok(*ask, "--no-plots")


class TestCalibrate:
    def test_the_preset_serves_generate(self, folder: Path, prompts: Path, tmp_path: Path) -> None:
        out = tmp_path / "preset.toml"
        ask = ("calibrate", "--model", folder, "--prompts", prompts, "--target-retention", 0.5, "--out", out)
        values = json.loads(ok(*ask, "--json"))
        config = PLPHPConfig.from_toml(out)
        assert config == PLPHPConfig.from_dict(values["config"])
        assert (config.retention_rate, config.calibrated_layers, config.target_retention) == (0.5, 3, None)
        record = tomllib.loads(out.read_text())["calibration"]
        assert record == {name: value for name, value in values["calibration"].items() if value is not None}
        assert record["calibration_prompts"]["prompts"] == 7
        assert record["calibration_prompts"]["retention_mean"] == pytest.approx(0.5, abs=0.05)
        held = values["measured"]["held_out_prompts"]
        assert len(held["retentions"]) == 3
        assert held["retention_mean"] == record["held_out_prompts"]["retention_mean"]
        assert {sum(counts.values()) for counts in held["classes"].values()} == {3}
        ask = ("generate", "--model", folder, "--image", prompts.parent / "1.png", "--prompt", "a", "--json")
        used = json.loads(ok(*ask, "--max-new-tokens", 2, "--config-file", out))["report"]["config"]
        assert used["attentive_threshold"] == config.attentive_threshold

    def test_what_is_printed(self, folder: Path, prompts: Path, tmp_path: Path) -> None:
        ask = ("calibrate", "--model", folder, "--prompts", prompts, "--out", tmp_path / "a.toml")
        text = ok(*ask, "--holdout", 0.5)
        assert "of the vision entries kept" in text
        assert "over 5 prompt(s)" in text
        assert "indifferent below" in text
        assert PLPHPConfig.from_toml(tmp_path / "a.toml").retention_rate == 0.4
        assert "held out" not in ok(*ask, "--holdout", 0)

    def test_a_schedule(self, folder: Path, prompts: Path, tmp_path: Path) -> None:
        out = tmp_path / "preset.toml"
        ask = ("calibrate", "--model", folder, "--prompts", prompts, "--out", out)
        text = ok(*ask, "--config", "g_search:tolerance=10")
        assert "schedule 1:0" in text
        assert "indifferent below" not in text
        config = PLPHPConfig.from_toml(out)
        assert (config.options["schedule"], config.calibrated_layers) == ("1:0", 3)
        answer = ("generate", "--model", folder, "--image", prompts.parent / "1.png", "--prompt", "a", "--json")
        report = json.loads(ok(*answer, "--max-new-tokens", 2, "--config-file", out))["report"]
        assert report["config"]["options"]["schedule"] == "1:0"
        ok(*ask, "--method", "g_search")

    def test_what_a_search_takes_is_said_before_it_begins(self, folder: Path, prompts: Path, tmp_path: Path) -> None:
        ask = ("calibrate", "--model", folder, "--prompts", prompts, "--out", tmp_path / "a.toml")
        in_vain = run(*ask, "--holdout", 0.5, "--config", "g_search:tolerance=0,groups=1")
        assert (in_vain.exit_code, in_vain.stdout) == (2, "")
        note, message = in_vain.stderr.splitlines()
        assert note == (
            "searching at 1 of 3 layers: each of 5 prompt(s) is answered once and read at most 6 times, with 16 tokens "
            "of its answer"
        )
        assert "Within the tolerance of 0 nats" in message

    def test_settings_are_taken_over(self, folder: Path, prompts: Path, tmp_path: Path) -> None:
        settings = "shared:target_retention=0.3,query_rows=text,exempt_layers=0"
        ask = ("calibrate", "--model", folder, "--prompts", prompts, "--out", tmp_path / "a.toml")
        text = ok(*ask, "--config", settings)
        preset = PLPHPConfig.from_toml(tmp_path / "a.toml")
        assert (preset.method, preset.retention_rate) == ("shared", 0.3)
        assert (preset.query_rows, preset.exempt_layers) == ("text", (0,))
        assert "with the exempt layers" in text

    def test_the_bundled_model_reaches_the_target_on_its_prompts(self, tmp_path: Path) -> None:
        ask = ("calibrate", "--prompts", EXAMPLES / "questions.json", "--out", tmp_path / "a.toml", "--json")
        values = json.loads(ok(*ask))["calibration"]
        assert values["calibration_prompts"]["retention_mean"] == pytest.approx(0.4, abs=0.02)
        assert values["model"] == "the bundled model"

    def test_the_split_is_seeded_and_complete(self, prompts: Path) -> None:
        questions = read_prompts(prompts)
        for seed in range(3):
            used, held = split(questions, 0.3, seed)
            assert len(held) == 3
            assert sorted(used + held, key=questions.index) == questions
            assert (used, held) == split(questions, 0.3, seed)
        assert split(questions, 0.3, 0) != split(questions, 0.3, 1)
        assert [len(part) for part in split(questions[:2], 0.9, 0)] == [1, 1]

    @pytest.mark.parametrize(
        ("options", "part"),
        [
            (("--method", "uniform"), "'uniform' does not sort layers"),
            (("--method", "plhp"), "Did you mean 'plphp'?"),
            (("--target-retention", 40), "between 0 and 1"),
            (("--config", "plphp:retention_rate=0.4"), "target_retention"),
            (("--config", "plphp", "--method", "plphp"), "contradict"),
            (("--config", "plphp:target_retention=0.4,exempt_layers=9"), "names layer 9"),
            (("--out", "no/such/folder/a.toml"), "no/such/folder"),
            (("--out", "/"), "is a folder"),
            (("--model", "/none"), "/none"),
        ],
    )
    def test_mistakes(
        self, folder: Path, prompts: Path, tmp_path: Path, options: tuple[object, ...], part: str
    ) -> None:
        base = {"--model": folder, "--prompts": prompts, "--out": tmp_path / "a.toml"}
        base |= dict(zip(options[::2], options[1::2], strict=True))
        assert part in error("calibrate", *itertools.chain(*base.items()))
        assert not (tmp_path / "a.toml").exists()

    def test_prompts_that_do_not_fit(self, folder: Path, prompts: Path, tmp_path: Path) -> None:
        lines = prompts.read_text().splitlines()
        wrong = prompts.parent / "wrong.jsonl"
        ask = ("calibrate", "--model", folder, "--prompts", wrong, "--out", tmp_path / "a.toml")
        wrong.write_text(lines[0])
        assert "--holdout 0" in error(*ask)
        wrong.write_text("\n".join([*lines, '{"images": ["0.png"]}']))
        assert 'line 11: expected either "question" or "turns"' in error(*ask)
        wrong.write_text("\n".join([*lines, '{"images": ["0.png"], "question": "<image> and <image>"}']))
        assert "line 11: The prompt has 2 image slot" in error(*ask)


class TestCollect:
    def test_the_bank_serves_generate(self, folder: Path, prompts: Path, tmp_path: Path) -> None:
        out = tmp_path / "bank.safetensors"
        values = json.loads(
            ok("collect", "--model", folder, "--prompts", prompts, "--max-new-tokens", 5, "--out", out, "--json")
        )
        assert (values["prompts"], values["model"]) == (10, str(folder))
        assert dict(QueryBank.load(out).record) == {key: values[key] for key in values if key != "file"}
        shown = json.loads(
            ok(
                *("generate", "--model", folder, "--image", prompts.parent / "0.png", "--prompt", "What?", "--json"),
                *("--config", f"query_bank:bank={out},retention_rate=0.25"),
            )
        )
        assert shown["report"]["config"]["method"] == "query_bank"
        assert "tokens in 10 answer(s)" in ok(
            "collect", "--model", folder, "--prompts", prompts, "--max-new-tokens", 5, "--out", out
        )

    def test_mistakes(self, folder: Path, prompts: Path, tmp_path: Path) -> None:
        ask = ("collect", "--model", folder, "--prompts", prompts)
        assert "There is no folder" in error(*ask, "--out", tmp_path / "none" / "a")
        assert "is a folder" in error(*ask, "--out", tmp_path)
        assert "Cannot read the prompts" in error(
            "collect", "--model", folder, "--prompts", tmp_path / "none", "--out", tmp_path / "a"
        )
        assert not (tmp_path / "a").exists()
