# SPDX-License-Identifier: Apache-2.0
"""What docs/make_site.py does to links, and what it refuses of a built site; ``make docs`` builds it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PAGE = """<html><head><link rel="stylesheet" href="style.css"></head>
<body><h1 id="top">Page</h1>{}</body></html>"""


@pytest.fixture
def make_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with a site of its own."""
    spec = importlib.util.spec_from_file_location("make_site", ROOT / "docs" / "make_site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SITE", tmp_path / "site")
    monkeypatch.setattr(module, "PAGES", tmp_path / "copy")
    return module


def faults(make_site: ModuleType, body: str, style: str = "") -> list[str]:
    """What is wrong with a site of two pages, the first with this body."""
    pages = {"index.html": body, "other/index.html": ""}
    for name, content in pages.items():
        path = make_site.SITE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PAGE.format(content))
        (path.parent / "style.css").write_text(style)
    built = {make_site.SITE / name: make_site.References(make_site.SITE / name) for name in pages}
    return make_site.broken_links(built) + make_site.foreign_styles()


@pytest.mark.parametrize(
    ("link", "moved"),
    [
        ("concepts.md#chains", "concepts.md#chains"),
        ("../benchmarks/results/tiers.json", "repository/benchmarks/results/tiers.json"),
        ("../README.md#install", "repository/README.md#install"),
        ("../benchmarks/results", "repository/benchmarks/results/index.md"),
        ("#here", "#here"),
        ("https://arxiv.org/abs/2502.14504", "https://arxiv.org/abs/2502.14504"),
        ("no-such-page.md", "no-such-page.md"),
    ],
)
def test_links_of_the_copy(make_site: ModuleType, link: str, moved: str) -> None:
    page = ROOT / "docs" / "quality.md"
    assert make_site.with_links_of_the_copy(f"See [it]({link}).", page) == f"See [it]({moved})."
    for code in (f"`[it]({link})`", f"```\n[it]({link})\n```"):
        assert make_site.with_links_of_the_copy(code, page) == code


def test_the_copy_has_whatever_its_pages_link_to(make_site: ModuleType) -> None:
    make_site.make_copy()
    copy = make_site.PAGES
    for name in ("index.md", "how-to/chat.md", "images/kept.png", "site.css"):
        assert (copy / name).is_file()
    readme = (copy / "repository" / "README.md").read_text()
    assert "](../concepts.md)" in readme
    assert (copy / "repository" / "CONTRIBUTING.md").is_file()
    assert "- [tiers.json](tiers.json)" in (copy / "repository" / "benchmarks" / "results" / "index.md").read_text()
    assert (copy / "repository" / "benchmarks" / "results" / "tiers.json").is_file()
    assert not list(copy.rglob("*.py"))


def test_links_that_lead_somewhere_are_no_faults(make_site: ModuleType) -> None:
    body = '<a href="other/#top">a</a> <a href="#top">b</a> <a href="https://arxiv.org">c</a> <img src="data:,">'
    assert faults(make_site, body, "a { background: url(data:,) }") == []


@pytest.mark.parametrize(
    ("body", "style", "fault"),
    [
        ('<img src="no.png">', "", "no.png, which is not there"),
        ('<a href="other/#no">a</a>', "", "other/#no, which has no such anchor"),
        ('<script src="https://example.org/a.js"></script>', "", "must not ask other hosts"),
        ('<img src="//example.org/a.png">', "", "must not ask other hosts"),
        ("", "@import 'https://example.org/a.css';", "style.css loads from other hosts"),
        ("", "a { src: url(//example.org/a.woff) }", "style.css loads from other hosts"),
    ],
)
def test_what_a_site_must_not_have(make_site: ModuleType, body: str, style: str, fault: str) -> None:
    assert any(fault in line for line in faults(make_site, body, style))


def test_the_reference_shows_what_is_public_and_nothing_else(make_site: ModuleType) -> None:
    pages = {}
    for module, source in make_site.REFERENCE.items():
        page = make_site.SITE / "reference" / module.rpartition(".")[2] / "index.html"
        page.parent.mkdir(parents=True)
        anchors = [f'<h2 id="{module}.{name}"></h2>' for name in make_site.public_names(source)]
        page.write_text("\n".join(anchors))
        pages[page] = make_site.References(page)
    assert make_site.wrong_reference(pages) == []
    shown = next(iter(pages.values())).anchors
    shown.remove("plphp.prune")
    shown.add("plphp.internal")
    internal, lacking = make_site.wrong_reference(pages)
    assert "shows plphp.internal" in internal
    assert "lacks plphp.prune" in lacking
