# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml says of the package."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DISTRIBUTIONS = {
    "PIL": "pillow",
    "tomli_w": "tomli-w",
    "huggingface_hub": "transformers",
    "safetensors": "transformers",
    "tqdm": "transformers",
}
"""Where the name of a module is not that of the package that brings it."""
OPTIONAL = {
    *("matplotlib", "sklearn", "datasets", "triton", "vllm", "lmms_eval", "av", "pandas", "pyarrow", "numpy"),
    *("anyio", "gradio", "prometheus_client", "starlette", "uvicorn"),
}
"""Of extras, or brought by transformers and scipy."""


def test_licences_are_shipped_and_name_the_digits() -> None:
    files = PROJECT["project"]["license-files"]
    assert {"LICENSE", "NOTICE"} <= set(files)
    assert set(files) <= set(PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"])
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for part in (
        "Optical Recognition of Handwritten Digits",
        "E. Alpaydin and C. Kaynak",
        "https://doi.org/10.24432/C50P49",
        "https://creativecommons.org/licenses/by/4.0/",
        "scikit-learn",
        "changed",
    ):
        assert part in notice


def test_addresses_are_complete() -> None:
    assert PROJECT["project"]["urls"]
    assert all(re.fullmatch(r"https://[\w.-]+/\S+", address) for address in PROJECT["project"]["urls"].values())


def test_every_package_that_is_imported_is_a_dependency() -> None:
    names = {re.match(r"[\w-]+", one)[0] for one in PROJECT["project"]["dependencies"]}  # type: ignore[index]
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                top = str(module).partition(".")[0]
                if top in sys.stdlib_module_names or top in OPTIONAL or top == "plphp":
                    continue
                assert DISTRIBUTIONS.get(top, top) in names, f"{path} imports {top}"
