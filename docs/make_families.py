# SPDX-License-Identifier: Apache-2.0
"""Write docs/families.md from the registry: ``python docs/make_families.py``."""

from pathlib import Path

import plphp
from plphp.families.unsupported import UNSUPPORTED

HEAD = """# Model families

Each family is tested on small models with random weights, built from the real configs and classes of transformers
5.17, 5.23 and 5.24. No published checkpoint has been run yet. Only full-attention layers are pruned; all other layers
keep transformers' own cache.

| family | `config.model_type` | notes |
|---|---|---|
"""
TAIL = """
A *segment* is what `image_quota="per_image"` gives a share to: an image, unless the notes say otherwise.

## Refused

| `config.model_type` | why |
|---|---|
"""


def page() -> str:
    """The page's text."""
    families = "".join(
        f"| {family.name} | {', '.join(f'`{name}`' for name in family.model_types)} | {family.notes} |\n"
        for family in plphp.available_families().values()
    )
    return HEAD + families + TAIL + "".join(f"| `{name}` | {reason} |\n" for name, reason in UNSUPPORTED.items())


if __name__ == "__main__":
    (Path(__file__).parent / "families.md").write_text(page())
