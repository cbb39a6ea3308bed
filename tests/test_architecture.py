# SPDX-License-Identifier: Apache-2.0
"""The order of the packages: what may import what, no circle, and nothing where it does not belong.

``python tests/test_architecture.py [src/plphp of another checkout]`` prints the packages and modules that stand in
plphp itself, by floors, with what each imports, and the circles of modules.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "src" / "plphp"

BELOW: dict[str, tuple[str, ...]] = {
    "_version": (),
    "errors": (),
    "io": ("errors",),
    "plugins": ("errors", "io"),
    "settings": ("errors", "io"),
    "kernels": ("errors", "io"),
    "families": ("errors", "plugins", "settings"),
    "policy": ("errors", "io", "kernels", "settings"),
    "methods": ("errors", "plugins", "policy", "settings"),
    "pruning": ("errors", "families", "io", "kernels", "policy", "settings"),
    "inputs": ("errors", "families", "io", "settings"),
    "engines.hf": ("errors", "families", "inputs", "io", "kernels", "methods", "policy", "pruning", "settings"),
    "engines.vllm": ("errors", "families", "inputs", "io", "kernels", "methods", "policy", "pruning", "settings"),
    "studies": (
        *("_version", "errors", "families", "io", "kernels", "methods", "policy", "pruning", "inputs", "settings"),
        "engines.hf",
    ),
    "show": ("errors", "policy", "pruning", "studies"),
    "serving": ("errors", "inputs", "io", "engines.hf", "pruning", "settings", "show"),
    "evaluation": (
        *("errors", "io", "kernels", "policy", "methods", "pruning", "inputs", "engines.hf", "settings", "studies"),
        "show",
    ),
    "ui": ("errors", "evaluation", "inputs", "io", "methods", "settings", "show", "studies"),
    "extend": ("errors", "families", "methods", "policy", "settings"),
    "integrations": ("errors", "engines.hf", "inputs", "methods", "pruning", "settings"),
    "cli": (
        *("_version", "errors", "io", "methods", "families", "pruning", "inputs", "engines.hf", "studies"),
        *("engines.vllm", "evaluation", "serving", "settings", "show", "ui"),
    ),
    "__main__": ("cli",),
    "__init__": (
        *("_version", "errors", "families", "policy", "methods", "pruning", "engines.hf", "settings", "studies"),
    ),
}
"""By package, or module of plphp itself, the packages that it may import. Each stands above those that it imports."""
DATA = {"reference_model", "py.typed", "__pycache__"}
"""What stands in plphp and is no Python."""


def package_of(module: str) -> str:
    """The package of a module, such as ``"engines.hf"`` for ``"plphp.engines.hf.cache"``."""
    parts = module.split(".")[1:]
    if not parts:
        return "__init__"
    return ".".join(parts[:2]) if parts[0] == "engines" and len(parts) > 1 else parts[0]


def imports(root: Path = ROOT) -> Iterator[tuple[str, str]]:
    """All imports of plphp's modules, from module to module, those inside functions and for types alone among them."""
    for path in sorted(root.rglob("*.py")):
        parts = ["plphp", *path.relative_to(root).with_suffix("").parts]
        module = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts).removesuffix(".__init__")
        base = ".".join(parts[:-1])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                start = base.split(".")[: len(base.split(".")) - node.level + 1] if node.level else []
                target = ".".join([*start, *([node.module] if node.module else [])])
                names = [f"{target}.{alias.name}" for alias in node.names]
            else:
                continue
            yield from ((module, resolved) for name in names if (resolved := _module(name, root)))


def _module(name: str, root: Path) -> str:
    """The module that an imported name is, or is in; nothing for other packages."""
    parts = name.split(".")
    if parts[0] != "plphp":
        return ""
    for end in range(len(parts), 0, -1):
        path = root.joinpath(*parts[1:end])
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            return ".".join(parts[:end])
    return "plphp"


def arrows(root: Path = ROOT) -> set[tuple[str, str]]:
    """Between packages."""
    pairs = {(package_of(module), package_of(target)) for module, target in imports(root)}
    return {(upper, lower) for upper, lower in pairs if upper != lower}


def graph(pairs: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    """By name, what it imports."""
    below: dict[str, set[str]] = {}
    for upper, lower in pairs:
        below.setdefault(lower, set())
        below.setdefault(upper, set()).update({lower} - {upper})
    return below


def circles(below: dict[str, set[str]]) -> list[set[str]]:
    """Names that import each other, directly or by others."""
    reached = {name: set(lower) for name, lower in below.items()}
    for between in below:
        for name in below:
            if between in reached[name]:
                reached[name] |= reached[between]
    return [set(circle) for circle in {frozenset(o for o in reached[n] if n in reached[o]) for n in below} if circle]


def floors(below: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each name: one above the highest of what it imports; the names of a circle share one."""
    together = {name: circle for circle in circles(below) for name in circle}
    found: dict[str, int] = {}
    while len(found) < len(below):
        for name in below.keys() - found.keys():
            own = together.get(name, {name})
            lower = set().union(*(below[member] for member in own)) - own
            if lower <= found.keys():
                found |= dict.fromkeys(own, 1 + max((found[one] for one in lower), default=0))
    return found


def test_every_import_goes_down() -> None:
    allowed = {(upper, lower) for upper, packages in BELOW.items() for lower in packages}
    assert sorted(arrows() - allowed) == []


def test_every_allowed_arrow_is_there() -> None:
    """So that the table says what is, and an arrow that is gone does not come back unseen."""
    allowed = {(upper, lower) for upper, packages in BELOW.items() for lower in packages}
    assert sorted(allowed - arrows()) == []


def test_no_package_imports_itself_by_others() -> None:
    assert circles(graph(arrows())) == []


def test_no_module_imports_itself_by_others() -> None:
    assert circles(graph(imports())) == []


def test_nothing_else_stands_in_plphp_itself() -> None:
    names = {path.name.removesuffix(".py") for path in ROOT.iterdir()} - DATA
    assert names == {name.partition(".")[0] for name in BELOW}


def test_files_are_small() -> None:
    lines = sorted(len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.rglob("*.py"))
    assert lines[len(lines) // 2] <= 100
    assert lines[-1] <= 350


def test_functions_fit_a_screen() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in sorted(ROOT.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60  # type: ignore[operator]
    ]
    assert long == []


def main() -> None:
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    pairs, modules = arrows(root), graph(imports(root))
    packages = graph(pairs)
    by_floor = floors(packages)
    for name in sorted(packages, key=lambda name: (by_floor[name], name)):
        print(f"floor {by_floor[name]:2}  {name:16} {' '.join(sorted(packages[name]))}")
    print(f"{len(packages)} rooms, {max(by_floor.values())} floors, {len(pairs)} arrows")
    for circle in circles(modules):
        print(f"a circle of {len(circle)} modules: {' '.join(sorted(circle))}")
    print(f"{len(modules)} modules, {len(circles(modules))} circles")


if __name__ == "__main__":
    main()
