# SPDX-License-Identifier: Apache-2.0
"""Read images and videos, whatever their format and place, and say clearly why some cannot be read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from plphp.errors import BackendUnavailableError, LoadError
from plphp.io.quoting import one_line
from plphp.settings.checks import check_int

from .fetching import WebAddress, fetch
from .image_source import ImageSource, find_image, find_video
from .pixels import decoded, upright_rgb

MAX_PIXELS = 80_000_000
"""Largest image that is decoded; below the size from which Pillow itself suspects a decompression bomb."""
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Formats that Pillow may try: not all it knows, as some of them start programs."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")


def load_image(
    source: Any, *, folder: str | Path | None = None, allow_urls: bool = False, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Read an image as upright 8-bit RGB.

    The first frame of an animation is taken, transparency becomes white, and the EXIF orientation is applied. For 16
    and 32 bits a pixel see `plphp.inputs.pixels.upright_rgb`.

    Parameters
    ----------
    source : str, Path, bytes, Image or mapping
        - a file: its path, or a ``file:`` address;
        - the bytes of a file: as ``bytes``, as a ``data:`` URI, or as text in base64;
        - an http or https address, if these are allowed;
        - an image of Pillow;
        - a mapping that names any of these: an entry of a chat (``{"type": "image", "path": ...}``, or with "url",
          "image" or "base64" in the place of "path"; ``{"type": "image_url", "image_url": {"url": ...}}``), or
          ``{"bytes": ..., "path": ...}``, as data sets store images.
    folder : str or Path, optional
        Where relative paths start; default: the current folder.
    allow_urls : bool
        Whether http and https addresses are fetched: from public hosts alone, 64 MiB and 30 s at most.
    max_pixels : int
        Larger images are refused before they are decoded.

    Returns
    -------
    Image
        An image of Pillow that is upright RGB already is returned itself.

    Raises
    ------
    LoadError
        If it is missing, not an image, broken or too large.
    ConfigError
        If it is a mapping that names no image or several, or ``max_pixels`` is no integer of at least 1.
    """
    check_int("max_pixels", max_pixels, minimum=1)
    located = find_image(source, folder=folder, allow_urls=allow_urls)
    with _opened(located, max_pixels) as image:
        return upright_rgb(image, located.name)


def load_video(
    source: Any, *, frames: int = 8, allow_urls: bool = False, max_pixels: int = MAX_PIXELS
) -> list[Image.Image]:
    """Read evenly spaced frames of a video.

    Parameters
    ----------
    source : str, Path or sequence
        Path or ``file:`` address of a folder of images (in the order of their names), an animated GIF, WebP or PNG, or
        a video file, which needs PyAV; or a list of frames, each as in `load_image`, all of which are taken.
    frames : int
        Frames to take at most of a file or folder.
    allow_urls : bool
        Whether http and https addresses of listed frames are fetched.
    max_pixels : int
        Larger frames are refused before they are decoded.

    Raises
    ------
    LoadError
        If the video cannot be read.
    ConfigError
        If ``frames`` or ``max_pixels`` is no integer of at least 1.
    BackendUnavailableError
        If it is a video file and PyAV is not installed.
    """
    check_int("frames", frames, minimum=1)
    check_int("max_pixels", max_pixels, minimum=1)
    video = find_video(source, allow_urls=allow_urls)
    if isinstance(video, list):
        return [load_image(frame, allow_urls=allow_urls, max_pixels=max_pixels) for frame in video]
    if video.is_dir():
        files = sorted(file for file in video.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise LoadError(f"The folder {video} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
        return [load_image(files[index], max_pixels=max_pixels) for index in _spread(len(files), frames)]
    if video.is_file() and video.suffix.lower() not in IMAGE_SUFFIXES:
        return _decode_video(video, frames, max_pixels)
    result = []
    with _opened(ImageSource(video, str(video)), max_pixels) as image:
        for index in _spread(getattr(image, "n_frames", 1), frames):
            try:
                image.seek(index)
                image.load()
            except Exception as error:  # readers raise whatever broken bytes make them raise
                raise LoadError(f"Frame {index + 1} of the video {video} is broken: {one_line(error)}") from error
            result.append(upright_rgb(image.copy(), str(video)))
    return result


@contextmanager
def _opened(source: ImageSource, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image, whose file is closed at the end, and decode its first frame."""
    name, content = source.name, source.content
    if isinstance(content, Image.Image):
        yield _checked(content, name, max_pixels)
        return
    try:
        if isinstance(content, WebAddress):
            content = fetch(content)
        file = BytesIO(content) if isinstance(content, bytes) else content
        with warnings.catch_warnings():
            # the limit of _check_size is stricter, and has a better message
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.init()
            image = Image.open(file, formats=[name for name in IMAGE_FORMATS if name in Image.OPEN])
    except LoadError:
        raise
    except UnidentifiedImageError as error:
        raise LoadError(f"The file {name} is not an image: plphp reads {', '.join(IMAGE_FORMATS)}.") from error
    except Image.DecompressionBombError as error:
        raise LoadError(f"The image {name} has far more than {max_pixels:,} pixels: make it smaller.") from error
    except Exception as error:  # readers raise whatever broken bytes make them raise
        raise LoadError(f"Cannot read the image {name}: {one_line(error)}") from error
    with image:
        yield _checked(image, name, max_pixels)


def _checked(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """Decode an image, if it is not too large."""
    _check_size(f"image {name}", *image.size, max_pixels)
    try:
        return decoded(image)
    except Exception as error:  # readers raise whatever broken bytes make them raise
        raise LoadError(f"The image {name} is broken: {one_line(error)}") from error


def _check_size(what: str, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise LoadError(f"The {what} has {width} x {height} pixels, more than {max_pixels:,}: make it smaller.")
    if width * height == 0:
        raise LoadError(f"The {what} has {width} x {height} pixels: it is empty.")


def _spread(count: int, parts: int) -> list[int]:
    """Evenly spaced indices below ``count``: the middle of each of as many parts; all indices if there are fewer."""
    if count <= parts:
        return list(range(count))
    return [(2 * part + 1) * count // (2 * parts) for part in range(parts)]


def _decode_video(path: Path, frames: int, max_pixels: int) -> list[Image.Image]:
    try:
        import av  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise BackendUnavailableError(
            f"Reading the video file {path} needs PyAV (pip install av); a folder of frames or an animated "
            "GIF or WebP needs nothing more."
        ) from error
    try:
        with av.open(str(path)) as container:
            for stream in container.streams.video:
                _check_size(f"video {path}", stream.width, stream.height, max_pixels)
            count = sum(1 for _ in container.decode(video=0))  # decoded, as what a container says of it may be wrong
            container.seek(0)
            indices = set(_spread(count, frames))
            result = [frame.to_image() for index, frame in enumerate(container.decode(video=0)) if index in indices]
    except LoadError:
        raise
    except Exception as error:  # decoders raise whatever broken bytes make them raise
        raise LoadError(f"Cannot read the video {path}: {one_line(error)}") from error
    if not result:
        raise LoadError(f"The video {path} holds no frames.")
    return result
