# SPDX-License-Identifier: Apache-2.0
"""What the figures show, read back from the drawn arrays, and the tables beside them."""

from __future__ import annotations

import dataclasses
import io
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from plphp import BackendUnavailableError, ConfigError, PLPHPConfig, PruneReport
from plphp.pruning.prompt_report import ImageReport, LayerReport, PromptReport, RowReport
from plphp.pruning.tier_report import LayerBytes, TierReport
from plphp.show.plots import plot_kept, plot_vision_attention
from plphp.show.tables import comparison_table, layer_table, report_values, summary
from plphp.studies.compare import Comparison, Run

KEPT = [[[1, 2, 5], [1, 5]], [[2], [2, 9, 10, 11]]]
"""[layer][head]: image 1 stands at positions 1 to 6 as 2 x 3 tokens, image 2 at 9 to 11 without a grid."""


def make_report(**changes: Any) -> PruneReport:
    images = [ImageReport(list(range(1, 7)), (1, 2, 3)), ImageReport([9, 10, 11], None)]
    layers = [
        LayerReport(layer, [RowReport(score, name, 0.4, 9, kept)])
        for layer, score, name, kept in zip((0, 2), (0.3, 0.05), ("attentive", "indifferent"), KEPT, strict=True)
    ]
    values = {
        "model_type": "llava",
        "model_class": "Llava",
        "config": PLPHPConfig().to_dict(),
        "batch": 1,
        "tokens": 12,
        "kv_bytes_full": 2048,
        "kv_bytes": 1100,
        "reserved_bytes": 76,
        "pruning_seconds": 0.001,
        "prompts": [PromptReport(0, 12, [images], layers)],
    }
    return PruneReport(**{**values, **changes})


def heat_maps(figure: Any) -> list[Any]:
    return [axes.images[-1].get_array().tolist() for axes in figure.axes if axes.images]


def titles(figure: Any) -> list[str]:
    return [part.get_suptitle() for part in figure.subfigs]


def drawn_texts(figure: Any) -> list[str]:
    return [*titles(figure), *(axes.get_title() for axes in figure.axes)]


