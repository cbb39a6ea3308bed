# SPDX-License-Identifier: Apache-2.0
"""Read images and videos from files, whatever their format, and say clearly what is wrong with the others."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import BackendUnavailableError, ConfigError, LoadError, one_line

MAX_PIXELS = 80_000_000
"""Largest image that is decoded; below the size from which Pillow itself suspects a decompression bomb."""
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""What Pillow may try; some of its other formats start programs."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")


def load_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file as upright 8-bit RGB.

    The first frame of an animation is taken, transparency becomes white, and the EXIF orientation is applied.

    Parameters
    ----------
    path : str or Path
        The file.
    max_pixels : int
        Larger images are refused before they are decoded.

    Raises
    ------
    LoadError
        If it is missing, not an image, broken or too large.
    """
    with _opened(path, max_pixels) as image:
        return _to_rgb(ImageOps.exif_transpose(image), path)


def load_video(path: str | Path, *, frames: int = 8, max_pixels: int = MAX_PIXELS) -> list[Image.Image]:
    """Read evenly spaced frames of a video.

    Parameters
    ----------
    path : str or Path
        A folder of images (in the order of their names), an animated GIF, WebP or PNG, or a video file, which
        needs PyAV.
    frames : int
        Frames to take at most.

    Raises
    ------
    LoadError
        If it cannot be read.
    BackendUnavailableError
        If it is a video file and PyAV is not installed.
    """
    if frames < 1:
        raise ConfigError(f"frames must be at least 1, got {frames}.")
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise LoadError(f"The folder {path} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
        return [load_image(files[index], max_pixels=max_pixels) for index in _spread(len(files), frames)]
    if path.is_file() and path.suffix.lower() not in IMAGE_SUFFIXES:
        return _decode_video(path, frames)
    result = []
    with _opened(path, max_pixels) as image:
        for index in _spread(getattr(image, "n_frames", 1), frames):
            image.seek(index)
            result.append(_to_rgb(image.copy(), path))
    return result


@contextmanager
def _opened(path: str | Path, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image file and decode its first frame."""
    if str(path).startswith(("http://", "https://")):
        raise LoadError(f"{path} is an address: download the file first, plphp reads files only.")
    try:
        with warnings.catch_warnings():
            # the limit below is the stricter one, and has a better message
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.init()
            image = Image.open(path, formats=[name for name in IMAGE_FORMATS if name in Image.OPEN])
    except FileNotFoundError as error:
        raise LoadError(f"There is no image file {path}.") from error
    except IsADirectoryError as error:
        raise LoadError(f"{path} is a folder, not an image file.") from error
    except UnidentifiedImageError as error:
        raise LoadError(f"{path} is not an image: plphp reads {', '.join(IMAGE_FORMATS)}.") from error
    except Image.DecompressionBombError as error:
        raise LoadError(f"The image {path} has far more than {max_pixels:,} pixels: make it smaller.") from error
    except Exception as error:  # readers raise whatever broken bytes make them raise
        raise LoadError(f"Cannot read the image {path}: {one_line(error)}") from error
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise LoadError(
                f"The image {path} has {width} x {height} pixels, more than {max_pixels:,}: make it smaller."
            )
        try:
            image.load()
        except Exception as error:  # as above
            raise LoadError(f"The image {path} is broken: {one_line(error)}") from error
        yield image


def _to_rgb(image: Image.Image, path: str | Path) -> Image.Image:
    if image.mode == "F":
        raise LoadError(f"The image {path} holds floating-point pixels, whose range is not known: save it with 8 bits.")
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _spread(count: int, wanted: int) -> list[int]:
    """Evenly spaced indices: the middle of each of ``wanted`` parts."""
    if count <= wanted:
        return list(range(count))
    return [(2 * part + 1) * count // (2 * wanted) for part in range(wanted)]


def _decode_video(path: Path, frames: int) -> list[Image.Image]:
    try:
        import av  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise BackendUnavailableError(
            f"Reading the video file {path} needs PyAV (pip install av); a folder of frames or an animated "
            "GIF or WebP needs nothing more."
        ) from error
    try:
        with av.open(str(path)) as container:
            count = sum(1 for _ in container.decode(video=0))
            container.seek(0)
            wanted = set(_spread(count, frames))
            result = [frame.to_image() for index, frame in enumerate(container.decode(video=0)) if index in wanted]
    except Exception as error:  # decoders raise whatever broken bytes make them raise
        raise LoadError(f"Cannot read the video {path}: {one_line(error)}") from error
    if not result:
        raise LoadError(f"The video {path} holds no frames.")
    return result
