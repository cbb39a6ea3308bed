# SPDX-License-Identifier: Apache-2.0
"""The page of ``plphp ui`` in headless Chromium: ask, choose, be refused, and nothing of another host."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser

import tiny_hub
from plphp import ConfigError, PLPHPConfig
from tiny_models import TIERS

gradio = pytest.importorskip("gradio", reason="gradio is not installed: make test-ui")

from plphp.ui.asking import Asking  # noqa: E402
from plphp.ui.page import make_page  # noqa: E402
from plphp.ui.server import launch  # noqa: E402

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
    pytest.mark.filterwarnings("default"),  # gradio's packages warn of each other
]
PATIENCE = 60.0
PAGE_TEXT = "document.body.innerText"
ANSWERED = "[...document.querySelectorAll('textarea[disabled]')].map((field) => field.value)"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of a tiny model, with an example to click."""
    folder = tmp_path_factory.mktemp("page")
    example = tiny_hub.picture(folder / "a.png")
    model = TIERS["llava"].build().eval()
    settings = PLPHPConfig.parse("plphp:target_retention=0.4")
    asking = Asking(model, tiny_hub.processor(), settings, bundled=False, max_new_tokens=4)
    page = make_page(asking, "A <b>tiny</b> model", examples=[(str(example), "What?")])
    yield launch(page, "127.0.0.1", 0, wait=False)
    page.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def wait(browser: Browser, condition: str) -> None:
    end = time.monotonic() + PATIENCE
    while not browser.run(condition):
        assert time.monotonic() < end, (condition, browser.run(PAGE_TEXT))
        time.sleep(0.2)


@pytest.fixture(params=[("light", 1280), ("dark", 360)], ids=str)
def page(browser: Browser, address: str, request: pytest.FixtureRequest) -> Iterator[Browser]:
    """The page in two colours and widths; nothing may be asked of another host, and no script may fail."""
    scheme, width = request.param
    browser.open(address, scheme=scheme, width=width)
    wait(browser, "!!document.querySelector('button.primary')")
    yield browser
    complaints = [text for text in browser.complaints() if not text.startswith(address)]
    assert complaints == []


def write(browser: Browser, label: str, text: str) -> None:
    """Type into a field."""
    browser.run(
        f"[...document.querySelectorAll('label')].find((label) => label.innerText.startsWith({label!r}))"
        ".querySelector('textarea, input').focus()"
    )
    browser.call("Input.insertText", text=text)


def choose_the_example(browser: Browser) -> None:
    browser.run("(document.querySelector('tr.tr-body').click(), 1)")
    wait(browser, "!!document.querySelector('.image-frame img, [data-testid=image] img, .image-container img')")


def test_a_question_is_answered(page: Browser) -> None:
    choose_the_example(page)
    page.click("button.primary")
    wait(page, f"{PAGE_TEXT}.includes('KV bytes gone')")
    assert all(page.run(ANSWERED))
    wait(page, "[...document.images].some((image) => image.naturalWidth > 400)")  # what stayed
    text = page.run(PAGE_TEXT)
    for part in ("KV cache of", "first token", "decode per token"):
        assert part in text
    assert page.run("document.documentElement.scrollWidth <= innerWidth")


def test_without_a_picture_the_reason_is_shown(page: Browser) -> None:
    page.click("button.primary")
    wait(page, f"{PAGE_TEXT}.includes('There is no picture: choose one first')")
    assert "Traceback" not in page.run(PAGE_TEXT)


def test_a_line_of_settings_that_cannot_be(page: Browser) -> None:
    choose_the_example(page)
    page.run("([...document.querySelectorAll('button')].find((b) => b.innerText.startsWith('Settings')).click(), 1)")
    wait(page, "[...document.querySelectorAll('label')].some((label) => label.innerText.startsWith('Settings'))")
    write(page, "Settings", "plhp<img src=x onerror=alert(1)>")
    page.click("button.primary")
    wait(page, f"{PAGE_TEXT}.includes('Unknown method')")
    assert page.run("document.querySelectorAll('img[src=x]').length") == 0


def test_the_page_names_no_host_to_load_from(address: str) -> None:
    answer = urllib.request.urlopen(address)
    policy, html = answer.headers["content-security-policy"], answer.read().decode()
    assert "default-src 'self'" in policy
    assert not re.search(r"https?:|wss?:", policy)
    loaded = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"'](https?:[^\"']+)", html)
    assert [url for url in loaded if not url.startswith(address.rstrip("/"))] == []
    assert not re.search("fonts.googleapis|cdnjs|analytics.js", html)


def test_a_port_that_is_taken(address: str) -> None:
    with gradio.Blocks() as page:
        gradio.Markdown("another")
    with pytest.raises(ConfigError, match="Cannot listen at port"):
        launch(page, "127.0.0.1", int(re.findall(r":(\d+)", address)[0]), wait=False)


def test_analytics_are_off() -> None:
    from gradio import analytics

    assert not analytics.analytics_enabled()


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    from gradio.data_classes import ImageData

    from plphp.ui.page import _picture

    (tmp_path / "a.png").write_text("no image")
    with gradio.Blocks():
        image: Any = _picture()
    with pytest.raises(gradio.Error, match="not an image"):
        image.preprocess(ImageData(path=str(tmp_path / "a.png"), orig_name="a.png"))
