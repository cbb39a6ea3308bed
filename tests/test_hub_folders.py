# SPDX-License-Identifier: Apache-2.0
"""Settings and query banks as folders in the hub's layout: written, read, uploaded to a hub that is made up."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError

import plphp
from hub_cache import repository_in_cache
from plphp import ConfigError, LoadError, PLPHPConfig, QueryBank
from plphp.io.card import MARK
from plphp.policy.bank import BUNDLED, bank_at

BY_BANK = PLPHPConfig.parse("query_bank:bank=bundled,tiers=t10,read=0.2")


@pytest.fixture(scope="module")
def bank() -> QueryBank:
    return QueryBank.load(BUNDLED)


class MadeUpHub:
    """What is called of ``HfApi``, with the arguments that the installed version takes."""

    def __init__(self, folder: Path, calls: list[tuple[str, dict[str, Any]]]) -> None:
        self.folder, self.calls = folder, calls

    def _called(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = inspect.signature(getattr(huggingface_hub.HfApi, name)).bind(self, *args, **kwargs).arguments
        self.calls.append((name, {key: value for key, value in bound.items() if key != "self"}))
        return self.calls[-1][1]

    def create_repo(self, *args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(repo_id=self._called("create_repo", args, kwargs)["repo_id"])

    def file_exists(self, *args: Any, **kwargs: Any) -> bool:
        return (self.folder / self._called("file_exists", args, kwargs)["filename"]).exists()

    def hf_hub_download(self, *args: Any, **kwargs: Any) -> str:
        return str(self.folder / self._called("hf_hub_download", args, kwargs)["filename"])

    def upload_folder(self, *args: Any, **kwargs: Any) -> Any:
        asked = self._called("upload_folder", args, kwargs)
        leave = asked["ignore_patterns"] or []
        for file in Path(asked["folder_path"]).iterdir():
            if file.name not in leave:
                shutil.copy(file, self.folder)
        return SimpleNamespace(commit_url="https://hub/commit/1", pr_url="https://hub/discussions/1")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeUpHub:
    """A hub with one repository, whose files lie in ``hub.folder``."""
    made = MadeUpHub(tmp_path / "repository", [])
    made.folder.mkdir()

    def api(**options: Any) -> MadeUpHub:
        inspect.signature(real).bind(**options)
        made.calls.append(("HfApi", options))
        return made

    real = huggingface_hub.HfApi
    stand_in: Any = api
    monkeypatch.setattr("huggingface_hub.HfApi", stand_in)
    for name in ("create_repo", "file_exists", "hf_hub_download", "upload_folder"):
        setattr(stand_in, name, getattr(real, name))
    return made


def code_of(card: Path) -> str:
    return re.findall(r"```python\n(.*?)```", card.read_text(), flags=re.DOTALL)[0]


@pytest.mark.parametrize(
    "line",
    ["plphp:target_retention=0.4", "fastv:retention_rate=0.5+query_bank:bank=bundled", "quantized:tiers=c3", "none"],
)
def test_settings_come_back(tmp_path: Path, line: str) -> None:
    config = PLPHPConfig.parse(line)
    folder = config.save_pretrained(tmp_path / "a" / "b", model="me/model", data="receipts", figures={"score": 0.75})
    assert folder == tmp_path / "a" / "b"
    assert PLPHPConfig.from_pretrained(folder) == config == PLPHPConfig.from_toml(folder / "plphp.toml")
    card = (folder / "README.md").read_text()
    for part in ("base_model: me/model", f"`{config.method}`", "| chosen on | receipts |", "| score | 0.75 |"):
        assert part in card


def test_settings_carry_the_banks_of_files(tmp_path: Path) -> None:
    shutil.copy(BUNDLED, tmp_path / "mine.safetensors")
    own = str(tmp_path / "mine.safetensors")
    config = PLPHPConfig.parse(f'fastv:evidence=bank,bank="{own}"+quantized:tiers=p12.5,books="{own}"')
    folder = config.save_pretrained(tmp_path / "folder")
    (tmp_path / "mine.safetensors").unlink()
    moved = folder.rename(tmp_path / "moved")
    read = PLPHPConfig.from_pretrained(moved)
    assert (read.books, read.earlier[0].options["bank"]) == (str(moved / "bank.safetensors"),) * 2
    assert sorted(file.name for file in moved.iterdir()) == ["README.md", "bank.safetensors", "plphp.toml"]
    assert bank_at(read.books).record == QueryBank.load(BUNDLED).record
    read.save_pretrained(moved)  # over itself
    assert PLPHPConfig.from_pretrained(moved) == read


def test_settings_carry_the_bank_of_a_folder(tmp_path: Path, bank: QueryBank) -> None:
    own = bank.save_pretrained(tmp_path / "bank")
    folder = PLPHPConfig.parse(f'query_bank:bank="{own}",tiers=t10').save_pretrained(tmp_path / "folder")
    shutil.rmtree(own)
    name = PLPHPConfig.from_pretrained(folder).options["bank"]
    assert bank_at(str(name)).record == bank.record
    (tmp_path / "empty").mkdir()
    config = PLPHPConfig.parse(f'query_bank:bank="{tmp_path / "empty"}"')
    with pytest.raises(LoadError, match=r"Cannot read the query bank .*empty: No such file"):
        config.save_pretrained(tmp_path / "other")


def test_settings_of_this_machine_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="folder 'banks' of this machine: leave out folder"):
        PLPHPConfig.parse("query_bank:folder=banks").save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=r"Cannot read the query bank nope\.safetensors"):
        PLPHPConfig.parse("query_bank:bank=nope.safetensors").save_pretrained(tmp_path)
    (tmp_path / "plphp.toml").write_text('[plphp]\nmethod = "query_bank"\noptions = {bank = "./../a.safetensors"}\n')
    with pytest.raises(ConfigError, match="which is not a file beside them"):
        PLPHPConfig.from_pretrained(tmp_path)
    (tmp_path / "plphp.toml").write_text("nonsense")
    with pytest.raises(ConfigError, match="not a valid TOML file"):
        PLPHPConfig.from_pretrained(tmp_path)


def test_a_bank_comes_back(tmp_path: Path, bank: QueryBank) -> None:
    bank.save_pretrained(tmp_path, data="drawn scenes")
    read = QueryBank.from_pretrained(tmp_path)
    assert read.record == bank.record
    assert all(torch.equal(read.of(layer).queries, bank.of(layer).queries) for layer in bank.layers)
    assert bank_at(str(tmp_path)).record == bank.record  # by the folder, as an option says it
    card = (tmp_path / "README.md").read_text()
    for part in (bank.values_hash, "| collected from | drawn scenes |", "and codebooks", "# Query bank of the bundled"):
        assert part in card
    names: dict[str, Any] = {}
    exec(code_of(tmp_path / "README.md").partition("with ")[0], names)
    assert names["config"] == PLPHPConfig.parse(f"query_bank:bank={tmp_path.name},tiers=t10")


@pytest.mark.parametrize(("model", "shown"), [("/home/me/models/own", "own"), ("org/model", "org/model")])
def test_a_card_has_no_path_of_this_machine(tmp_path: Path, bank: QueryBank, model: str, shown: str) -> None:
    own = QueryBank(bank.layers, bank.ahead, {**bank.record, "model": model})
    own.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"| model | {shown} |" in card
    assert "/home/me" not in card
    assert ("base_model: org/model" in card) is (model == shown)


def test_from_the_cache_of_the_hub(tmp_path: Path, bank: QueryBank) -> None:
    """In a process of its own, whose hub's cache has one repository: settings, and a bank by its id."""
    snapshot = repository_in_cache(tmp_path, "me/repo")
    shutil.copy(BUNDLED, tmp_path / "own.safetensors")
    PLPHPConfig.parse(f"query_bank:bank={tmp_path}/own.safetensors,tiers=t10").save_pretrained(snapshot)
    code = (
        "from plphp import PLPHPConfig, QueryBank; from plphp.policy.bank import bank_at; "
        "config = PLPHPConfig.from_pretrained('me/repo'); print(config.options['bank']); "
        "print(QueryBank.from_pretrained('me/repo').values_hash, bank_at('me/repo').values_hash)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(snapshot / "bank.safetensors"), bank.values_hash, bank.values_hash]


def test_a_bank_that_is_nowhere() -> None:
    with pytest.raises(LoadError, match=r"Cannot read a query bank from bank.safetensors of nobody/nothing: .*hub"):
        bank_at("nobody/nothing")
    with pytest.raises(ConfigError, match=r"Cannot read the query bank nobody/nothing\.safetensors"):
        bank_at("nobody/nothing.safetensors")


@pytest.mark.parametrize("what", ["settings", "bank"])
def test_upload(hub: MadeUpHub, bank: QueryBank, what: str) -> None:
    own: Any = BY_BANK if what == "settings" else bank
    url = own.push_to_hub("me/repo", private=True, token="secret", revision="next", data="drawn scenes")
    assert url == "https://hub/commit/1"
    calls = dict(hub.calls)
    assert calls["HfApi"]["token"] == "secret"
    assert calls["create_repo"] == {"repo_id": "me/repo", "private": True, "exist_ok": True}
    assert (calls["upload_folder"]["repo_id"], calls["upload_folder"]["revision"]) == ("me/repo", "next")
    assert '"me/repo"' in (hub.folder / "README.md").read_text()
    assert "secret" not in (hub.folder / "README.md").read_text()
    read = type(own).from_pretrained(hub.folder)
    assert read == own if what == "settings" else read.record == own.record
    pull_request = own.push_to_hub("me/repo", create_pr=True, figures={"score": 0.5})
    assert pull_request == "https://hub/discussions/1"
    assert "| score | 0.5 |" in (hub.folder / "README.md").read_text()  # plphp's own card is written anew


def test_upload_beside_a_model_leaves_its_card(hub: MadeUpHub) -> None:
    (hub.folder / "README.md").write_text("# My model")
    BY_BANK.push_to_hub("me/model")
    assert (hub.folder / "README.md").read_text() == "# My model"
    assert (hub.folder / "plphp.toml").exists()
    assert MARK not in "# My model"


def test_an_upload_that_fails(hub: MadeUpHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(MadeUpHub, "create_repo", refuse)
    with pytest.raises(LoadError, match="Cannot upload settings to me/repo: there is no such"):
        BY_BANK.push_to_hub("me/repo")


def test_settings_need_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from plphp import PLPHPConfig; "
        f"PLPHPConfig(retention_rate=0.3).save_pretrained({str(tmp_path)!r}); "
        f"assert PLPHPConfig.from_pretrained({str(tmp_path)!r}).retention_rate == 0.3; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_both_are_documented() -> None:
    for name in ("save_pretrained", "push_to_hub", "from_pretrained"):
        for owner in (plphp.PLPHPConfig, plphp.QueryBank):
            assert "Raises" in (getattr(owner, name).__doc__ or "")
