# SPDX-License-Identifier: Apache-2.0
"""The order of the packages: what may import what, no circle, and nothing where it does not belong.

``python tests/test_architecture.py`` prints the packages with their floors, and the arrows between them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "src" / "plphp"

BELOW: dict[str, tuple[str, ...]] = {
    "_version": (),
    "errors": (),
    "io": ("errors",),
    "plugins": ("errors", "io"),
    "settings": ("errors",),
    "kernels": ("errors", "io"),
    "families": ("errors", "plugins", "settings"),
    "policy": ("errors", "io", "kernels", "settings"),
    "methods": ("errors", "plugins", "policy", "settings"),
    "pruning": ("errors", "families", "io", "kernels", "policy", "settings"),
    "inputs": ("errors", "families", "io"),
    "engines.hf": ("errors", "families", "io", "kernels", "methods", "policy", "pruning", "settings"),
    "engines.vllm": ("errors", "families", "inputs", "io", "kernels", "methods", "policy", "pruning", "settings"),
    "studies": (
        *("_version", "errors", "families", "io", "kernels", "methods", "policy", "pruning", "inputs", "settings"),
        "engines.hf",
    ),
    "show": ("errors", "io", "policy", "pruning", "settings", "studies"),
    "evaluation": (
        *("errors", "io", "kernels", "policy", "methods", "pruning", "inputs", "engines.hf", "settings", "studies"),
        "show",
    ),
    "extend": ("families", "methods", "policy", "settings"),
    "cli": (
        *("_version", "errors", "io", "policy", "methods", "families", "pruning", "inputs", "engines.hf", "studies"),
        *("engines.vllm", "evaluation", "settings", "show"),
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


def imports() -> Iterator[tuple[str, str]]:
    """All imports of plphp's modules, from module to module, those inside functions and for types alone among them."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = ["plphp", *path.relative_to(ROOT).with_suffix("").parts]
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
            yield from ((module, resolved) for name in names if (resolved := _module(name)))


def _module(name: str) -> str:
    """The module that an imported name is, or is in; nothing for other packages."""
    parts = name.split(".")
    if parts[0] != "plphp":
        return ""
    for end in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[1:end])
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            return ".".join(parts[:end])
    return "plphp"


def arrows() -> set[tuple[str, str]]:
    """Between packages."""
    pairs = {(package_of(module), package_of(target)) for module, target in imports()}
    return {(upper, lower) for upper, lower in pairs if upper != lower}


def floors(below: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each package: one above the highest of what it imports.

    Raises
    ------
    ValueError
        If there is a circle.
    """
    found: dict[str, int] = {}
    while len(found) < len(below):
        ready = {name: lower for name, lower in below.items() if name not in found and lower <= found.keys()}
        if not ready:
            raise ValueError(f"a circle among {sorted(below.keys() - found.keys())}")
        found |= {name: 1 + max((found[one] for one in lower), default=0) for name, lower in ready.items()}
    return found


def test_every_import_goes_down() -> None:
    allowed = {(upper, lower) for upper, packages in BELOW.items() for lower in packages}
    assert sorted(arrows() - allowed) == []


def test_every_allowed_arrow_is_there() -> None:
    """So that the table says what is, and an arrow that is gone does not come back unseen."""
    allowed = {(upper, lower) for upper, packages in BELOW.items() for lower in packages}
    assert sorted(allowed - arrows()) == []


def test_no_package_imports_itself_by_others() -> None:
    assert floors({name: set(packages) for name, packages in BELOW.items()})


def test_no_module_imports_itself_by_others() -> None:
    below: dict[str, set[str]] = {}
    for module, target in imports():
        below.setdefault(target, set())
        below.setdefault(module, set()).update({target} - {module})
    # A package's own file stands above what it imports, and its modules do not import it for a name of theirs.
    assert floors(below)


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


if __name__ == "__main__":
    of_packages = {name: {lower for upper, lower in arrows() if upper == name} for name in BELOW}
    for name, floor in sorted(floors(of_packages).items(), key=lambda item: item[::-1]):
        print(f"floor {floor:2}  {name:14} {' '.join(sorted(of_packages[name]))}")
    print(f"{len(BELOW)} packages, {max(floors(of_packages).values())} floors, {len(arrows())} arrows")
