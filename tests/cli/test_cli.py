# SPDX-License-Identifier: Apache-2.0
"""Every command of ``plphp``: what it prints, as text and as JSON, and its exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import error, ok, run
from PIL import Image

import plphp
import tiny_hub
from plphp.families.registry import available_families
from plphp.methods.registry import available_methods

SOURCES = Path(plphp.__file__).parent


@pytest.fixture(scope="module")
def report(folder: Path, picture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reports") / "report.json"
    ask = ("generate", "--model", folder, "--prompt", "What?", "--max-new-tokens", 6, "--report", path)
    ok(*ask, "--image", picture, "--image", picture)
    return path


def ask(folder: Path, picture: Path | None, *more: object) -> tuple[object, ...]:
    images = () if picture is None else ("--image", picture)
    return ("generate", "--model", folder, *images, "--max-new-tokens", 6, *more)


class TestGenerate:
    def test_streams_the_answer_that_json_holds(self, folder: Path, picture: Path) -> None:
        streamed = run(*ask(folder, picture, "--prompt", "What?"))
        values = json.loads(ok(*ask(folder, picture, "--prompt", "What?", "--json")))
        assert streamed.exit_code == 0
        assert streamed.stdout.strip() == values["answer"]
        assert values["tokens"] == 6
        assert "KV cache" in streamed.stderr

    def test_without_a_query_bank_it_says_what_is_left(self, folder: Path, picture: Path, tmp_path: Path) -> None:
        config = "query_bank:retention_rate=0.3,collect=2"
        alone = run(*ask(folder, picture, "--prompt", "What?", "--config", config))
        assert alone.exit_code == 0
        assert "This answer is not pruned: the query bank is of 1 of 2 prompts now, and nothing is kept" in alone.stderr
        assert "folder=DIR" in alone.stderr
        banks = tmp_path / "banks"
        kept = ask(folder, picture, "--prompt", "What?", "--config", f"{config},folder={banks}")
        said = [run(*kept).stderr for _ in range(3)]
        assert f"1 of 2 prompts now, which {banks} keeps; 1 more to go." in said[0]
        assert f"2 of 2 prompts now, which {banks} keeps; the next is pruned." in said[1]
        assert "not pruned" not in said[2]
        assert "31% of the vision entries kept" in said[2]
        report = tmp_path / "report.json"
        values = json.loads(ok(*ask(folder, picture, "--prompt", "What?", "--config", config, "--json")))
        assert values["report"]["collecting"] == {"collected": 1, "wanted": 2}
        ok(*ask(folder, picture, "--prompt", "What?", "--config", config, "--report", report))
        assert "vision tokens" in ok("inspect", report)
        assert "A comparison cannot collect the query bank" in error(
            *ask(folder, picture, "--prompt", "What?", "--config", config, "--compare", "--json")
        )

    def test_options_reach_the_method(self, folder: Path, picture: Path, tmp_path: Path) -> None:
        preset = tmp_path / "preset.toml"
        preset.write_text("[plphp]\nmethod = 'uniform'\nretention_rate = 0.25\n")
        for options in (
            ("--config", "uniform:retention_rate=0.25"),
            ("--config-file", preset),
            ("--method", "uniform", "--retention-rate", 0.25),
        ):
            values = json.loads(ok(*ask(folder, picture, "--prompt", "What?", *options, "--json")))
            layers = values["report"]["prompts"][0]["layers"]
            assert [row["kept"] for layer in layers for row in layer["rows"]] == [[4, 4]] * 3, options

    def test_a_target_is_met(self, folder: Path, picture: Path) -> None:
        values = json.loads(ok(*ask(folder, picture, "--prompt", "W", "--target-retention", 0.5, "--json")))
        assert values["report"]["retention"] == pytest.approx(0.5, abs=0.05)

    def test_sampling_follows_the_seed(self, folder: Path, picture: Path) -> None:
        sampled = ask(folder, picture, "--prompt", "What?", "--temperature", 2.0, "--json", "--seed")
        answers = [json.loads(ok(*sampled, seed))["answer"] for seed in (1, 1, 2)]
        assert answers[0] == answers[1] != answers[2]

    def test_beams_do_not_stream(self, folder: Path, picture: Path) -> None:
        assert ok(*ask(folder, picture, "--prompt", "What?", "--num-beams", 2)).strip()

    def test_compare_shows_both(self, folder: Path, picture: Path) -> None:
        compare = ask(folder, picture, "--prompt", "What?", "--compare", "--rounds", 1)
        text = ok(*compare)
        values = json.loads(ok(*compare, "--json"))
        assert values["unpruned"]["texts"][0][:4] in text
        assert values["pruned"]["kv_bytes"] < values["unpruned"]["kv_bytes"]
        assert "vision attention" in text

    def test_compare_with_full_retention_is_equal(self, folder: Path, picture: Path) -> None:
        compare = ask(folder, picture, "--prompt", "What?", "--compare", "--rounds", 1, "--retention-rate", 1)
        assert json.loads(ok(*compare, "--json"))["same_tokens"]

    def test_a_chat_with_paths_beside_it(self, folder: Path, picture: Path, tmp_path: Path) -> None:
        tiny_hub.picture(tmp_path / "b.png", seed=9)
        chat = tmp_path / "chat.json"
        turns = [
            {"role": "user", "content": [{"type": "image", "path": "b.png"}, {"type": "text", "text": "one"}]},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "three"}]},
        ]
        chat.write_text(json.dumps(turns))
        report = tmp_path / "report.json"
        ok(*ask(folder, picture, "--chat", chat, "--system", "short", "--report", report))
        assert len(plphp.PruneReport.from_json(report).prompts[0].images[0]) == 2

    def test_frames_are_those_of_a_chats_videos_too(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: dict[str, Any] = {}

        def build_inputs(*_: Any, **options: Any) -> None:
            asked.update(options)
            raise plphp.ConfigError("The processor of a tiny model takes no videos.")

        monkeypatch.setattr("plphp.inputs.prompt.build_inputs", build_inputs)
        (tmp_path / "film").mkdir()
        for index in range(3):
            tiny_hub.picture(tmp_path / "film" / f"{index}.png")
        chat = tmp_path / "chat.json"
        chat.write_text(json.dumps([{"role": "user", "content": [{"type": "video", "path": "film"}, {"text": "a"}]}]))
        error(*ask(folder, None, "--chat", chat, "--frames", 2))
        assert (asked["frames"], asked["videos"]) == (2, [])
        error(*ask(folder, None, "--prompt", "a", "--video", tmp_path / "film", "--frames", 2))
        assert [len(frames) for frames in asked["videos"]] == [2]


class TestMistakes:
    """A wrong file, image, model, prompt or option: a single line, exit code 2, no traceback."""

    def test_no_image_file(self, folder: Path) -> None:
        assert "There is no image file nowhere.png" in error(*ask(folder, Path("nowhere.png"), "--prompt", "a"))

    def test_not_an_image(self, folder: Path, tmp_path: Path) -> None:
        path = tmp_path / "text.png"
        path.write_text("not an image")
        assert "is not an image" in error(*ask(folder, path, "--prompt", "a"))

    def test_broken_image(self, folder: Path, picture: Path, tmp_path: Path) -> None:
        path = tmp_path / "cut.png"
        path.write_bytes(picture.read_bytes()[:2000])
        assert "is broken" in error(*ask(folder, path, "--prompt", "a"))

    @pytest.mark.parametrize("side", [10_000, 20_000])  # beyond plphp's limit, and beyond Pillow's own
    def test_huge_image(self, folder: Path, tmp_path: Path, side: int) -> None:
        path = tiny_hub.png_header(tmp_path / "huge.png", (side, side))
        assert "make it smaller" in error(*ask(folder, path, "--prompt", "a"))

    def test_folder_in_the_place_of_an_image(self, folder: Path, tmp_path: Path) -> None:
        assert "is a folder" in error(*ask(folder, tmp_path, "--prompt", "a"))

    def test_address_in_the_place_of_an_image(self, folder: Path) -> None:
        assert "download the file first" in error(
            "generate", "--model", folder, "--image", "https://example.org/a.png", "--prompt", "a"
        )

    @pytest.mark.parametrize("model_type", ["bert", "mllama"])
    def test_unknown_and_unsupported_model_types(self, picture: Path, tmp_path: Path, model_type: str) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        message = error(*ask(tmp_path, picture, "--prompt", "a"))
        assert repr(model_type) in message
        assert message.startswith("error: plphp does not")

    @pytest.mark.parametrize("model", ["/no/such/folder", "./none", "no/such/thing/at/all", "nobody/nothing", "a b"])
    def test_no_such_model(self, picture: Path, model: str) -> None:
        assert model in error("generate", "--model", model, "--image", picture, "--prompt", "a")

    def test_folder_without_a_model(self, picture: Path, tmp_path: Path) -> None:
        assert "holds no config.json" in error(*ask(tmp_path, picture, "--prompt", "a"))

    def test_prompt_without_an_image_slot(self, folder: Path) -> None:
        assert "no image slot" in error(*ask(folder, None, "--prompt", "What?"))

    def test_chat_without_an_image_slot(self, folder: Path, picture: Path, tmp_path: Path) -> None:
        chat = tmp_path / "chat.json"
        chat.write_text(json.dumps([{"role": "user", "content": "What?"}]))
        assert "no image slot" in error(*ask(folder, picture, "--chat", chat))

    def test_other_number_of_slots(self, folder: Path, picture: Path) -> None:
        message = error(*ask(folder, picture, "--prompt", "<image> and <image>"))
        assert "2 image slot" in message

    @pytest.mark.parametrize("text", ["{", '{"role": "user"}', "[1]", '[{"role": "user", "content": 1}]'])
    def test_broken_chat(self, folder: Path, picture: Path, tmp_path: Path, text: str) -> None:
        chat = tmp_path / "chat.json"
        chat.write_text(text)
        assert "chat" in error(*ask(folder, picture, "--chat", chat))

    def test_no_chat_file(self, folder: Path, picture: Path) -> None:
        assert "none.json" in error(*ask(folder, picture, "--chat", "none.json"))

    @pytest.mark.parametrize(
        ("options", "part"),
        [
            (("--config", "plphp", "--method", "uniform"), "contradict"),
            (("--config", "plphp", "--config-file", "a.toml"), "contradict"),
            (("--retention-rate", 0.4, "--target-retention", 0.4), "contradict"),
            (("--config", "plphp:retention_rat=0.5"), "Did you mean 'retention_rate'?"),
            (("--config-file", "none.toml"), "none.toml"),
            (("--method", "plhp"), "Did you mean 'plphp'?"),
            (("--retention-rate", 40), "between 0 and 1"),
            (("--chat", "chat.json"), "either --prompt or --chat"),
            (("--seed", 1), "--seed"),
            (("--temperature", 0), "--temperature"),
            (("--top-p", 2), "--top-p"),
            (("--dtype", "int4"), "int4"),
            (("--device", "nowhere"), "nowhere"),
            (("--report", "no/such/folder/r.json"), "no/such/folder"),
            (("--video", "film.mp4"), "film.mp4"),
        ],
    )
    def test_options(self, folder: Path, picture: Path, options: tuple[object, ...], part: str) -> None:
        assert part in error(*ask(folder, picture, "--prompt", "a", *options))

    def test_video_for_a_model_that_takes_none(self, folder: Path, picture: Path) -> None:
        message = error(*ask(folder, None, "--prompt", "a", "--video", picture.parent))
        assert "LlavaProcessor takes no videos" in message

    @pytest.mark.parametrize("command", ["inspect", "plot"])
    def test_reports(self, tmp_path: Path, command: str) -> None:
        out = ("--out", tmp_path / "out") if command == "plot" else ()
        assert "none.json" in error(command, tmp_path / "none.json", *out)
        for text in ("{", "{}", '{"format": 99}', "[]"):
            (tmp_path / "r.json").write_text(text)
            assert "report" in error(command, tmp_path / "r.json", *out)

    def test_row_layer_and_images_of_a_report(self, report: Path, picture: Path, tmp_path: Path) -> None:
        assert "rows 0 to 0" in error("inspect", report, "--row", 3)
        assert "layers 0, 1, 2, not 9" in error("plot", report, "--out", tmp_path, "--layer", 9)
        assert "2 image(s), but 1" in error("plot", report, "--out", tmp_path, "--image", picture)

    def test_out_is_a_file(self, report: Path, picture: Path) -> None:
        assert picture.name in error("plot", report, "--out", picture)

    def test_interrupt(self, folder: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("plphp.inputs.loading.load_weights", interrupted)
        result = run(*ask(folder, picture, "--prompt", "a"))
        assert result.exit_code == 130
        assert "Traceback" not in result.output

    def test_bugs_are_not_hidden(self, folder: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: Any, **__: Any) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr("plphp.inputs.loading.load_weights", broken)
        assert isinstance(run(*ask(folder, picture, "--prompt", "a")).exception, ZeroDivisionError)


class TestReports:
    def test_inspect(self, report: Path) -> None:
        text = ok("inspect", report)
        values = json.loads(ok("inspect", report, "--json"))
        assert "32 vision tokens" in text
        assert len(values["prompts"][0]["layers"]) == 3
        assert values["kv_bytes"] == plphp.PruneReport.from_json(report).kv_bytes

    def test_plot(self, report: Path, picture: Path, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        images = ("--image", picture, "--image", picture)
        files = json.loads(ok("plot", report, "--out", tmp_path / "new", *images, "--layer", 1, "--json"))["files"]
        assert [Path(file).name for file in files] == [
            "kept-per-layer.png",
            "kept-per-head-layer-1.png",
            "vision-attention.png",
        ]
        for file in files:
            with Image.open(file) as drawn:
                assert drawn.size[0] > 500


class TestSupport:
    def test_methods_and_families(self) -> None:
        assert {method["name"] for method in json.loads(ok("methods", "--json"))} == set(available_methods())
        assert {family["name"] for family in json.loads(ok("families", "--json"))} == set(available_families())
        shown = " ".join(ok("methods").split())
        assert "arXiv:2502.14504" in shown
        assert "first of all" in shown
        assert "│ t10 │ pr2=.20,rvq=.24,pq=.32 │" in shown
        assert "│ rvq │ 2 │ yes │" in shown
        assert "│ kivi2 │ 3 │ no │" in shown
        bank = next(method for method in json.loads(ok("methods", "--json")) if method["name"] == "query_bank")
        assert bank["when"].startswith("first of all")
        assert bank["options"]["collect"] == 16
        stages = [method["stage"] for method in json.loads(ok("methods", "--json"))]
        assert list(dict.fromkeys(stages)) == ["encoder", "prefill", "attention, kv", "kv"]
        assert stages == sorted(stages, key=["encoder", "prefill", "attention, kv", "kv"].index)
        early = [method for method in json.loads(ok("methods", "--json")) if method["stage"] == "encoder"]
        assert all(method["when"] != "to compare" for method in early)
        assert "qwen2_5_vl" in ok("families")

    def test_doctor_judges_a_model(self, folder: Path, tmp_path: Path) -> None:
        values = json.loads(ok("doctor", "--model", folder, "--json"))
        assert values["usable"]
        assert values["verdict"].startswith(f"plphp works here with {folder}, on cpu")
        assert "layers pruned: all (of 3)" in values["model"]["detail"]
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "mllama"}))
        refused = run("doctor", "--model", tmp_path)
        assert refused.exit_code == 1
        assert "cross-attention" in refused.stdout

    def test_doctor_says_what_is_unsupported_and_why(self, folder: Path) -> None:
        text = ok("doctor", "--model", folder)
        assert re.search(r" kernels are used and torch stands in for the rest\.\Z", text.rstrip("\n").splitlines()[-1])
        for part in ("torch", "transformers", "flex_attention", "not supported", "mllama", "plphp[plots]"):
            assert part in text

    @pytest.mark.parametrize("trouble", [None, "it differs from the reference on this device by 0.3"])
    def test_doctor_says_which_kernels_are_used(
        self, folder: Path, trouble: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kernels = json.loads(ok("doctor", "--model", folder, "--json"))["kernels"]
        triton = [check for check in kernels if "Triton" in check["name"]]
        assert len(triton) == 12 * max(1, torch.cuda.device_count())
        if not torch.cuda.is_available():
            assert {(check["ok"], check["detail"]) for check in triton} == {(False, "not used: it needs a CUDA device")}
        cpp = {check["name"]: check["detail"] for check in kernels if "C++" in check["name"]}
        used = "used: it agrees with the reference here, at head dimension 128"
        details = {"float32": used, "bfloat16": used, "float16": "not used: it does not know the dtype torch.float16"}
        operations = ("decode_attention", "attend_codes", "nearest_centroids")
        assert cpp == {f"{name}, C++, cpu, {dtype}": said for name in operations for dtype, said in details.items()}
        monkeypatch.setattr(
            "plphp.studies.doctor.choice.UNSUPPORTED", dict.fromkeys(("Triton", "C++"), lambda *_: None)
        )
        monkeypatch.setattr("plphp.studies.doctor.choice.trouble", lambda *_: trouble)
        text = ok("doctor", "--model", folder)
        assert ("used: it agrees with the reference here" if trouble is None else f"not used: {trouble}") in text

    def test_version(self) -> None:
        assert ok("--version") == f"plphp {plphp.__version__}\n"

    def test_help_names_all_commands(self) -> None:
        text = ok("--help")
        for command in ("generate", "inspect", "plot", "methods", "families", "doctor"):
            assert command in text

    def test_no_arguments_show_the_help(self) -> None:
        assert "generate" in run().output


class TestProcess:
    """A real process: what only shows outside of this one."""

    def test_clean_output(self, folder: Path, picture: Path) -> None:
        command = [sys.executable, "-m", "plphp", *map(str, ask(folder, picture, "--prompt", "a", "--json"))]
        environment = {**os.environ, "NO_COLOR": "1", "PYTHONPATH": str(SOURCES.parent), "PYTHONIOENCODING": "ascii"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert "\x1b" not in done.stdout
        assert json.loads(done.stdout)["tokens"] == 6

    def test_mistake(self, picture: Path) -> None:
        command = [sys.executable, "-m", "plphp", *map(str, ask(Path("/none"), picture, "--prompt", "a"))]
        environment = {**os.environ, "PYTHONPATH": str(SOURCES.parent)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "error: There is no model folder '/none'.\n"

    def test_commands_import_nothing_heavy(self) -> None:
        # the package itself is stood in for, to see what the command line adds to it
        code = (
            "import sys, types; package = types.ModuleType('plphp'); "
            f"package.__path__ = [{str(SOURCES)!r}]; sys.modules['plphp'] = package; import plphp.cli; "
            "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.stdout == "[]\n", done.stderr