class TestKept:
    def test_tile_per_layer(self) -> None:
        figure = plot_kept(make_report())
        assert heat_maps(figure) == [
            [[1.0, 0.5, 0.0], [0.0, 1.0, 0.0]],
            [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]],
            [[0.0, 0.0, 0.0]],
            [[0.5, 0.5, 0.5]],
        ]
        assert titles(figure)[0] == "image 1 of 2: 2 x 3 tokens"
        assert "without a grid, by token index" in titles(figure)[1]

    def test_tile_per_head(self) -> None:
        assert heat_maps(plot_kept(make_report(), layer=2))[:2] == [
            [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]],
            [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]],
        ]

    def test_over_the_image(self) -> None:
        axes = plot_kept(make_report(), [Image.new("RGB", (600, 400), "red"), Image.new("L", (9, 9))]).axes[0]
        picture, heat = axes.images
        assert np.asarray(picture.get_array()).shape == (171, 256, 3)
        assert picture.get_extent() == heat.get_extent() == [0, 3, 2, 0]
        assert np.asarray(picture.get_array())[0, 0].tolist() == [255, 0, 0]
        dropped, whole = heat.cmap([0.0, 1.0])
        assert dropped[:3].max() < 0.3
        assert (dropped[3], whole[3]) == (pytest.approx(0.9), 0.0)

    def test_frames_of_a_video_are_averaged(self) -> None:
        report = make_report()
        video = ImageReport(list(range(1, 7)), (2, 1, 3))
        report = make_report(prompts=[PromptReport(0, 12, [[video]], report.prompts[0].layers)])
        figure = plot_kept(report)
        assert heat_maps(figure)[0] == [[0.5, 0.75, 0.0]]
        assert titles(figure) == ["image: 1 x 3 tokens, mean over 2 frames"]

    @pytest.mark.parametrize(
        "arguments", [{"layer": 1}, {"row": 1}, {"prompt": 1}, {"row": -1}, {"images": [Image.new("L", (1, 1))]}]
    )
    def test_refusals(self, arguments: dict[str, Any]) -> None:
        with pytest.raises(ConfigError):
            plot_kept(make_report(), **arguments)

    def test_nothing_pruned(self) -> None:
        with pytest.raises(ConfigError, match="no pruned prompt"):
            plot_kept(make_report(prompts=[]))

    def test_without_matplotlib(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
            monkeypatch.setitem(sys.modules, name, None)
        for draw in (plot_kept, plot_vision_attention):
            with pytest.raises(BackendUnavailableError, match=r"plphp\[plots\]"):
                draw(make_report())


class TestRungs:
    """With tiers the colours are rungs in the order of their bytes, and the bar names them."""

    @staticmethod
    def report() -> PruneReport:
        low, high = TierReport("pq", [[1], [1, 9]], [4, 8]), TierReport("c3", [[2], []], [14, 0])
        row = RowReport(0.3, "uniform", 0.4, 9, KEPT[0], entry_bytes=64, tiers=[high, low], means_bytes=10)
        dropped = RowReport(
            0.1, "uniform", 0.4, 9, [[3], []], entry_bytes=64, tiers=[TierReport("pq", [[3], []], [4, 0])]
        )
        layers = [
            LayerReport(0, [dataclasses.replace(row, kept_positions=[[1, 2, 5], [1, 9]])]),
            LayerReport(1, [dropped]),
        ]
        return make_report(prompts=[PromptReport(0, 12, make_report().prompts[0].images, layers)])

    def test_heads(self) -> None:
        figure = plot_kept(self.report(), layer=0)
        first, second = heat_maps(figure)[:2]
        assert first == [[pytest.approx(1 / 3), pytest.approx(2 / 3), 0.0], [0.0, 1.0, 0.0]]
        assert second == [[pytest.approx(1 / 3), 0.0, 0.0], [0.0, 0.0, 0.0]]
        names = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
        assert [name for name in names if name.isalnum() and not name.isdigit()][:4] == [
            "dropped",
            "pq",
            "c3",
            "whole",
        ]

    def test_layers(self) -> None:
        figure = plot_kept(self.report())
        first, second = heat_maps(figure)[:2]
        assert first[0] == [pytest.approx(1 / 3), pytest.approx(1 / 3), 0.0]
        assert second[0] == [0.0, 0.0, pytest.approx(1 / 6)]
        held = (64 + 26 + 10) / (64 * 18)
        assert any(f"{held:.1%} of the bytes" in text for text in drawn_texts(figure))

    def test_table_and_summary(self) -> None:
        report = self.report()
        shown = TestTables().text(report)
        first, second = (line.split() for line in shown.splitlines() if "uniform" in line)
        cells = [cell for cell in first if cell != "│"]
        assert cells == ["0", "0.300", "uniform", "0.40", "8.7%", "1", "0", "1", "0", "1", "2"]
        assert [cell for cell in second if cell != "│"] == ["1", "0.100", "uniform", "0.40", "0.3%", *"2x010"]
        assert "kept per KV head" not in shown
        row = report_values(report)["prompts"][0]["layers"][0]["rows"][0]
        assert row["tiers"] == {
            "c3": {"entries": [1, 0], "nbytes": [14, 0]},
            "pq": {"entries": [1, 2], "nbytes": [4, 8]},
        }

    def test_bytes_of_several_devices(self) -> None:
        held = [LayerBytes(0, "cuda:0", whole=1024), LayerBytes(1, "cuda:1", tail=76)]
        assert "of reserved room, 1.0 KiB on cuda:0 and 76 B on cuda:1, " in summary(make_report(held=held))
        assert "cuda" not in summary(make_report(held=held[:1]))


class TestVisionAttention:
    def test_curve_with_thresholds(self) -> None:
        axes = plot_vision_attention(make_report()).axes[0]
        assert axes.lines[0].get_xydata().tolist() == [[0, 0.3], [2, 0.05]]
        assert {line.get_ydata()[0] for line in axes.lines[1:]} == {0.25, 0.1}
        assert {text.get_text() for text in axes.get_legend().get_texts()} >= {"attentive", "indifferent"}

    def test_thresholds_of_any_method_that_sorts_layers(self) -> None:
        config = PLPHPConfig(method="recall_rank", options={"layers": "vision_attention"})
        axes = plot_vision_attention(make_report(config=config.to_dict())).axes[0]
        assert {line.get_ydata()[0] for line in axes.lines[1:]} == {0.25, 0.1}

    def test_no_thresholds_where_none_are_used(self) -> None:
        target = make_report(config=PLPHPConfig(target_retention=0.4).to_dict())
        layers = [LayerReport(0, [RowReport(0.3, "uniform", 0.4, 9, KEPT[0])])]
        [prompt] = make_report().prompts
        uniform = make_report(prompts=[dataclasses.replace(prompt, layers=layers)])
        for report in (target, uniform):
            assert len(plot_vision_attention(report).axes[0].lines) == 1


class TestTables:
    def text(self, report: PruneReport) -> str:
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(layer_table(report))
        return console.export_text()

    def test_layers(self) -> None:
        text = self.text(make_report())
        assert "plphp: 9 vision tokens" in text
        first, second = (line.split() for line in text.splitlines() if "ttentive" in line or "indiff" in line)
        assert [cell for cell in first if cell != "│"] == ["0", "0.300", "attentive", "0.40", "3", "2"]
        assert [cell for cell in second if cell != "│"] == ["2", "0.050", "indifferent", "0.40", "1", "4"]

    @pytest.mark.parametrize("width", [40, 60])
    def test_nothing_is_cut_off_in_a_narrow_terminal(self, width: int) -> None:
        layers = [LayerReport(7, [RowReport(0.3, "indifferent", 0.4, 9, [[1] * n for n in range(8)])])]
        report = make_report(prompts=[PromptReport(0, 12, [[]], layers)])
        console = Console(width=width, file=io.StringIO())
        run = Run(["a " * 50], [[1]], 2048, 0.1, 0.02)
        console.print(layer_table(report), comparison_table(Comparison(run, run, report)))
        assert "\N{HORIZONTAL ELLIPSIS}" not in console.file.getvalue()

    def test_answers_are_not_markup(self) -> None:
        run = Run(["[bold]a[/bold] [/]"], [[1]], 2048, 0.1, 0.02)
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(comparison_table(Comparison(run, dataclasses.replace(run, kv_bytes=1024), make_report())))
        text = console.export_text()
        assert text.count("[bold]a[/bold] [/]") == 2
        assert "KV cache of 12 tokens" in text
        assert "1.0 KiB (-50%)" in text
        assert "20.00 ms (x 1.00)" in text

    def test_totals(self) -> None:
        report = make_report()
        shown = summary(report)
        assert "KV cache of 12 tokens 2.0 KiB -> 1.0 KiB (-50%) and 76 B of reserved room, 28% of the vision" in shown
        assert report_values(report)["retention"] == pytest.approx(10 / 36)
        assert report_values(report)["prompts"][0]["layers"][1]["rows"][0]["kept"] == [1, 4]


class TestVisionShare:
    """Where text leaves, too, the rate says how much memory is left, and not how much of the images."""

    @staticmethod
    def report(evicted: list[list[int]]) -> PruneReport:
        layers = [LayerReport(0, [RowReport(0.3, "uniform", 0.25, 9, KEPT[0], evicted)])]
        return make_report(prompts=[PromptReport(0, 12, make_report().prompts[0].images, layers)])

    def test_beside_the_rate(self) -> None:
        report = self.report([[0], [7, 8]])
        table = TestTables().text(report)
        assert "of vision" in table
        assert "0.28" in table  # 5 of 18 entries
        assert "3 text entries evicted" in summary(report)
        [row] = report_values(report)["prompts"][0]["layers"][0]["rows"]
        assert row["vision_kept"] == pytest.approx(5 / 18)
        assert row["text_evicted"] == [1, 2]
        assert "uniform 0.25, 0.28 of vision" in str(drawn_texts(plot_kept(report)))

    def test_not_where_all_text_stays(self) -> None:
        report = self.report([])
        assert "of vision" not in TestTables().text(report)
        assert "text entries" not in summary(report)
        assert "of vision" not in str(drawn_texts(plot_kept(report)))
