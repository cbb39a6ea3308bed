# SPDX-License-Identifier: Apache-2.0
"""Take docs/images/report.png, the picture of docs/report.md: ``python docs/make_report_picture.py``.

`plphp report` is asked three of examples/images/questions.json and looked at in headless Chromium, which has to be
there.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
from io import BytesIO
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "show"))

from browser import Browser  # noqa: E402  (how the tests look at the page)

IMAGES = ROOT / "examples" / "images"
PICTURE = ROOT / "docs" / "images" / "report.png"
QUESTIONS = (
    "Please list everything in row 4, from left to right.",
    "Read all the text.",
    "In image 3: Tell me what you see in row 1, column 1.",
)
SIZE = {"width": 1180, "height": 900}
COLOURS = 256


def ask(folder: Path) -> Path:
    """Write the page."""
    known = {one["question"]: one for one in json.loads((IMAGES / "questions.json").read_text(encoding="utf-8"))}
    asked = [{**known[text], "images": [str(IMAGES / name) for name in known[text]["images"]]} for text in QUESTIONS]
    (folder / "questions.json").write_text(json.dumps(asked), encoding="utf-8")
    page = folder / "page.html"
    command = [sys.executable, "-m", "plphp", "report", "--prompts", folder / "questions.json", "--html", page]
    subprocess.run(command, check=True)
    return page


def main() -> None:
    """Ask, look and save."""
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(Path(profile))
        browser.open(ask(Path(name)), **SIZE)
        browser.click("[aria-label^='plphp@0.5']")
        browser.click("[data-layer='3'][data-head='1']")
        browser.run("document.activeElement.blur(), scrollTo(0, 0)")
        clip = {"x": 0, "y": 0, "scale": 1, "width": SIZE["width"]}
        clip["height"] = browser.run("document.documentElement.scrollHeight")
        shot = browser.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        browser.close()
    picture = Image.open(BytesIO(base64.b64decode(shot))).convert("RGB")
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
