# SPDX-License-Identifier: Apache-2.0
"""Write docs/families.md from the registry: ``python docs/make_families.py``."""

from pathlib import Path

import plphp
from plphp.families.unsupported import UNSUPPORTED

HEAD = """# Model families

Each family is tested on small models with random weights, built from the real configs and classes of transformers
5.17, 5.23 and 5.24. No published checkpoint has been run yet. Once a prompt has been read only full-attention layers
are pruned, and all others keep transformers' own cache; what leaves [before](concepts.md#three-stages) leaves for all.
Methods that read the vision tower (`vtc_cls`, `fopru`, `visionzip`) work on all families but {without}.

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
    known = plphp.available_families()
    families = "".join(
        f"| {family.name} | {', '.join(f'`{name}`' for name in family.model_types)} | {family.notes} |\n"
        for family in known.values()
    )
    without = [name for name, family in known.items() if family.tower is None or family.tower.patches is None]
    head = HEAD.replace("{without}", ", ".join(without))
    return head + families + TAIL + "".join(f"| `{name}` | {reason} |\n" for name, reason in UNSUPPORTED.items())


if __name__ == "__main__":
    (Path(__file__).parent / "families.md").write_text(page())
