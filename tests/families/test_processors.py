# SPDX-License-Identifier: Apache-2.0
"""Segments against the token counts of the real processors, on real images cut by the real image processors.

The processors need tokenizers, so their methods run on bare objects with the few attributes that they read.
The image processors are those of PIL: the others need torchvision.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from plphp.families.registry import family_of
from tiny_models import NEWEST, PINPOINTS, TINY

SIZES = ((50, 40), (24, 70), (90, 30), (64, 64), (33, 95), (31, 200), (128, 17))
"""(height, width) in pixels."""


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


def load(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{module}"), name)


def bare(module: str, name: str, **attributes: Any) -> Any:
    """Return a processor without tokenizer; "I" is the placeholder."""
    kind = load(f"{module}.processing_{module}", name)
    processor = object.__new__(kind)
    defaults = {
        "image_token": "I",
        "fake_image_token": "F",
        "global_image_tag": "G",
        "global_image_token": "G",
    }
    for key, value in {**defaults, **attributes}.items():
        object.__setattr__(processor, key, value)
    return processor


def compare(name: str, processor: Any, image_inputs: dict[str, Any], images: int, one_each: bool = True) -> None:
    """Compare the placeholders that the processor writes with the segments of its outputs."""
    config = TINY[name].config()
    counts = [processor.replace_image_token(image_inputs, index).count("I") for index in range(images)]
    segments = family_of(config).segments(config, image_inputs)
    assert segments is not None
    sizes = [segment.tokens for segment in segments]
    assert sum(sizes) == sum(counts)
    if one_each:
        assert sizes == counts


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def test_llava() -> None:
    kind = load("llava.image_processing_pil_llava", "LlavaImageProcessorPil")
    images = kind(size={"shortest_edge": 32}, crop_size=square(32))(pictures(), return_tensors="pt")
    clip = bare(
        "llava",
        "LlavaProcessor",
        patch_size=8,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )
    compare("llava", clip, images, len(SIZES))
    siglip = bare(
        "llava",
        "LlavaProcessor",
        patch_size=8,
        num_additional_image_tokens=0,
        vision_feature_select_strategy="full",
    )
    compare("llava-siglip", siglip, images, len(SIZES))


@pytest.mark.parametrize("name", ["llava-next", "llava-next-video"])
def test_llava_next(name: str) -> None:
    cut = load("llava_next.image_processing_pil_llava_next", "LlavaNextImageProcessorPil")(
        size={"shortest_edge": 32}, crop_size=square(32), image_grid_pinpoints=PINPOINTS
    )
    processor = bare(
        name.replace("-", "_"),
        "LlavaNextProcessor" if name == "llava-next" else "LlavaNextVideoProcessor",
        image_processor=cut,
        patch_size=8,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )
    compare(name, processor, cut(pictures(), return_tensors="pt"), len(SIZES))


@pytest.mark.parametrize("several", [False, True])
def test_llava_onevision(several: bool) -> None:
    cut = load("llava_onevision.image_processing_pil_llava_onevision", "LlavaOnevisionImageProcessorPil")(
        size=square(32), image_grid_pinpoints=PINPOINTS
    )
    processor = bare(
        "llava_onevision",
        "LlavaOnevisionProcessor",
        image_processor=cut,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
    )
    nested = [pictures()[:2], *([image] for image in pictures()[2:])] if several else pictures()
    images = cut(nested, return_tensors="pt")
    assert images["batch_num_images"].tolist() == ([2] if several else [1, 1]) + [1] * (len(SIZES) - 2)
    compare("llava-onevision", processor, images, len(SIZES))


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3.5"])
def test_qwen(name: str) -> None:
    cut = load("qwen2_vl.image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil")(
        patch_size=4, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    )
    processor = bare("qwen2_vl", "Qwen2VLProcessor", image_processor=cut)
    compare(name, processor, cut(pictures(), return_tensors="pt"), len(SIZES))


def test_glm4v() -> None:
    cut = load("glm4v.image_processing_pil_glm4v", "Glm4vImageProcessorPil")(
        patch_size=4, size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    )
    processor = bare("glm4v", "Glm4vProcessor", image_processor=cut)
    compare("glm4v", processor, cut(pictures(), return_tensors="pt"), len(SIZES))


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen3-vl", "glm4v"])
def test_videos_of_grids(name: str) -> None:
    grids = torch.tensor([[3, 4, 6], [2, 8, 4]])
    metadata = SimpleNamespace(fps=2.0, frames_indices=list(range(6)), timestamps=[0.5 * i for i in range(6)])
    inputs = {"video_grid_thw": grids, "video_metadata": [metadata] * 2}
    module = {"qwen2-vl": "qwen2_vl", "qwen3-vl": "qwen3_vl", "glm4v": "glm4v"}[name]
    processor = bare(
        module,
        {"qwen2-vl": "Qwen2VLProcessor", "qwen3-vl": "Qwen3VLProcessor", "glm4v": "Glm4vProcessor"}[name],
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        video_token="I",
        vision_start_token="S",
        vision_end_token="E",
    )
    config = TINY[name].config()
    counts = [processor.replace_video_token(inputs, index).count("I") for index in range(2)]
    segments = family_of(config).segments(config, {"video_grid_thw": grids})
    assert segments is not None
    assert [segment.tokens for segment in segments] == counts
    assert [segment.grid for segment in segments] == [(3, 2, 3), (2, 4, 2)]


def test_videos_of_llava() -> None:
    for name, module, kind in (
        ("llava-next-video", "llava_next_video", "LlavaNextVideoProcessor"),
        ("llava-onevision", "llava_onevision", "LlavaOnevisionProcessor"),
    ):
        processor = bare(module, kind, patch_size=8, num_image_tokens=16, video_token="I")
        inputs = {"pixel_values_videos": torch.zeros(2, 3, 3, 32, 32)}
        config = TINY[name].config()
        segments = family_of(config).segments(config, inputs)
        assert segments is not None
        counts = [processor.replace_video_token(inputs, index).count("I") for index in range(2)]
        assert [segment.tokens for segment in segments] == counts


def test_internvl() -> None:
    cut = load("got_ocr2.image_processing_pil_got_ocr2", "GotOcr2ImageProcessorPil")(
        size=square(32), crop_to_patches=True, min_patches=1, max_patches=4
    )
    images = cut(pictures(), return_tensors="pt")
    processor = bare("internvl", "InternVLProcessor", image_seq_length=16, start_image_token="S", end_image_token="E")
    compare("internvl", processor, images, len(SIZES), one_each=False)


@pytest.mark.parametrize("name", ["aya-vision", "cohere2-vision"])
def test_cohere(name: str) -> None:
    cut = load("got_ocr2.image_processing_pil_got_ocr2", "GotOcr2ImageProcessorPil")(
        size=square(32), crop_to_patches=True, min_patches=1, max_patches=4
    )
    images = cut(pictures(), return_tensors="pt")
    if name == "aya-vision":
        tokens = {"img_patch_token": "I", "start_of_img_token": "S", "end_of_img_token": "E"}
        tiles = {"tile_token": "T", "tile_global_token": "G"}
        processor = bare("aya_vision", "AyaVisionProcessor", patch_size=8, img_size=32, **tokens, **tiles)
    else:
        markers = {"boi_token": "S", "eoi_token": "E", "img_line_break_token": "B"}
        processor = bare("cohere2_vision", "Cohere2VisionProcessor", patch_size=4, **markers)
    compare(name, processor, images, len(SIZES), one_each=False)


def test_ovis2() -> None:
    cut = load("ovis2.image_processing_pil_ovis2", "Ovis2ImageProcessorPil")(
        size=square(32), crop_to_patches=True, min_patches=1, max_patches=4
    )
    images = cut(pictures(), return_tensors="pt")
    processor = bare("ovis2", "Ovis2Processor", image_seq_length=16)
    counts = [processor.replace_image_token(images, index).count("<IMG_ATOM>") for index in range(len(SIZES))]
    config = TINY["ovis2"].config()
    segments = family_of(config).segments(config, images)
    assert segments is not None
    assert sum(segment.tokens for segment in segments) == sum(counts)


def test_lighton_ocr() -> None:
    cut = load("pixtral.image_processing_pil_pixtral", "PixtralImageProcessorPil")(
        size={"longest_edge": 96}, patch_size=16
    )
    processor = bare("lighton_ocr", "LightOnOcrProcessor", effective_patch_size=16)
    compare("lighton-ocr", processor, cut(pictures(), return_tensors="pt"), len(SIZES))


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_idefics3(name: str) -> None:
    kind = "Idefics3ImageProcessorPil" if name == "idefics3" else "SmolVLMImageProcessorPil"
    cut = load(f"{name}.image_processing_pil_{name}", kind)(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    nested = [pictures()[:3], pictures()[3:4], pictures()[4:]]
    images = cut(nested, return_tensors="pt", return_row_col_info=True)
    processor = bare(name, "Idefics3Processor" if name == "idefics3" else "SmolVLMProcessor", image_seq_len=16)
    compare(name, processor, images, len(SIZES), one_each=False)


def test_idefics2() -> None:
    cut = load("idefics2.image_processing_pil_idefics2", "Idefics2ImageProcessorPil")(
        size={"shortest_edge": 24, "longest_edge": 32}
    )
    images = cut([pictures()[:3], pictures()[3:4], pictures()[4:]], return_tensors="pt")
    config = TINY["idefics2"].config()
    segments = family_of(config).segments(config, images)
    assert segments is not None
    # the processor writes image_seq_len placeholders per image, its call needs a tokenizer
    assert [segment.tokens for segment in segments] == [12] * len(SIZES)


def test_gemma3() -> None:
    cut = load("gemma3.image_processing_pil_gemma3", "Gemma3ImageProcessorPil")(size=square(32))
    options = {"pan_and_scan_min_crop_size": 16, "pan_and_scan_min_ratio_to_activate": 1.2}
    images = cut(pictures(), return_tensors="pt", do_pan_and_scan=True, pan_and_scan_max_num_crops=3, **options)
    assert max(images["num_crops"]) > 0
    processor = bare("gemma3", "Gemma3Processor", full_image_sequence="S" + "I" * 16 + "E")
    compare("gemma3", processor, images, len(SIZES), one_each=False)


@pytest.mark.parametrize(("name", "patch"), [("llava-pixtral", 8), ("mistral3", 16)])
def test_pixtral(name: str, patch: int) -> None:
    cut = load("pixtral.image_processing_pil_pixtral", "PixtralImageProcessorPil")(
        size={"longest_edge": 96}, patch_size=patch
    )
    images = cut(pictures(), return_tensors="pt")
    config = TINY[name].config()
    segments = family_of(config).segments(config, images)
    assert segments is not None
    # PixtralProcessor.replace_image_token, which cannot be imported without torchvision
    grids = [(1, int(height) // patch, int(width) // patch) for height, width in images["image_sizes"]]
    assert [segment.grid for segment in segments] == grids


@pytest.mark.skipif(not NEWEST, reason="its PIL image processor needs torchvision in 5.17")
def test_gemma4() -> None:
    cut = load("gemma4.image_processing_pil_gemma4", "Gemma4ImageProcessorPil")(
        patch_size=4, pooling_kernel_size=2, max_soft_tokens=70
    )
    images = cut(pictures(), return_tensors="pt")
    processor = bare("gemma4", "Gemma4Processor", boi_token="S", eoi_token="E")
    compare("gemma4", processor, images, len(SIZES))
    config = TINY["gemma4"].config()
    segments = family_of(config).segments(config, images) or []
    for (height, width), segment in zip(SIZES, segments, strict=True):
        _, rows, columns = segment.grid or (0, 0, 0)
        assert (rows > columns) == (height > width)
