# SPDX-License-Identifier: Apache-2.0
"""Build the site of these documents into site/, strict about links: ``make docs``, or ``python docs/make_site.py``.

The pages are written for the repository, where links lead out of docs/ as well. So the build works on a copy in
build/site-pages: what a page links to outside docs/ is copied to repository/ there, and the link with it.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = ROOT / "build" / "site-pages"
SITE = ROOT / "site"
OWN = ("site.css",)
"""Files of docs/ that the site needs and no page links to."""
REFERENCE = {
    "plphp": "plphp/__init__.py",
    "plphp.extend": "plphp/extend.py",
    "plphp.kernels": "plphp/kernels/__init__.py",
    "plphp.evaluation": "plphp/evaluation/__init__.py",
}
"""Modules of the reference, and where their ``__all__`` stands below src/."""
CODE_OR_LINK = re.compile(r"^```.*?^```|`[^`\n]*`|\]\((?P<target>[^)\s]+)", re.DOTALL | re.MULTILINE)


def staged(path: Path) -> Path:
    """Where a file or folder of the repository lies in the copy; a folder becomes a page that lists its files."""
    place = path.relative_to(DOCS) if path.is_relative_to(DOCS) else Path("repository") / path.relative_to(ROOT)
    return PAGES / place / "index.md" if path.is_dir() else PAGES / place


def linked(page: Path, target: str) -> Path | None:
    """The file or folder of the repository that a link of a page leads to; None where it leads elsewhere."""
    if re.match(r"[a-z]+:", target) or target.startswith("#"):
        return None
    path = (page.parent / target.partition("#")[0]).resolve()
    return path if path.exists() and path.is_relative_to(ROOT) else None


def with_links_of_the_copy(text: str, page: Path) -> str:
    """A page's text with its links as they have to be in the copy.

    A link to what does not exist is left as it is: the build refuses it, and names the line.
    """

    def moved(match: re.Match[str]) -> str:
        target = match["target"]
        path = linked(page, target) if target else None
        if path is None:
            return match[0]
        _, mark, anchor = target.partition("#")
        return f"]({os.path.relpath(staged(path), staged(page).parent)}{mark}{anchor}"

    return CODE_OR_LINK.sub(moved, text)


def text_of(path: Path) -> str:
    """The Markdown of a page, or of the list of a folder's files."""
    if path.is_file():
        return path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT)
    lines = [f"- [{file.name}]({file.name})" for file in sorted(path.iterdir()) if file.is_file()]
    return "\n".join([f"# {name}", "", *lines, ""])


def make_copy() -> None:
    """Copy all pages of docs/, and whatever they link to, on and on."""
    shutil.rmtree(PAGES, ignore_errors=True)
    waiting = [*sorted(DOCS.rglob("*.md")), *(DOCS / name for name in OWN)]
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        place = staged(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.suffix != ".md":
            shutil.copyfile(path, place)
            continue
        # Links of a folder's list are beside each other: they are those of a page inside of it.
        page = path / "index.md" if path.is_dir() else path
        text = text_of(path)
        place.write_text(with_links_of_the_copy(text, page), encoding="utf-8")
        targets = (linked(page, match["target"]) for match in CODE_OR_LINK.finditer(text) if match["target"])
        waiting += [target for target in targets if target is not None]


class References(HTMLParser):
    """What a built page refers to, what it loads, and which anchors it has."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Sort the addresses of an element."""
        values = {name: value for name, value in attrs if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        elif tag == "link" and values.get("rel") != "canonical" and "href" in values:
            self.loads.add(values["href"])
        elif "src" in values:
            self.loads.add(values["src"])


def broken_links(pages: dict[Path, References]) -> list[str]:
    """Links and loaded files of the built pages that lead nowhere, and loads from other hosts."""
    faults = []
    for page, references in pages.items():
        name = page.relative_to(SITE)
        for target in sorted(references.links | references.loads):
            address = urlsplit(target)
            if address.scheme or address.netloc:
                if target in references.loads and address.scheme != "data":
                    faults.append(f"{name} loads {target}: a page must not ask other hosts for anything")
                continue
            file = (page.parent / unquote(address.path)).resolve() if address.path else page
            file = file / "index.html" if file.is_dir() else file
            if not file.is_file():
                faults.append(f"{name} links to {target}, which is not there")
            elif address.fragment and file in pages and unquote(address.fragment) not in pages[file].anchors:
                faults.append(f"{name} links to {target}, which has no such anchor")
    return faults


def foreign_styles() -> list[str]:
    """Style sheets that would be filled from other hosts."""
    sheets = SITE.rglob("*.css")
    outside = re.compile(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//")
    return [
        f"{sheet.relative_to(SITE)} loads from other hosts" for sheet in sheets if outside.search(sheet.read_text())
    ]


def public_names(source: str) -> set[str]:
    """The names in the ``__all__`` of a module of src/."""
    tree = ast.parse((ROOT / "src" / source).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise SystemExit(f"src/{source} has no __all__: the reference shows what stands in it.")


def wrong_reference(pages: dict[Path, References]) -> list[str]:
    """Names of the reference that are not public, and public ones that it lacks."""
    faults = []
    for module, source in REFERENCE.items():
        page = SITE / "reference" / module.rpartition(".")[2] / "index.html"
        own = re.compile(rf"{re.escape(module)}\.(\w+)")
        shown = {match[1] for anchor in pages[page].anchors if (match := own.fullmatch(anchor))}
        public = public_names(source)
        faults += [f"the reference shows {module}.{name}, which __all__ has not" for name in sorted(shown - public)]
        faults += [
            f"the reference lacks {module}.{name} of __all__: has it a docstring?" for name in sorted(public - shown)
        ]
    return faults


def main() -> None:
    """Copy, build, and look at what was built."""
    make_copy()
    shutil.rmtree(SITE, ignore_errors=True)
    if subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=ROOT).returncode:
        raise SystemExit("The site cannot be built.")
    # The page of missing addresses does not know where it will stand, so that its links begin at the host.
    pages = {page: References(page) for page in sorted(SITE.rglob("*.html")) if page.name != "404.html"}
    faults = broken_links(pages) + foreign_styles() + wrong_reference(pages)
    if faults:
        raise SystemExit("\n".join(faults))
    print(f"{len(pages)} pages in {SITE.relative_to(ROOT)}/")


if __name__ == "__main__":
    main()
