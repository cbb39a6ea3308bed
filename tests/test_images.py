# SPDX-License-Identifier: Apache-2.0
"""Images under every name, and of every kind of pixels, through the one reader."""

from __future__ import annotations

import base64
import pickle
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

import tiny_hub
from plphp.errors import ConfigError, LoadError, PLPHPError
from plphp.media import load_image, load_video

WHITE = (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(size: tuple[int, int], bits: int, color_type: int, row: bytes, transparent: bytes = b"") -> bytes:
    """A PNG file of rows that are alike, such as Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, color_type, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + row) * size[1]))
    clear = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + header + clear + pixels + chunk(b"IEND", b"")


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
        ids=lambda source: str(source)[:30],
    )
    def test_what_holds_its_pixels(self, source: Any) -> None:
        assert same(load_image(source))

    @pytest.mark.parametrize("kind", ["JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF"])
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


class TestPixels:
    @pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"])
    def test_every_mode(self, mode: str) -> None:
        ramp = Image.fromarray(np.tile(np.array([0, 60, 200, 255], np.uint8), (4, 1)))
        if mode in ("La", "RGBa"):
            image = ramp.convert("LA" if mode == "La" else "RGBA").convert(mode)
        elif mode == "PA":
            image = ramp.convert("P").convert("PA")
        else:
            image = ramp.convert(mode) if mode in ("1", "L", "LA", "P") else ramp.convert("RGB").convert(mode)
        loaded = np.asarray(load_image(image), dtype=int)
        expected = np.asarray(ramp.convert("1").convert("RGB") if mode == "1" else ramp.convert("RGB"), dtype=int)
        assert np.abs(loaded - expected).max() <= 2

    @pytest.mark.parametrize("as_file", [True, False])
    @pytest.mark.parametrize("mode", ["LA", "RGBA", "PA", "P", "L", "RGB", "1", "I;16"])
    def test_transparency_is_white(self, mode: str, as_file: bool) -> None:
        """The left half is clear, and black below."""
        image = Image.new("L" if mode in ("P", "PA") else mode, (4, 2), 0)
        image.paste(65535 if mode == "I;16" else "white", (2, 0, 3, 2))
        options = {"transparency": (0, 0, 0) if mode == "RGB" else 0}
        if mode in ("LA", "RGBA", "PA"):
            options = {}
            image = image.convert("P").convert("PA") if mode == "PA" else image
            image.putalpha(Image.fromarray(np.tile(np.array([0, 0, 255, 255], np.uint8), (2, 1))))
        elif mode == "P":
            image = image.convert("P")
        if as_file and mode != "PA":
            image = Image.open(BytesIO(encoded(image, **options)))
        else:
            image.info |= options
        loaded = load_image(image)
        assert [loaded.getpixel((x, 0)) for x in (0, 1, 2)] == [WHITE] * 3
        if mode in ("LA", "RGBA", "PA"):
            assert loaded.getpixel((3, 0)) == (0, 0, 0)

    def test_half_transparent(self) -> None:
        assert load_image(Image.new("RGBA", (1, 1), (0, 0, 0, 64))).getpixel((0, 0)) == (191, 191, 191)

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (png((4, 1), 2, 0, bytes([0b00011011]), struct.pack(">H", 1)), [0, 255, 170, 255]),
            (png((2, 1), 4, 0, bytes([0x8F]), struct.pack(">H", 8)), [255, 255]),
            (png((4, 1), 1, 0, bytes([0b01010000]), struct.pack(">H", 0)), [255, 255, 255, 255]),
            (png((2, 1), 16, 0, struct.pack(">2H", 0x1234, 0), struct.pack(">H", 0x1234)), [255, 0]),
            (png((2, 1), 16, 2, struct.pack(">6H", 0x1234, 7, 9, 0, 0, 0), struct.pack(">3H", 0x1234, 7, 9)), [255, 0]),
        ],
        ids=["2 bits", "4 bits", "1 bit", "16 bits", "16 bits of color"],
    )
    def test_a_transparent_color_of_few_or_many_bits(self, content: bytes, expected: list[int]) -> None:
        for source in (content, Image.open(BytesIO(content))):
            image = load_image(source)
            assert [image.getpixel((x, 0)) for x in range(image.width)] == [(value,) * 3 for value in expected]

    @pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
    def test_sixteen_bits(self, mode: str) -> None:
        values = np.array([[0, 1, 128, 129, 257, 32896, 65278, 65535]], dtype=">u2" if mode == "I;16B" else "<u2")
        image = load_image(Image.frombytes(mode, (8, 1), values.tobytes()))
        assert np.asarray(image)[0, :, 1].tolist() == [0, 0, 0, 1, 1, 128, 254, 255]

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_sixteen_bits_in_a_file(self, kind: str) -> None:
        content = encoded(Image.fromarray(np.array([[0, 255, 65535]], np.uint16)), kind)
        for source in (content, Image.open(BytesIO(content))):
            assert np.asarray(load_image(source))[0, :, 0].tolist() == [0, 1, 255]

    def test_sixteen_bits_of_a_pgm_file(self) -> None:
        """A dark one: Pillow opens it as 32 bits, and the file says that there are 16."""
        assert np.asarray(load_image(b"P5\n2 1\n65535\n\x00\x02\x00\xff"))[0, :, 0].tolist() == [0, 1]
        assert np.asarray(load_image(b"P5\n2 1\n1023\n\x00\x00\x03\xff"))[0, :, 0].tolist() == [0, 255]

    @pytest.mark.parametrize("as_file", [True, False])
    @pytest.mark.parametrize(
        ("values", "expected"),
        [([0, 1, 254, 255], [0, 1, 254, 255]), ([0, 256, 32896, 65535], [0, 1, 128, 255]), ([0, 0, 0, 0], [0] * 4)],
    )
    def test_thirty_two_bits(self, values: list[int], expected: list[int], as_file: bool) -> None:
        image = Image.fromarray(np.array([values], np.int32))
        assert image.mode == "I"
        loaded = load_image(encoded(image, "TIFF") if as_file else image)
        assert np.asarray(loaded)[0, :, 2].tolist() == expected

    @pytest.mark.parametrize(("low", "high"), [(0, 65536), (-1, 255), (0, 2**31 - 1)])
    def test_thirty_two_bits_of_no_known_range(self, low: int, high: int) -> None:
        with pytest.raises(LoadError, match=f"holds 32-bit pixels from {low:,} to {high:,}, whose range is not known"):
            load_image(Image.fromarray(np.array([[low, high]], np.int32)))

    @pytest.mark.parametrize("value", [0.5, 300.0, float("nan"), float("inf")])
    def test_floating_point(self, value: float) -> None:
        image = Image.fromarray(np.full((2, 2), value, np.float32))
        for source in (image, encoded(image, "TIFF")):
            with pytest.raises(LoadError, match="floating-point pixels, whose range is not known"):
                load_image(source)


class TestOrientation:
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "in memory"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_it_is_applied_once(self, orientation: int, kind: str) -> None:
        image = Image.fromarray(np.arange(8 * 16, dtype=np.uint8).reshape(8, 16) * 2).convert("RGB")
        exif = Image.Exif()
        exif[0x0112] = orientation
        if kind == "in memory":
            image.info["exif"] = exif.tobytes()
            source: Any = image
        else:
            source = encoded(image, kind, exif=exif)
            image = Image.open(BytesIO(source))
        upright = load_image(source)
        expected = ImageOps.exif_transpose(image)
        assert upright.size == ((8, 16) if orientation > 4 else (16, 8))
        assert same(upright, expected.convert("RGB"))
        assert same(load_image(upright), upright)
        assert same(load_image(encoded(upright, exif=upright.getexif())), upright)
        if kind == "in memory":
            assert source.getexif()[0x0112] == orientation  # the user's image is left alone

    def test_sixteen_bits_are_turned_too(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        content = encoded(Image.fromarray(np.array([[0, 65535]], np.uint16)), exif=exif)
        assert np.asarray(load_image(content))[:, 0, 0].tolist() == [0, 255]

    def test_broken_exif_leaves_the_pixels(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(self: Any) -> None:
            raise struct.error("unpack requires a buffer of 2 bytes")

        monkeypatch.setattr(Image.Image, "getexif", broken)
        assert same(load_image(PNG))
        assert "The EXIF data of the image of" in caplog.text


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
