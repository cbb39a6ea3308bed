# SPDX-License-Identifier: Apache-2.0
"""Images under every name, and of every kind of pixels, through the same reader."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import tiny_hub
from plphp.errors import ConfigError, LoadError, PLPHPError
from plphp.inputs.media import IMAGE_FORMATS, load_image, load_video

Image.init()  # which fills Image.SAVE
WHITE = (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PICTURE = Image.effect_noise((40, 24), 90).convert("RGB")
PNG = encoded(PICTURE)
TEXT = base64.b64encode(PNG).decode()
URI = f"data:image/png;base64,{TEXT}"


def same(image: Image.Image, expected: Image.Image = PICTURE) -> bool:
    return image.mode == "RGB" and image.size == expected.size and image.tobytes() == expected.tobytes()


class TestNames:
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        (tmp_path / "in side").mkdir()
        (tmp_path / "in side" / "a#1.png").write_bytes(PNG)
        (tmp_path / "12:30.png").write_bytes(PNG)

    @pytest.mark.parametrize(
        "name",
        [
            "in side/a#1.png",
            "12:30.png",
            "file:in%20side/a%231.png",
            "FILE:in%20side/a%231.png",
            Path("in side/a#1.png"),
            {"type": "image", "path": "in side/a#1.png"},
            {"type": "image", "url": "in side/a#1.png"},
            {"type": "image", "image": "in side/a#1.png"},
            {"type": "image_url", "image_url": "in side/a#1.png"},
            {"type": "image_url", "image_url": {"url": "in side/a#1.png"}},
            {"type": "image_url", "image_url": {"url": "file:in%20side/a%231.png", "detail": "auto"}},
            {"type": "image_url", "image_url": {"url": "in side/a#1.png", "detail": "high"}},
            {"image_url": "in side/a#1.png"},
            {"bytes": None, "path": "in side/a#1.png"},
            {"path": "in side/a#1.png", "url": None, "text": None},
        ],
        ids=str,
    )
    def test_paths_start_at_the_folder(self, tmp_path: Path, name: Any) -> None:
        assert same(load_image(name, folder=tmp_path))
        with pytest.raises(LoadError, match="There is no image file"):
            load_image(name, folder=tmp_path / "in side")

    @pytest.mark.parametrize("host", ["", "localhost"])
    def test_file_addresses(self, tmp_path: Path, host: str) -> None:
        address = (tmp_path / "in side" / "a#1.png").as_uri().replace("file://", f"file://{host}")
        assert same(load_image(address, folder="elsewhere"))

    @pytest.mark.parametrize(
        "source",
        [
            PNG,
            bytearray(PNG),
            memoryview(PNG),
            URI,
            f"  {URI}\n",
            URI.replace("data:image/png", "DATA:Image/PNG;name=a.png").replace(";base64", ";Base64"),
            f"data:;base64,{TEXT}",
            f"data:application/octet-stream;base64,{TEXT}",
            f"data:image/png;base64,{TEXT.replace('+', '%2B').replace('/', '%2F').replace('=', '%3D')}",
            "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG),
            TEXT,
            TEXT.rstrip("="),
            TEXT.replace("+", "-").replace("/", "_"),
            base64.encodebytes(PNG).decode(),
            {"type": "image", "base64": TEXT},
            {"type": "image", "base64": URI},
            {"type": "image", "image": TEXT},
            {"type": "image", "url": URI},
            {"type": "image_url", "image_url": {"url": URI}},
            {"type": "image", "image": PICTURE},
            {"type": "image", "image": {"bytes": PNG, "path": None}},
            {"bytes": PNG, "path": "none.png"},
            {"bytes": PNG},
            PICTURE,
            PICTURE.convert("RGBA"),
        ],
        ids=lambda source: "memoryview" if isinstance(source, memoryview) else str(source)[:30],
    )
    def test_what_holds_its_pixels(self, source: Any) -> None:
        assert same(load_image(source))

    @pytest.mark.parametrize("kind", [kind for kind in IMAGE_FORMATS if kind in Image.SAVE])
    def test_base64_of_every_format(self, kind: str) -> None:
        content = encoded(Image.new("RGB", (20, 20), "red"), kind)
        assert same(load_image(base64.b64encode(content).decode()), load_image(content))

    def test_the_smallest_image_in_base64(self) -> None:
        gif = "R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
        assert load_image(gif).getpixel((0, 0)) == WHITE

    def test_a_file_comes_before_base64(self, tmp_path: Path) -> None:
        (tmp_path / ("a" * 80)).write_bytes(PNG)
        assert same(load_image("a" * 80, folder=tmp_path))

    def test_an_upright_image_is_not_copied(self) -> None:
        assert load_image(PICTURE) is PICTURE


REFUSED: dict[str, tuple[Any, type, str]] = {
    "missing": ("none.png", LoadError, r"There is no image file none\.png"),
    "long path": ("folder/" * 100 + "a.png", LoadError, r"There is no image file folder.*\(705 characters\)"),
    "nul": ("a\0.png", LoadError, "There is no image file"),
    "folder": (".", LoadError, r"\. is a folder, not an image file"),
    "empty": ("", LoadError, "Expected an image, got ''"),
    "blank": (" \n", LoadError, "Expected an image, got"),
    "none": (None, LoadError, "Expected an image, got None"),
    "number": (3, LoadError, r"Expected an image, got 3 \(int\)"),
    "list": ([PICTURE], LoadError, "Give the images one by one"),
    "array": (np.zeros((4, 4, 3), np.uint8), LoadError, r"\(ndarray\)\. Image\.fromarray"),
    "tensor": (torch.zeros(3, 4, 4), LoadError, r"\(Tensor\)\. Image\.fromarray"),
    "file that is open": (BytesIO(PNG), LoadError, r"got <_io\.BytesIO .*\)\.$"),
    "no address": ("file://[bad/a.png", LoadError, "is no address of a file"),
    "number as base64": ({"type": "image", "base64": 5}, ConfigError, "The base64 of the image must be text, got 5"),
    "long path without a dot": ("folder/" * 12 + "picture", LoadError, "There is no image file folder/"),
    "other host": ("file://images/a.png", LoadError, "a file of the machine 'images': write file:///"),
    "bucket": ("s3://images/a.png", LoadError, "is an address that plphp does not read: download"),
    "ftp": ("ftp://images/a.png", LoadError, "is an address that plphp does not read"),
    "web": ("https://images.test/a.png", LoadError, "unless it is allowed: download the file first"),
    "web as a path": (Path("https://images.test/a.png"), LoadError, "https://images.test/a.png is an address"),
    "web page": (f"data:text/html;base64,{TEXT}", LoadError, "is of the media type 'text/html', not an image"),
    "drawing": (f"data:image/svg+xml;base64,{TEXT}", LoadError, r"is a drawing \(SVG\)"),
    "no comma": (f"data:image/png;base64;{TEXT}", LoadError, "is no data URI: expected data:image/png;base64"),
    "character": (URI[:-9] + "*" + URI[-8:], LoadError, r"base64 text data:image/png;base64,.* is broken"),
    "length": (URI.rstrip("=")[:-3].rstrip("=")[: len("data:image/png;base64,") + 1001], LoadError, "is broken"),
    "padding inside": (f"data:image/png;base64,{TEXT[:80]}=={TEXT[80:]}", LoadError, "is broken"),
    "cut off": (URI[:1000], LoadError, "The image data:.* is broken: "),
    "bare character": (TEXT[:500] + "*" + TEXT[501:], LoadError, "base64 text iVBOR.* is broken"),
    "no image": (base64.b64encode(b"hello" * 50).decode(), LoadError, "The file aGVsb.* is not an image"),
    "bytes": (b"hello", LoadError, "The file of 5 bytes is not an image: plphp reads PNG"),
    "no bytes": (b"", LoadError, "The file of 0 bytes is not an image"),
    "cell": ({"bytes": b"hello", "path": "a.png"}, LoadError, r"The file a\.png is not an image"),
    "empty cell": ({"bytes": None, "path": None}, LoadError, "Expected an image, got None"),
    "typo": ({"type": "image", "pth": "a.png"}, ConfigError, "Unknown key 'pth' of the image. Did you mean 'path'"),
    "twice": ({"path": "a.png", "url": "b.png"}, ConfigError, "named twice, by 'path' and 'url'"),
    "detail": ({"image_url": {"url": URI, "detail": "low"}}, ConfigError, "The detail 'low' of an image cannot be had"),
    "outer detail": ({"image_url": URI, "detail": "low"}, ConfigError, "The detail 'low'"),
    "image_url": ({"image_url": {"uri": URI}}, ConfigError, r"'image_url' must be \{\"url\": ...\} or text, got"),
    "image_url of more": ({"image_url": {"url": URI, "x": TEXT}}, ConfigError, r"'image_url' must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    source, kind, part = REFUSED[case]
    with pytest.raises(kind, match=part) as caught:
        load_image(source)
    assert isinstance(caught.value, PLPHPError)
    said = str(caught.value)
    assert len(said) < 400
    assert not any(TEXT[at : at + 60] in said for at in range(0, len(TEXT), 60))


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_any_text_is_an_image_or_an_error(text: str) -> None:
    for source in (text, f"data:{text}", f"data:image/png;base64,{text}", f"file:{text}", f"x://{text}"):
        with pytest.raises(LoadError) as caught:
            load_image(source)
        assert len(str(caught.value)) < 900


class TestFrames:
    @pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
    def test_the_first_of_several(self, kind: str) -> None:
        frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        pixel = load_image(content).getpixel((4, 4))
        assert pixel[0] > 250
        assert pixel[2] < 5

    def test_the_frame_that_the_user_went_to(self) -> None:
        frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
        image = Image.open(BytesIO(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])))
        image.seek(1)
        assert load_image(image).getpixel((4, 4)) == (0, 0, 255)

    def test_a_video_by_its_address(self, tmp_path: Path) -> None:
        for name in ("1.png", "2.png"):
            (tmp_path / name).write_bytes(PNG)
        assert len(load_video(tmp_path.as_uri())) == 2
        for number in (0, 1.5, True):
            for name in ("frames", "max_pixels"):
                with pytest.raises(ConfigError, match=f"{name} must be an integer of at least 1, got {number}"):
                    load_video(tmp_path.as_uri(), **{name: number})  # type: ignore[arg-type]
        with pytest.raises(LoadError, match="is an address: plphp reads videos from files alone"):
            load_video("https://films.test/a.mp4")
        with pytest.raises(LoadError, match=r"There is no video none\.mp4"):
            load_video("none.mp4")

    def test_a_broken_frame(self, tmp_path: Path) -> None:
        frames = [Image.effect_noise((64, 64), 90) for _ in range(4)]
        content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
        (tmp_path / "a.gif").write_bytes(content[: len(content) * 7 // 8])
        with pytest.raises(LoadError, match=r"Frame \d of the video .*a\.gif is broken"):
            load_video(tmp_path / "a.gif")


class TestLimits:
    @pytest.mark.parametrize(
        "make",
        [lambda path: path, Path.read_bytes, lambda path: Image.open(BytesIO(path.read_bytes()))],
        ids=["path", "bytes", "image"],
    )
    def test_before_it_is_decoded(self, tmp_path: Path, make: Callable[[Path], Any]) -> None:
        """The file claims pixels and holds none, so that decoding it would say that it is broken."""
        source = make(tiny_hub.png_header(tmp_path / "huge.png", (9_000, 9_000)))
        with pytest.raises(LoadError, match="9000 x 9000 pixels, more than 80,000,000: make it smaller"):
            load_image(source)

    def test_beyond_pillows_own(self, tmp_path: Path) -> None:
        for side in (9_500, 20_000):
            content = tiny_hub.png_header(tmp_path / "huge.png", (side, side)).read_bytes()
            uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
            with pytest.raises(LoadError, match="make it smaller"):
                load_image(uri)

    def test_an_image_of_memory(self) -> None:
        with pytest.raises(LoadError, match="of 11 x 10 pixels in memory has 11 x 10 pixels, more than 109"):
            load_image(Image.new("RGB", (11, 10)), max_pixels=109)
        with pytest.raises(LoadError, match="it is empty"):
            load_image(Image.new("RGB", (0, 4)))

    def test_an_image_that_was_opened_and_is_broken(self) -> None:
        with pytest.raises(LoadError, match="of 40 x 24 pixels in memory is broken"):
            load_image(Image.open(BytesIO(PNG[:1000])))

    def test_formats_that_start_programs_are_not_tried(self) -> None:
        with pytest.raises(LoadError, match="is not an image"):
            load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")

    def test_the_file_is_closed_and_the_image_lives_on(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(PNG)
        image = load_image(tmp_path / "a.png")
        (tmp_path / "a.png").unlink()
        assert same(pickle.loads(pickle.dumps(image)))
        assert same(image.copy())
        assert image.resize((4, 4)).size == (4, 4)

    def test_a_file_is_decoded_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        opened = []
        original = Image.open
        monkeypatch.setattr(Image, "open", lambda *args, **more: opened.append(1) or original(*args, **more))
        load_image(URI)
        assert opened == [1]
