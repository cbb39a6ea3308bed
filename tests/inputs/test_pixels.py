# SPDX-License-Identifier: Apache-2.0
"""Pixels of every kind become upright 8-bit RGB, over white."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from test_images import PNG, WHITE, encoded, same

from plphp.errors import LoadError
from plphp.inputs.media import load_image


def png(size: tuple[int, int], bits: int, color_type: int, row: bytes, transparent: bytes = b"") -> bytes:
    """A PNG file of rows that are alike, such as Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, color_type, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + row) * size[1]))
    clear = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + header + clear + pixels + chunk(b"IEND", b"")


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
        if as_file and mode not in ("PA", "I;16"):  # which not every version of Pillow writes so
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
        """A dark image: Pillow opens it as 32 bits, and the file says that there are 16."""
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
