# SPDX-License-Identifier: Apache-2.0
"""From the pixels of any image mode to upright 8-bit RGB."""

from __future__ import annotations

import logging
from typing import Any

from PIL import ExifTags, Image, ImageOps

from plphp.errors import LoadError
from plphp.io.quoting import one_line

logger = logging.getLogger("plphp")

_STORED_BITS: dict[str, Any] = {
    "L;2": lambda value: value * 85,
    "L;4": lambda value: value * 17,
    "RGB;16B": lambda value: tuple(part >> 8 for part in value),
}
"""Pillow scales the pixels of these PNG files to 8 bits, but leaves the transparent colour as it is in the file."""


def upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """Turn an image into upright 8-bit RGB, without changing it.

    The EXIF orientation is applied (and is gone from the result), and transparency becomes white. 16 bits a channel
    become the nearest of 8. A 32-bit integer image, which has no range of its own, is taken as 8 bits if no value is
    above 255, and as 16 bits if none is above 65,535.

    Parameters
    ----------
    image : Image
        Image of any mode.
    name : str
        Name of the image for messages.

    Returns
    -------
    Image
        The image itself, if there is nothing to do.

    Raises
    ------
    LoadError
        If the range of its pixels is not known.
    """
    # Pillow gives 16 bits as mode I too, at the full range, for PGM files, and before its version 11 for PNG files.
    sixteen_bits = image.mode != "I" or image.format in ("PNG", "PPM")
    image = _upright(image, name)
    if image.mode == "F":
        raise LoadError(f"The image {name} holds floating-point pixels, whose range is not known: save it with 8 bits.")
    if image.mode.startswith("I"):
        return _from_integers(image, sixteen_bits, name)
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def decoded(image: Image.Image) -> Image.Image:
    """Decode an image that was opened; returns a copy where Pillow leaves it with a wrong transparent colour."""
    tile = getattr(image, "tile", None)
    stored = tile[0][3] if tile and image.format == "PNG" else None
    image.load()
    transparent = image.info.get("transparency")
    scale = _STORED_BITS.get(stored[0] if isinstance(stored, tuple) else stored or "")
    if scale is None or transparent is None:
        return image
    image = image.copy()
    image.info["transparency"] = scale(transparent)
    return image


def _upright(image: Image.Image, name: str) -> Image.Image:
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return image  # without the copy that exif_transpose would make
        return ImageOps.exif_transpose(image)
    except Exception as error:  # broken EXIF data make Pillow raise many things, and the pixels are sound
        logger.warning("The EXIF data of the image %s are broken and left out: %s", name, one_line(error))
        return image


def _from_integers(image: Image.Image, sixteen_bits: bool, name: str) -> Image.Image:
    """Make RGB of 16-bit and 32-bit integers, which Pillow would clip at 255."""
    import numpy as np  # the command line refuses what it can before numpy is there

    values = np.asarray(image)
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if low < 0 or high > 65535:
        raise LoadError(
            f"The image {name} holds 32-bit pixels from {low:,} to {high:,}, whose range is not known: save it with 8 "
            "or 16 bits."
        )
    if sixteen_bits or high > 255:
        eight_bits = ((np.arange(65536) * 255 + 32767) // 65535).astype(np.uint8)
        levels = eight_bits[values]
    else:
        levels = values.astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        levels[values == transparent] = 255
    return Image.fromarray(levels).convert("RGB")
