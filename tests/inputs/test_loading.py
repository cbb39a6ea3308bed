# SPDX-License-Identifier: Apache-2.0
"""Models, images, videos and prompts from files; what is wrong with those that cannot be read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

import tiny_hub
from plphp import (
    BackendUnavailableError,
    ConfigError,
    PLPHPError,
    SpanError,
    UnsupportedFeatureError,
    UnsupportedModelError,
)
from plphp.errors import LoadError
from plphp.inputs.loading import load_model, load_processor, load_weights
from plphp.inputs.media import load_image, load_video
from plphp.inputs.prompt import build_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hub.save(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return load_processor(folder)


PICTURE = Image.new("RGB", (40, 30), "red")


class TestModels:
    def test_a_folder_as_saved(self, folder: Path) -> None:
        model, processor = load_model(folder, dtype="bfloat16", device="cpu")
        assert (model.dtype, model.training, model.device.type) == (torch.bfloat16, False, "cpu")
        assert type(processor).__name__ == "LlavaProcessor"

    def test_unsupported_before_any_weights(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("plphp.inputs.loading.AutoModelForImageTextToText", None)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_6_vl"}))
        with pytest.raises(UnsupportedModelError, match="Did you mean 'qwen2_5_vl'"):
            load_weights(tmp_path)

    def test_missing_weights_are_not_made_up(self, folder: Path, tmp_path: Path) -> None:
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        weights = load_file(tmp_path / "model.safetensors")
        name = next(name for name in weights if "q_proj" in name)
        save_file({k: v for k, v in weights.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(LoadError, match="incomplete: 1 missing"):
            load_model(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(b"broken")
        with pytest.raises(LoadError, match="Cannot load the model"):
            load_model(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(LoadError, match="Cannot load the model"):
            load_model(tmp_path)

    @pytest.mark.parametrize(
        ("cause", "part"),
        [
            (GatedRepoError, "access to it is restricted"),
            (RepositoryNotFoundError, "no such model on the hub"),
            (LocalEntryNotFoundError, "the hub cannot be reached"),
        ],
    )
    def test_what_the_hub_says(self, monkeypatch: pytest.MonkeyPatch, cause: type, part: str) -> None:
        def refuse(*_: Any) -> None:
            raise OSError("several\nlines") from cause.__new__(cause)

        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "config.json")
        monkeypatch.setattr("plphp.inputs.loading.PretrainedConfig.get_config_dict", refuse)
        with pytest.raises(LoadError, match=part):
            load_model("org/model")

    def test_a_missing_package_is_named(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any) -> None:
            raise ImportError("XVideoProcessor requires the Torchvision library")

        monkeypatch.setattr("plphp.inputs.loading.AutoProcessor.from_pretrained", refuse)
        with pytest.raises(BackendUnavailableError, match="requires the Torchvision library"):
            load_processor(folder)

    @pytest.mark.parametrize("device", ["cuda", "cuda:7", "nowhere"])
    def test_devices(self, folder: Path, device: str) -> None:
        if device == "cuda" and torch.cuda.is_available():
            pytest.skip("this machine has a CUDA device")
        with pytest.raises(BackendUnavailableError, match=device):
            load_weights(folder, device=device)

    def test_dtypes(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="dtype must be one of"):
            load_weights(folder, dtype="int8")

    def test_no_model_type(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(LoadError, match="no model_type"):
            load_model(tmp_path)
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(LoadError, match="Cannot load the model"):
            load_model(tmp_path)


def _values(mode: str) -> Image.Image:
    """A ramp from black to white in any mode."""
    ramp = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)
    if mode == "I;16":
        return Image.fromarray(ramp.astype(np.uint16) * 257)
    if mode == "P":
        return Image.fromarray(ramp).quantize()
    return Image.fromarray(ramp).convert("RGB").convert(mode)


class TestImages:
    @pytest.mark.parametrize(
        ("mode", "suffix"),
        [("RGB", "png"), ("L", "png"), ("I;16", "png"), ("I;16", "tiff"), ("P", "gif"), ("CMYK", "tiff"),
         ("RGBA", "png"), ("LA", "png"), ("RGB", "webp"), ("RGB", "bmp"), ("CMYK", "jpg"), ("1", "png")],
    )  # fmt: skip
    def test_every_mode_keeps_its_brightness(self, tmp_path: Path, mode: str, suffix: str) -> None:
        path = tmp_path / f"ramp.{suffix}"
        _values(mode).save(path)
        image = load_image(path)
        assert (image.mode, image.size) == ("RGB", (8, 8))
        expected = np.asarray(_values("1").convert("RGB") if mode == "1" else _values("RGB"), dtype=int)
        assert np.abs(np.asarray(image, dtype=int) - expected).max() <= 12

    def test_transparency_becomes_white(self, tmp_path: Path) -> None:
        Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
        palette = Image.new("P", (4, 4), 0)
        palette.save(tmp_path / "palette.png", transparency=0)
        assert load_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
        assert load_image(tmp_path / "palette.png").getpixel((0, 0)) == (255, 255, 255)

    def test_orientation(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        image = Image.new("RGB", (8, 4), "blue")
        image.paste("red", (0, 0, 2, 4))
        image.save(tmp_path / "turned.png", exif=exif)
        upright = load_image(tmp_path / "turned.png")
        assert upright.size == (4, 8)
        assert upright.getpixel((0, 0)) == ImageOps.exif_transpose(Image.open(tmp_path / "turned.png")).getpixel((0, 0))

    def test_first_frame(self, tmp_path: Path) -> None:
        _animation(tmp_path / "a.gif")
        assert load_image(tmp_path / "a.gif").getpixel((0, 0)) == (0, 0, 0)

    def test_floating_point(self, tmp_path: Path) -> None:
        Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tiff")
        with pytest.raises(LoadError, match="floating-point"):
            load_image(tmp_path / "f.tiff")

    def test_limit(self, tmp_path: Path) -> None:
        path = tiny_hub.picture(tmp_path / "a.png", (11, 10))
        load_image(path, max_pixels=110)
        with pytest.raises(LoadError, match="11 x 10 pixels, more than 109"):
            load_image(path, max_pixels=109)

    def test_truncated_jpeg(self, tmp_path: Path) -> None:
        path = tiny_hub.picture(tmp_path / "a.jpg", (200, 200))
        path.write_bytes(path.read_bytes()[:3000])
        with pytest.raises(LoadError, match="is broken"):
            load_image(path)


def _animation(path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), (20 * index,) * 3) for index in range(10)]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)


class TestVideos:
    @pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
    def test_animations(self, tmp_path: Path, suffix: str) -> None:
        _animation(tmp_path / f"a.{suffix}")
        frames = load_video(tmp_path / f"a.{suffix}", frames=5)
        assert [frame.getpixel((0, 0))[0] // 20 for frame in frames] == [1, 3, 5, 7, 9]
        assert len(load_video(tmp_path / f"a.{suffix}", frames=20)) == 10

    def test_a_folder_of_frames(self, tmp_path: Path) -> None:
        for index in (2, 0, 1):
            Image.new("RGB", (4, 4), (index,) * 3).save(tmp_path / f"{index}.png")
        (tmp_path / "notes.txt").write_text("no frame")
        assert [frame.getpixel((0, 0))[0] for frame in load_video(tmp_path)] == [0, 1, 2]

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(LoadError, match="holds no images"):
            load_video(tmp_path)

    def test_a_video_file_without_a_decoder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "av", None)
        (tmp_path / "film.mp4").write_bytes(b"film")
        with pytest.raises(BackendUnavailableError, match="pip install av"):
            load_video(tmp_path / "film.mp4")

    def test_a_video_file(self, tmp_path: Path) -> None:
        av = pytest.importorskip("av")
        with av.open(str(tmp_path / "film.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width = stream.height = 32
            for index in range(10):
                frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), (20 * index,) * 3))
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        frames = load_video(tmp_path / "film.mp4", frames=5)
        assert [round(frame.getpixel((0, 0))[0] / 20) for frame in frames] == [1, 3, 5, 7, 9]
        (tmp_path / "film.mp4").write_bytes(b"film")
        with pytest.raises(LoadError, match="Cannot read the video"):
            load_video(tmp_path / "film.mp4")


class TestPrompts:
    def test_a_prompt_is_what_the_chat_template_makes(self, processor: Any) -> None:
        inputs = build_inputs(processor, "What?", images=[PICTURE, PICTURE], system="short")
        content = [{"type": "image", "image": PICTURE}, {"type": "image", "image": PICTURE}]
        expected = processor.apply_chat_template(
            [
                {"role": "system", "content": [{"type": "text", "text": "short"}]},
                {"role": "user", "content": [*content, {"type": "text", "text": "What?"}]},
            ],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert set(inputs) == set(expected)
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
        assert (inputs["input_ids"] == processor.tokenizer.bos_token_id).sum() == 1

    def test_a_prompt_may_place_its_images(self, processor: Any) -> None:
        text = processor.decode(build_inputs(processor, "a<image>b", images=[PICTURE])["input_ids"][0])
        assert "a<image><image>" in text
        assert "<image>b" in text

    def test_a_chat_takes_open_slots_in_order(self, processor: Any, tmp_path: Path) -> None:
        named = tiny_hub.picture(tmp_path / "a.png")
        asked = {"type": "text", "text": "a"}
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "image", "path": str(named)}, asked]}]
        kept = json.dumps(messages)
        inputs = build_inputs(processor, messages=messages, images=[PICTURE])
        swapped = build_inputs(processor, messages=[{"role": "user", "content": [{"type": "image"}] * 2 + [asked]}],
                               images=[PICTURE, load_image(named)])  # fmt: skip
        assert torch.equal(inputs["pixel_values"], swapped["pixel_values"])
        assert json.dumps(messages) == kept

    @pytest.mark.parametrize(
        ("make", "expected", "part"),
        [
            (lambda p: build_inputs(p, "a"), SpanError, "no image slot, so there is nothing to prune"),
            (lambda p: build_inputs(p, "<image>", images=[PICTURE] * 2), SpanError, "1 image slot"),
            (lambda p: build_inputs(p, "<image>"), SpanError, "1 image slot.*0 image"),
            (lambda p: build_inputs(p, messages=_chat("a"), images=[PICTURE]), SpanError, "no image slot for 1"),
            (lambda p: build_inputs(p, messages=_chat([{"type": "image"}])), SpanError, "more image entries"),
            (lambda p: build_inputs(p, "", images=[PICTURE]), ConfigError, "The prompt is empty, got ''"),
            (lambda p: build_inputs(p, " \n", images=[PICTURE]), ConfigError, "The prompt is empty"),
            (lambda p: build_inputs(p), ConfigError, "either a prompt or a chat"),
            (lambda p: build_inputs(p, "a", messages=[]), ConfigError, "either a prompt or a chat"),
            (lambda p: build_inputs(p, messages=[{"role": 1}]), ConfigError, "Message 1"),
            (lambda p: build_inputs(p, messages=_chat(["a"])), ConfigError, "content of message 1"),
            (lambda p: build_inputs(p, "a", videos=[[PICTURE]]), UnsupportedFeatureError, "takes no videos"),
            (
                lambda p: build_inputs(p, messages=[{"role": "system", "content": "a"}], system="b"),
                ConfigError,
                "system message already",
            ),
        ],
    )
    def test_refusals(self, processor: Any, make: Callable[[Any], Any], expected: type, part: str) -> None:
        with pytest.raises(expected, match=part) as caught:
            make(processor)
        assert isinstance(caught.value, PLPHPError)

    def test_without_a_chat_template(self) -> None:
        bare = tiny_hub.processor(chat_template=None)
        inputs = build_inputs(bare, "<image>What?", images=[PICTURE])
        assert (inputs["input_ids"] == bare.image_token_id).sum() == tiny_hub.IMAGE_TOKENS
        with pytest.raises(SpanError, match="no image slot for the 1"):
            build_inputs(bare, "What?", images=[PICTURE])
        with pytest.raises(ConfigError, match="has no chat template"):
            build_inputs(bare, "<image>What?", images=[PICTURE], system="short")

    def test_a_template_that_refuses(self) -> None:
        strict = tiny_hub.processor(chat_template="{{ raise_exception('roles must alternate') }}")
        with pytest.raises(ConfigError, match="roles must alternate"):
            build_inputs(strict, "a", images=[PICTURE])


def _chat(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]
