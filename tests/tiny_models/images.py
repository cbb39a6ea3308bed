# SPDX-License-Identifier: Apache-2.0
"""Images and videos of a row, as the processors of the families encode them: tokens and tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.image_processing_utils import select_best_resolution

from .batches import join
from .tokens import BREAK, END, IMAGE, INDICATORS, START, TAG, VIDEO, VIDEO_END, VIDEO_START, Tokens

Encoded = tuple[list[Tokens], dict[str, torch.Tensor]]
"""Tokens of each image of a row, and the tensors that the processor returns for them."""
Encode = Callable[[Any, int, int, torch.Generator], Encoded]
"""``(config, images, index of the first image, generator) -> Encoded``; sizes vary with the index."""

Size = tuple[int, ...]

TILE = [IMAGE] * 16
"""Tokens of an image, or of a tile, of the tower's size."""


def _cycle(sizes: Sequence[Any], first: int, count: int) -> list[Any]:
    return [sizes[index % len(sizes)] for index in range(first, first + count)]


def _noise(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def _table(rows: Sequence[Size], columns: int) -> torch.Tensor:
    """Return sizes or grids as int64 [images, columns], also of no image."""
    return torch.tensor(rows).long().view(-1, columns)


# --- images and tiles of the tower's size -----------------------------------------------------------------


def tiled(numbers: Sequence[int], piece: Callable[[int], Tokens]) -> Encode:
    """Encode images that are cut into tiles of the tower's size.

    Parameters
    ----------
    numbers : sequence of int
        Tiles of the first image, the second, and so on.
    piece : callable
        Number of tiles -> tokens of the image.
    """

    def encode(config: Any, count: int, first: int, generator: torch.Generator) -> Encoded:
        tiles = _cycle(numbers, first, count)
        size = config.vision_config.image_size
        side = size if isinstance(size, int) else size[0]
        return [piece(number) for number in tiles], {"pixel_values": _noise(generator, sum(tiles), 3, side, side)}

    return encode


def same_size(start: Sequence[int] = (), end: Sequence[int] = ()) -> Encode:
    """Encode images that all have the tower's size."""
    return tiled((1,), lambda number: [*start, *TILE, *end])


def cohere(tile: Callable[[int], Tokens]) -> Encode:
    """Encode images of one to three tiles, of which ``tile`` writes the tokens by their number."""
    return tiled((3, 1, 2), lambda number: [START, *(token for index in range(number) for token in tile(index)), END])


internvl = tiled((3, 1, 2), lambda number: [START, *TILE * number, END])
internvl_video = tiled((2,), lambda frames: [3, 4, START, *TILE, END] * frames)


def _ovis2(number: int) -> Tokens:
    start, end, grid, column, _ = INDICATORS
    return [start, *TILE, grid, *([*TILE, column, *TILE] if number > 1 else []), end]


def _llama4(number: int) -> Tokens:
    return [START, *([*TILE, BREAK, *TILE, BREAK + 1] if number > 1 else []), TAG, *TILE, END]


# Images alternate between two tiles with the whole image, and the whole image alone.
ovis2 = tiled((3, 1), _ovis2)
llama4 = tiled((3, 1), _llama4)


def _rows_of_tiles(count: int, side: int, generator: torch.Generator, hole: int = 0) -> dict[str, torch.Tensor]:
    """Return ``pixel_values`` (1, tiles, 3, side, side) and their mask; every second tile is narrower."""
    pixel_values = _noise(generator, 1, count, 3, side, side)
    mask = torch.ones(1, count, side, side, dtype=torch.long)
    mask[:, 1::2, :, side - hole :] = 0
    return {"pixel_values": pixel_values * mask[:, :, None], "pixel_attention_mask": mask}


def idefics2(config: Any, count: int, first: int, generator: torch.Generator) -> Encoded:
    """Encode images of a fixed number of latents."""
    piece = [START, *[IMAGE] * config.perceiver_config.resampler_n_latents, START]
    return [piece] * count, _rows_of_tiles(count, config.vision_config.image_size, generator, hole=8)


def idefics3(config: Any, count: int, first: int, generator: torch.Generator) -> Encoded:
    """Images alternate between two tiles with the whole image, and the whole image alone."""
    whole = [START, TAG, *TILE, START]
    split = [START, TAG + 3, *TILE, START, TAG + 4, *TILE, 3, 3, *whole]
    pieces = _cycle((split, whole), first, count)
    number = sum(piece.count(IMAGE) // len(TILE) for piece in pieces)
    return pieces, _rows_of_tiles(number, config.vision_config.image_size, generator)


# --- tiles of any resolution ------------------------------------------------------------------------------

PINPOINTS = [[32, 64], [64, 32], [64, 64], [32, 96]]
_ANYRES_SIZES = ((50, 40), (24, 70), (90, 30), (60, 64))
"""Original sizes in pixels: tiles 2x2 cut in width, 1x2 cut in height, 2x1, 2x2."""


def _anyres_tiles(size: Size) -> Size:
    """Return rows and columns of the tiles that an image of (height, width) pixels is cut into."""
    height, width = select_best_resolution(size, PINPOINTS)
    return height // 32, width // 32


def _anyres_tokens(size: Size, side: int, max_tiles: int | None = None) -> int:
    """Count as the processors do (``_get_number_of_features``), apart from the code under test."""
    rows, columns = (side * tiles for tiles in _anyres_tiles(size))
    height, width = size
    if width / height > columns / rows:
        rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
    if max_tiles is not None and (ratio := math.sqrt(rows * columns / (max_tiles * side**2))) > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return side * side + rows * columns + rows


def anyres(config: Any, count: int, first: int, generator: torch.Generator) -> Encoded:
    """LLaVA-NeXT and LLaVA-OneVision; the latter does not tile the images of a row that has several."""
    onevision = config.model_type == "llava_onevision"
    sizes = _cycle(_ANYRES_SIZES, first, count)
    if onevision and count > 1:
        pieces, tiles = [[IMAGE] * (4 * 4 + 1)] * count, [1] * count
    else:
        pieces = [[IMAGE] * _anyres_tokens(size, 4, 2 if onevision else None) for size in sizes]
        tiles = [math.prod(_anyres_tiles(size)) + 1 for size in sizes]
    images = [_noise(generator, 1, number, 3, 32, 32) for number in tiles]
    tensors = {
        "pixel_values": join(images) if images else torch.zeros(0, 1, 3, 32, 32),
        "image_sizes": _table(sizes, 2),
    }
    return pieces, {**tensors, "batch_num_images": torch.tensor([count])} if onevision else tensors


def clip(frames: int, tokens: int) -> Encode:
    """Encode videos of square frames of the tower's size."""

    def encode(config: Any, count: int, first: int, generator: torch.Generator) -> Encoded:
        return [[VIDEO] * tokens] * count, {"pixel_values_videos": _noise(generator, count, frames, 3, 32, 32)}

    return encode


# --- images of their own size -----------------------------------------------------------------------------

_PIXTRAL_SIZES = ((24, 32), (40, 24), (32, 32), (16, 48))
"""In pixels, for a step of 8 between tokens."""


def pixtral(config: Any, count: int, first: int, generator: torch.Generator) -> Encoded:
    """Encode images with a break token after each row of patches."""
    step = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    sizes = [tuple(step // 8 * side for side in size) for size in _cycle(_PIXTRAL_SIZES, first, count)]
    pieces, images = [], []
    for height, width in sizes:
        line = [IMAGE] * (width // step)
        pieces.append([*[*line, BREAK] * (height // step - 1), *line, END])
        images.append(_noise(generator, 1, 3, height, width))
    pixel_values = join(images) if images else torch.zeros(0, 3, 1, 1)
    return pieces, {"pixel_values": pixel_values, "image_sizes": _table(sizes, 2)}


def lighton(config: Any, count: int, first: int, generator: torch.Generator) -> Encoded:
    """Encode the images of Pixtral without break tokens."""
    pieces, tensors = pixtral(config, count, first, generator)
    return [[IMAGE] * piece.count(IMAGE) for piece in pieces], tensors


def naflex(config: Any, count: int, first: int, generator: torch.Generator) -> Encoded:
    """Encode patches of images of their own size, padded to the longest, as Siglip 2 takes them."""
    shapes = _cycle(((8, 12), (12, 8), (8, 8), (4, 16)), first, count)
    pieces = [[START, *[IMAGE] * (rows * columns // 4), END] for rows, columns in shapes]
    patch = 3 * config.vision_config.patch_size**2
    images = [_noise(generator, 1, rows * columns, patch) for rows, columns in shapes]
    masks = [torch.ones(1, rows * columns).long() for rows, columns in shapes]
    return pieces, {
        "pixel_values": join(images) if images else torch.zeros(0, 1, patch),
        "spatial_shapes": _table(shapes, 2),
        "pixel_attention_mask": join(masks) if masks else torch.zeros(0, 1).long(),
    }


def gemma4(config: Any, count: int, first: int, generator: torch.Generator) -> Encoded:
    """Encode patches with (x, y) positions, padded to a fixed number; (-1, -1) marks padding."""
    vision, longest = config.vision_config, 64
    pieces, positions = [], torch.full((count, longest, 2), -1)
    for index, (rows, columns) in enumerate(_cycle(((6, 8), (8, 6), (8, 8), (4, 10)), first, count)):
        pieces.append([START, *[IMAGE] * (rows * columns // vision.pooling_kernel_size**2), END])
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        positions[index, : rows * columns] = torch.stack([x.flatten(), y.flatten()], dim=-1)
    patches = torch.rand(count, longest, 3 * vision.patch_size**2, generator=generator)
    valid = (positions != -1).all(dim=-1)
    return pieces, {"pixel_values": patches * valid[..., None], "image_position_ids": positions}


# --- flattened patches with grids -------------------------------------------------------------------------

_GRIDS = ((1, 8, 12), (1, 12, 8), (1, 8, 8), (1, 4, 16))
_VIDEO_GRIDS = ((2, 8, 8), (3, 8, 4), (2, 4, 12))


def _patches(modality: str, piece: Callable[[int, int], Tokens]) -> Encode:
    """Encode images or videos as flattened patches with a ``(frames, height, width)`` grid of patches.

    Parameters
    ----------
    modality : {"image", "video"}
    piece : callable
        Frames and tokens of a frame -> tokens of the image or video.
    """
    grids, suffix = (_GRIDS, "") if modality == "image" else (_VIDEO_GRIDS, "_videos")

    def encode(config: Any, count: int, first: int, generator: torch.Generator) -> Encoded:
        vision = config.vision_config
        used = _cycle(grids, first, count)
        pieces = [piece(frames, height * width // vision.spatial_merge_size**2) for frames, height, width in used]
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = _noise(generator, sum(math.prod(grid) for grid in used), patch)
        return pieces, {f"pixel_values{suffix}": pixels, f"{modality}_grid_thw": _table(used, 3)}

    return encode


def _framed(token: int) -> Callable[[int, int], Tokens]:
    return lambda frames, tokens: [START, *[token] * (frames * tokens), END]


def _timed(frames: int, tokens: int) -> Tokens:
    """Tokens of a video of Qwen3-VL: a timestamp (text) before each frame."""
    return [token for frame in range(frames) for token in (3 + frame, START, *[VIDEO] * tokens, END)]


def _glm_video(frames: int, tokens: int) -> Tokens:
    """Tokens of a video of GLM-4V: frames written with image tokens, each followed by its time."""
    inner = [token for frame in range(frames) for token in (START, *[IMAGE] * tokens, END, 3 + frame)]
    return [VIDEO_START, *inner, VIDEO_END]


image_grids = _patches("image", _framed(IMAGE))
video_grids = _patches("video", _framed(VIDEO))
timed_video_grids = _patches("video", _timed)
glm_video_grids = _patches("video", _glm_video)
