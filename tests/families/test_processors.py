# SPDX-License-Identifier: Apache-2.0
"""Segments against the token counts of the real processors, on real images cut by the real image processors.

The processors need tokenizers, so their methods run on bare objects with the few attributes that they read.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from image_processors import SIZES, image_processor, load, pictures
from plphp.families.base import VisionSegment
from plphp.families.registry import family_of
from tiny_models import NEWEST, TINY


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


def segments_of(name: str, inputs: dict[str, Any]) -> list[VisionSegment]:
    config = TINY[name].config()
    segments = family_of(config).segments(config, inputs)
    assert segments is not None
    return segments


def compare(
    name: str, processor: Any, image_inputs: dict[str, Any], by_image: bool = True, placeholder: str = "I"
) -> None:
    """Compare the placeholders that the processor writes with the segments of its outputs.

    Parameters
    ----------
    by_image : bool
        Whether each image is a segment; where images are cut into several, the sums are compared.
    """
    counts = [processor.replace_image_token(image_inputs, index).count(placeholder) for index in range(len(SIZES))]
    sizes = [segment.tokens for segment in segments_of(name, image_inputs)]
    assert sum(sizes) == sum(counts)
    if by_image:
        assert sizes == counts


@pytest.mark.parametrize(("name", "cls_tokens", "strategy"), [("llava", 1, "default"), ("llava-siglip", 0, "full")])
def test_llava(name: str, cls_tokens: int, strategy: str) -> None:
    images = image_processor("llava")(pictures(), return_tensors="pt")
    options = {"num_additional_image_tokens": cls_tokens, "vision_feature_select_strategy": strategy}
    compare(name, bare("llava", "LlavaProcessor", patch_size=8, **options), images)


@pytest.mark.parametrize("name", ["llava-next", "llava-next-video"])
def test_llava_next(name: str) -> None:
    cut = image_processor("llava-next")
    processor = bare(
        name.replace("-", "_"),
        "LlavaNextProcessor" if name == "llava-next" else "LlavaNextVideoProcessor",
        image_processor=cut,
        patch_size=8,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )
    compare(name, processor, cut(pictures(), return_tensors="pt"))


@pytest.mark.parametrize("several", [False, True])
def test_llava_onevision(several: bool) -> None:
    cut = image_processor("llava-onevision")
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
    compare("llava-onevision", processor, images)


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3.5"])
def test_qwen(name: str) -> None:
    cut = image_processor("qwen2-vl")
    compare(name, bare("qwen2_vl", "Qwen2VLProcessor", image_processor=cut), cut(pictures(), return_tensors="pt"))


def test_glm4v() -> None:
    cut = image_processor("glm4v")
    compare("glm4v", bare("glm4v", "Glm4vProcessor", image_processor=cut), cut(pictures(), return_tensors="pt"))


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
    counts = [processor.replace_video_token(inputs, index).count("I") for index in range(2)]
    segments = segments_of(name, {"video_grid_thw": grids})
    assert [segment.tokens for segment in segments] == counts
    assert [segment.grid for segment in segments] == [(3, 2, 3), (2, 4, 2)]


@pytest.mark.parametrize(
    ("name", "prefix"), [("llava-next-video", "LlavaNextVideo"), ("llava-onevision", "LlavaOnevision")]
)
def test_videos_of_llava(name: str, prefix: str) -> None:
    processor = bare(name.replace("-", "_"), f"{prefix}Processor", patch_size=8, num_image_tokens=16, video_token="I")
    inputs = {"pixel_values_videos": torch.zeros(2, 3, 3, 32, 32)}
    counts = [processor.replace_video_token(inputs, index).count("I") for index in range(2)]
    assert [segment.tokens for segment in segments_of(name, inputs)] == counts


def test_internvl() -> None:
    images = image_processor("internvl")(pictures(), return_tensors="pt")
    processor = bare("internvl", "InternVLProcessor", image_seq_length=16, start_image_token="S", end_image_token="E")
    compare("internvl", processor, images, by_image=False)


def test_aya_vision() -> None:
    images = image_processor("internvl")(pictures(), return_tensors="pt")
    markers = {"start_of_img_token": "S", "end_of_img_token": "E", "tile_token": "T", "tile_global_token": "G"}
    processor = bare("aya_vision", "AyaVisionProcessor", patch_size=8, img_size=32, img_patch_token="I", **markers)
    compare("aya-vision", processor, images, by_image=False)


def test_cohere2_vision() -> None:
    images = image_processor("internvl")(pictures(), return_tensors="pt")
    markers = {"boi_token": "S", "eoi_token": "E", "img_line_break_token": "B"}
    processor = bare("cohere2_vision", "Cohere2VisionProcessor", patch_size=4, **markers)
    compare("cohere2-vision", processor, images, by_image=False)


def test_ovis2() -> None:
    images = image_processor("ovis2")(pictures(), return_tensors="pt")
    processor = bare("ovis2", "Ovis2Processor", image_seq_length=16)
    compare("ovis2", processor, images, by_image=False, placeholder="<IMG_ATOM>")


def test_lighton_ocr() -> None:
    processor = bare("lighton_ocr", "LightOnOcrProcessor", effective_patch_size=16)
    compare("lighton-ocr", processor, image_processor("mistral3")(pictures(), return_tensors="pt"))


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_idefics3(name: str) -> None:
    nested = [pictures()[:3], pictures()[3:4], pictures()[4:]]
    images = image_processor(name)(nested, return_tensors="pt", return_row_col_info=True)
    processor = bare(name, "Idefics3Processor" if name == "idefics3" else "SmolVLMProcessor", image_seq_len=16)
    compare(name, processor, images, by_image=False)


def test_idefics2() -> None:
    nested = [pictures()[:3], pictures()[3:4], pictures()[4:]]
    images = image_processor("idefics2")(nested, return_tensors="pt")
    # the processor writes image_seq_len placeholders per image, its call needs a tokenizer
    assert [segment.tokens for segment in segments_of("idefics2", images)] == [12] * len(SIZES)


def test_gemma3() -> None:
    options = {"pan_and_scan_min_crop_size": 16, "pan_and_scan_min_ratio_to_activate": 1.2}
    images = image_processor("gemma3")(
        pictures(), return_tensors="pt", do_pan_and_scan=True, pan_and_scan_max_num_crops=3, **options
    )
    assert max(images["num_crops"]) > 0
    processor = bare("gemma3", "Gemma3Processor", full_image_sequence="S" + "I" * 16 + "E")
    compare("gemma3", processor, images, by_image=False)


@pytest.mark.parametrize(("name", "patch"), [("llava-pixtral", 8), ("mistral3", 16)])
def test_pixtral(name: str, patch: int) -> None:
    images = image_processor(name)(pictures(), return_tensors="pt")
    # PixtralProcessor.replace_image_token, which cannot be imported without torchvision
    grids = [(1, int(height) // patch, int(width) // patch) for height, width in images["image_sizes"]]
    assert [segment.grid for segment in segments_of(name, images)] == grids


@pytest.mark.skipif(not NEWEST, reason="its PIL image processor needs torchvision in 5.17")
def test_gemma4() -> None:
    images = image_processor("gemma4")(pictures(), return_tensors="pt")
    compare("gemma4", bare("gemma4", "Gemma4Processor", boi_token="S", eoi_token="E"), images)
    for (height, width), segment in zip(SIZES, segments_of("gemma4", images), strict=True):
        _, rows, columns = segment.grid or (0, 0, 0)
        assert (rows > columns) == (height > width)
