# SPDX-License-Identifier: Apache-2.0
"""Files of folders and of the hub's cache, and the reasons why they are not to be had; cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hub_cache import repository_in_cache
from plphp import ConfigError, LoadError
from plphp.io.card import MARK, Card, measured_rows, table
from plphp.io.hub import file_of, hub_reason, is_hub_id


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        *((name, True) for name in ("me/bank", "a-b.c/d_e.f", "org/banks-v1.0")),
        *((name, False) for name in ("bank", "/me/bank", "./bank", "~/bank", "a/b/c", "me/", "")),
        *((name, False) for name in ("me/bank.safetensors", "me/settings.toml", "me/b k", "../bank")),
    ],
)
def test_what_a_repository_is_called(name: str, is_id: bool) -> None:
    assert is_hub_id(name) is is_id


def test_what_is_here_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "bank").mkdir(parents=True)
    assert not is_hub_id("me/bank")
    assert is_hub_id("me/other")


def test_a_file_of_a_folder_and_of_the_cache(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.txt").write_text("a")
    assert file_of(tmp_path / "here", "a.txt", "things") == tmp_path / "here" / "a.txt"
    snapshot = repository_in_cache(tmp_path / "cache", "me/repo")
    (snapshot / "a.txt").write_text("b")
    options: dict[str, Any] = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    assert file_of("me/repo", "a.txt", "things", **options) == snapshot / "a.txt"
    with pytest.raises(LoadError, match=r"Cannot read things from b.txt of me/repo: .*the hub cannot be reached"):
        file_of("me/repo", "b.txt", "things", **options)


def test_what_is_neither_a_folder_nor_a_repository(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"holds no a\.txt"):
        file_of(tmp_path, "a.txt", "things")
    (tmp_path / "file").write_text("")
    with pytest.raises(LoadError, match="is a file: name the folder or the repository"):
        file_of(tmp_path / "file", "a.txt", "things")
    with pytest.raises(LoadError, match="There is no folder 'nope', and a repository of the hub is named like owner"):
        file_of("nope", "a.txt", "things")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("GatedRepoError", "on the repository's page"),
        ("RepositoryNotFoundError", "no such repository on the hub"),
        ("RevisionNotFoundError", "no such revision"),
        ("RemoteEntryNotFoundError", "no such file"),
        ("OfflineModeIsEnabled", "cannot be reached"),
    ],
)
def test_every_failure_has_its_reason(name: str, reason: str) -> None:
    from huggingface_hub import errors

    kind = getattr(errors, name)
    error = kind.__new__(kind)
    assert reason in str(hub_reason(error, "repository"))


def test_figures_as_rows(tmp_path: Path) -> None:
    assert measured_rows(None) == {}
    assert measured_rows({"score": 0.5}) == {"score": {"": 0.5}}
    rows = {"t10": {"score": 0.9, "held": 0.1}, "c3": {"score": 0.95}}
    (tmp_path / "figures.json").write_text(json.dumps(rows))
    assert measured_rows(tmp_path / "figures.json") == rows
    expected = "|  | score | held |\n| --- | --- | --- |\n| t10 | 0.9 | 0.1 |\n| c3 | 0.95 |  |"
    assert table(rows) == expected


def test_figures_of_an_evaluation(tmp_path: Path) -> None:
    figure = {"full": {"score": {"mean": 1.0}, "kept": 1.0}, "t10": {"score": {"mean": 0.9}, "kept": 0.1}}
    values = {
        "variants": [{"name": "full"}, {"name": "t10"}],
        "tasks": {},
        "groups": {"one_image": {"variants": figure}},
        "overall": {"variants": figure},
    }
    (tmp_path / "metrics.json").write_text(json.dumps(values))
    rows = measured_rows(tmp_path)
    assert rows["t10"] == {"one image": 0.9, "overall": 0.9, "share of vision KV held": 0.1}
    assert measured_rows(tmp_path / "metrics.json") == rows


@pytest.mark.parametrize("figures", [{}, {"a": {"b": {"c": 1}}}, {"a": {"b": [1]}}])
def test_figures_that_are_no_table(figures: Any) -> None:
    with pytest.raises(ConfigError, match="figures must hold"):
        measured_rows(figures)


def test_figures_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"Cannot read the figures .*metrics.json"):
        measured_rows(tmp_path)


def test_a_card_of_someone_else_is_left(tmp_path: Path) -> None:
    card = Card("Title", "About | it.", {"model": "a | b", "empty": ""}, "code({source})", "me/model", {})
    card.write(tmp_path, "me/repo")
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nbase_model: me/model\n")
    assert MARK in text
    assert "| model | a \\| b |" in text
    assert "empty" not in text
    assert 'code("me/repo")' in text
    assert "No figures were given for this card." in text
    card.measured({"score": {"": 0.25}}).write(tmp_path, "me/repo")
    assert "| score | 0.25 |" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    card.write(tmp_path, "me/repo")
    assert (tmp_path / "README.md").read_text() == "mine"
