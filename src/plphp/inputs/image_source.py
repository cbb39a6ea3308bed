# SPDX-License-Identifier: Apache-2.0
"""Where an image is: from what people and programs write to name it to a file, bytes or an address, not read yet.

`plphp.inputs.media.load_image` lists what is understood. The images of chats, data files and data sets all come through
here, so that all of them understand the same.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from PIL import Image

from plphp.errors import ConfigError, LoadError, did_you_mean
from plphp.io.quoting import cut, named, quoted

from .fetching import WebAddress

SHORTEST = 64
"""Characters from which a text in the alphabet of base64 may be an image and not the name of a file."""

_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")
_BASE64_OF_IMAGES = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkqA", "TU0AK")
"""How PNG, JPEG, GIF, WebP and TIFF begin."""


@dataclass(frozen=True)
class ImageSource:
    """Where an image is, before it is read.

    Parameters
    ----------
    content : Path, bytes, WebAddress or Image
        The file, its bytes or address, or the image itself.
    name : str
        Short name of the image for messages.
    """

    content: Path | bytes | WebAddress | Image.Image
    name: str


def find_image(source: Any, *, folder: str | Path | None = None, allow_urls: bool = False) -> ImageSource:
    """Find out where an image is.

    Parameters
    ----------
    source : object
        What names the image, see `plphp.inputs.media.load_image`.
    folder : str or Path, optional
        Where relative paths start; default: the current folder.
    allow_urls : bool
        Whether http and https addresses may be fetched.

    Raises
    ------
    LoadError
        If there is no such file, or images are not read from such an address, text or object.
    ConfigError
        If it is a mapping, such as an entry of a chat, that names no image or several.
    """
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or f"of {source.width} x {source.height} pixels in memory"
        return ImageSource(source, str(name))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return ImageSource(bytes(source), f"of {len(source):,} bytes")
    if isinstance(source, WebAddress):
        return ImageSource(source, str(source))
    if isinstance(source, Mapping):
        image = find_image(named_source(source, "image"), folder=folder, allow_urls=allow_urls)
        stored = source.get("bytes") is not None and isinstance(source.get("path"), str)
        return replace(image, name=named(source["path"])) if stored else image
    if isinstance(source, os.PathLike):
        # an address that was made a path has lost a slash
        source = re.sub(r"^(https?:)/(?=[^/])", r"\1//", os.fsdecode(source))
    if isinstance(source, str) and source.strip():
        return _find_text(source, Path(folder or ""), allow_urls)
    raise LoadError(f"Expected an image, got {quoted(source)} ({type(source).__name__}).{_advice(source)}")


def located_image(source: Any, *, folder: str | Path | None = None, allow_urls: bool = False) -> Any:
    """Check a source without reading it, and make it independent of the folder and of the leave to fetch.

    Returns
    -------
    object
        A source of the same image for `find_image`: a text that names a file or an address has become a `Path` or a
        `WebAddress`.

    Raises
    ------
    PLPHPError
        See `find_image`.
    """
    content = find_image(source, folder=folder, allow_urls=allow_urls).content
    return content if isinstance(content, (Path, WebAddress)) else source


def located_images(
    values: Mapping[str, Any], *, folder: str | Path | None = None, allow_urls: bool = False
) -> tuple[Any, ...]:
    """Locate the images that a line of a file names: ``"images"`` (a list), or a single ``"image"`` or ``"file_name"``.

    Raises
    ------
    PLPHPError
        If there are two of these keys, if the line names videos too, which would be left out, or see `find_image`.
    """
    if video := next((key for key in ("videos", "video") if values.get(key)), None):
        raise ConfigError(f'{video!r} is not read from such a file: name some of the frames as "images".')
    keys = [key for key in ("images", "image", "file_name") if values.get(key) is not None]
    if len(keys) > 1:
        raise ConfigError(f"The images are named twice, by {' and '.join(map(repr, keys))}: leave one of them out.")
    value = values[keys[0]] if keys else []
    sources = value if isinstance(value, list) else [value]
    return tuple(located_image(source, folder=folder, allow_urls=allow_urls) for source in sources)


def named_source(part: Mapping[str, Any], kind: str) -> Any:
    """Return the source that an entry of a chat, or a cell of a hub's table, names as its image or video.

    Parameters
    ----------
    part : mapping
        ``{"path": ...}``, ``{"url": ...}``, ``{"image": ...}``, ``{"base64": ...}`` or ``{"image_url": {"url": ...}}``,
        each with or without a ``"type"``; or ``{"bytes": ..., "path": ...}``, of which the bytes count.
    kind : str
        ``"image"`` or ``"video"``.

    Returns
    -------
    object
        None if the entry names no source.

    Raises
    ------
    ConfigError
        If the entry has an unknown key, or names two sources.
    """
    values = {key: value for key, value in part.items() if key != "type" and value is not None}
    known = (kind, "path", "url", f"{kind}_url", *(["base64", "bytes", "detail"] if kind == "image" else []))
    for key in values:
        if key not in known:
            raise ConfigError(f"Unknown key {quoted(key)} of the {kind}.{did_you_mean(str(key), known)}")
    if {*values} == {"bytes", "path"}:  # how `datasets` stores an image: the path is a mere name
        return values["bytes"]
    detail = values.pop("detail", "auto")
    if len(values) > 1:
        raise ConfigError(f"The {kind} is named twice, by {' and '.join(map(repr, values))}: leave one of them out.")
    key, value = next(iter(values.items()), ("", None))
    if key == f"{kind}_url" and isinstance(value, Mapping):
        if set(value) - {"url", "detail"} or not isinstance(value.get("url"), str):
            raise ConfigError(f'{key!r} must be {{"url": ...}} or text, got {quoted(value)}.')
        value, detail = value["url"], value.get("detail") or detail
    if detail not in ("auto", "high"):
        raise ConfigError(f"The detail {quoted(detail)} of an image cannot be had: leave it out for the whole image.")
    if key == "base64":
        if not isinstance(value, str):
            raise ConfigError(f"The base64 of the {kind} must be text, got {quoted(value)}.")
        return value if isinstance(value, str) and value.startswith("data:") else f"data:;base64,{value}"
    return value


def find_file(text: str, folder: Path) -> Path | None:
    """Return the file that a path or a ``file:`` address names; None if the text is another kind of address.

    Raises
    ------
    LoadError
        If the address names a file of another machine.
    """
    scheme = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]+):(//)?", text)
    if scheme is None or not (scheme[2] or scheme[1].lower() in ("file", "data")):
        return folder / text  # a colon may stand in a name, and after a drive's letter
    if scheme[1].lower() != "file":
        return None
    try:
        parts = urlsplit(text.strip())
    except ValueError as error:
        raise LoadError(f"{named(text)} is no address of a file: {error}.") from error
    if parts.netloc not in ("", "localhost"):
        raise LoadError(
            f"{named(text)} is a file of the machine {parts.netloc!r}: write file:///folder/name.png, or the "
            "path alone."
        )
    return folder / url2pathname(parts.path)


def find_video(source: Any, *, folder: str | Path | None = None, allow_urls: bool = False) -> Path | list[Any]:
    """Find out where a video is: a file, a folder of frames, or a list of frames.

    Parameters
    ----------
    source : str, Path or sequence
        A path, a ``file:`` address, or frames, each as in `located_image`.
    folder : str or Path, optional
        Where relative paths start; default: the current folder.
    allow_urls : bool
        Whether http and https addresses of frames may be fetched.

    Raises
    ------
    LoadError
        If there is no such video, or it is a web address.
    """
    if isinstance(source, (list, tuple)) and source:
        return [located_image(frame, folder=folder, allow_urls=allow_urls) for frame in source]
    if not isinstance(source, (str, os.PathLike)) or not os.fsdecode(source):
        raise LoadError(f"Expected a video, a path or a list of frames, got {quoted(source)}.")
    path = find_file(os.fsdecode(source), Path(folder or ""))
    if path is None:
        raise LoadError(f"{named(os.fsdecode(source))} is an address: plphp reads videos from files alone.")
    if not os.path.exists(path):
        raise LoadError(f"There is no video {named(str(path))}.")
    return path


def _find_text(text: str, folder: Path, allow_urls: bool) -> ImageSource:
    path = find_file(text, folder)
    if path is None:
        return _find_address(text.strip(), allow_urls)
    if not os.path.isfile(path) and _is_base64(text):
        return ImageSource(_decoded(text, text), cut(text))
    name = named(str(path))
    if os.path.isdir(path):
        raise LoadError(f"{name} is a folder, not an image file.")
    if not os.path.exists(path):
        raise LoadError(f"There is no image file {name}.")
    return ImageSource(path, name)


def _find_address(text: str, allow_urls: bool) -> ImageSource:
    scheme = text.partition(":")[0].lower()
    if scheme == "data":
        return ImageSource(_data(text), cut(text))
    if scheme not in ("http", "https"):
        raise LoadError(f"{named(text)} is an address that plphp does not read: download the file first.")
    address = WebAddress(text)
    if not allow_urls:
        raise LoadError(
            f"{address} is an address, and nothing is fetched from the web unless it is allowed: download the file "
            "first, or allow it (allow_urls=True; --allow-urls on the command line)."
        )
    return ImageSource(address, str(address))


def _data(text: str) -> bytes:
    """The bytes of a ``data:`` URI."""
    header, comma, data = text[len("data:") :].partition(",")
    media_type, *parameters = [part.strip().lower() for part in header.split(";")]
    if not comma:
        raise LoadError(f"{cut(text)} is no data URI: expected data:image/png;base64,...")
    if media_type == "image/svg+xml":
        raise LoadError(f"{cut(text)} is a drawing (SVG), not pixels: convert it to PNG.")
    if not media_type.startswith("image/") and media_type not in ("", "application/octet-stream"):
        raise LoadError(f"{cut(text)} is of the media type {cut(media_type)!r}, not an image.")
    if "base64" in parameters:
        return _decoded(data, text)
    return unquote_to_bytes(data)


def _decoded(data: str, text: str) -> bytes:
    """The bytes of base64, in either alphabet, with or without line breaks and padding."""
    encoded = b"".join(unquote_to_bytes(data).split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    try:
        return base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    except binascii.Error as error:
        raise LoadError(f"The base64 text {cut(text)} is broken: {error}.") from error


def _is_base64(text: str) -> bool:
    """Whether a text that names no file is meant as base64: it begins as an image does, or is long and is no path."""
    bare = "".join(text.split())
    if bare.startswith(_BASE64_OF_IMAGES):
        return True
    if len(bare) < SHORTEST or _BASE64.fullmatch(bare) is None:
        return False
    return "/" not in bare or _is_image(bare)  # a path may be in the alphabet of base64, which has the slash


def _is_image(encoded: str) -> bool:
    try:
        with Image.open(BytesIO(_decoded(encoded, encoded))):
            return True
    except Exception:  # readers raise whatever these bytes make them raise
        return False


def _advice(source: Any) -> str:
    if hasattr(source, "shape"):
        return " Image.fromarray makes an image of an array, if it holds 8 bits and the channels come last."
    if isinstance(source, list):
        return " Give the images one by one."
    return ""
