# SPDX-License-Identifier: Apache-2.0
"""From a prompt or a chat to the inputs of ``generate``, with the processor's chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any

from PIL import Image
from transformers import PretrainedConfig

from plphp.errors import ConfigError, PLPHPError, SpanError, UnsupportedFeatureError
from plphp.families.registry import family_of
from plphp.families.spans import find_spans
from plphp.io.quoting import one_line, quoted

from .chat import Messages, normalized, parts_of
from .media import load_image, load_video


def build_inputs(
    processor: Any,
    prompt: str | None = None,
    *,
    messages: Messages | None = None,
    images: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    system: str | None = None,
    frames: int = 8,
    allow_urls: bool = False,
) -> dict[str, Any]:
    """Make the inputs of ``generate`` from a prompt or a chat, with the processor's chat template.

    Parameters
    ----------
    processor : ProcessorMixin
        Of the model.
    prompt : str, optional
        One user turn. The images come first, unless it says itself where they stand with the processor's
        image token, such as ``"<image>"``.
    messages : sequence of mapping, optional
        A chat in the place of ``prompt``, see `plphp.inputs.chat.normalized`; its image and video entries that name
        none take ``images`` and ``videos`` in order.
    images : sequence
        Images, or what `plphp.inputs.media.load_image` makes them of.
    videos : sequence
        Frames of each video, or what `plphp.inputs.media.load_video` reads.
    system : str, optional
        System message.
    frames : int
        Frames to take at most of a video that is read from a file.
    allow_urls : bool
        Whether http and https addresses of images are fetched.

    Returns
    -------
    dict
        ``input_ids`` and ``attention_mask`` [1, seq], and the image features.

    Raises
    ------
    SpanError
        If the prompt has no image slot, or not one for each image.
    ConfigError
        If the prompt or the chat is not usable.
    LoadError
        If an image or a video cannot be read.
    UnsupportedFeatureError
        If videos are given and the processor takes none.
    """
    if (prompt is None) == (messages is None):
        raise ConfigError("Give either a prompt or a chat.")
    if prompt is not None and not prompt.strip():
        raise ConfigError(f"The prompt is empty, got {prompt!r}: write what is asked about the image.")
    chat = None if messages is None else normalized(messages)
    if (videos or any(parts_of(chat or (), "video"))) and getattr(processor, "video_processor", None) is None:
        raise UnsupportedFeatureError(f"{type(processor).__name__} takes no videos: give some of its frames as images.")
    read_image = partial(load_image, allow_urls=allow_urls)
    read_video = partial(load_video, frames=frames, allow_urls=allow_urls)
    images, videos = _all(images, "images", read_image), _all(videos, "videos", read_video)
    if chat is None:
        chat = [_user_turn(processor, prompt or "", len(images), len(videos))]
    else:
        images = _filled(chat, "image", images, read_image)
        videos = _filled(chat, "video", videos, read_video)
    if not any(part["text"].strip() for _, part in parts_of(chat, "text")):
        raise ConfigError("The chat has no text: write what is asked about the image.")
    if system is not None:
        if chat and chat[0]["role"] == "system":
            raise ConfigError("The chat has a system message already: leave out the other one.")
        chat = [{"role": "system", "content": [{"type": "text", "text": system}]}, *chat]
    text = _rendered(processor, chat)
    _check_slots(_slots(processor, "image", text), len(images), "image")
    _check_slots(_slots(processor, "video", text), len(videos), "video")
    if not images and not videos:
        raise SpanError(
            "The prompt has no image slot, so there is nothing to prune: give an image with it, or an image "
            "entry in the chat."
        )
    bos = getattr(processor.tokenizer, "bos_token", None)
    options = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
    # Idefics asks for one list of images per prompt, and the others take it too.
    features = {"images": [images] if images else None, "videos": videos or None}
    inputs = processor(
        text=[text], return_tensors="pt", **{k: v for k, v in features.items() if v is not None}, **options
    )
    return dict(inputs)


def count_vision_tokens(config: PretrainedConfig, inputs: Mapping[str, Any]) -> int:
    """Vision tokens of the inputs of a prompt, under a model's config.

    Raises
    ------
    SpanError
        If they cannot be found.
    UnsupportedModelError
        If the model is of no known family.
    """
    return int(find_spans(family_of(config), config, inputs).vision.sum())


def _filled(messages: list[dict[str, Any]], kind: str, given: list[Any], load: Callable[[Any], Any]) -> list[Any]:
    """Images or videos of a chat in prompt order: those it names, and the given ones for the entries that name none."""
    left, result = list(given), []
    for place, part in parts_of(messages, kind):
        if kind not in part and not left:
            raise SpanError(f"The chat has more {kind} entries without a path than the {len(given)} {kind}s given.")
        try:
            # the template is to see the place alone
            result.append(load(part.pop(kind)) if kind in part else left.pop(0))
        except PLPHPError as error:
            raise type(error)(f"{place}: {error}") from error
    if left:
        raise SpanError(
            f"The chat has no {kind} slot for {len(left)} of the {len(given)} {kind}s: add an entry "
            f'{{"type": "{kind}"}} for each.'
        )
    return result


def _all(sources: Any, name: str, load: Callable[[Any], Any]) -> list[Any]:
    if isinstance(sources, (str, bytes, PathLike, Mapping, Image.Image)) or not isinstance(sources, Iterable):
        raise ConfigError(f"{name} must be a list, got {quoted(sources)} ({type(sources).__name__}).")
    return [load(source) for source in sources]


def _user_turn(processor: Any, prompt: str, images: int, videos: int) -> dict[str, Any]:
    placed = {kind: _slots(processor, kind, prompt) > 0 for kind in ("image", "video")}
    parts = [{"type": "image"}] * (0 if placed["image"] else images)
    parts += [{"type": "video"}] * (0 if placed["video"] else videos)
    return {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}


def _rendered(processor: Any, chat: list[dict[str, Any]]) -> str:
    if getattr(processor, "chat_template", None) is None:
        texts = [part["text"] for message in chat for part in message["content"] if part["type"] == "text"]
        if len(chat) > 1:
            raise ConfigError(
                f"{type(processor).__name__} has no chat template: give one prompt, with its image tokens."
            )
        return "".join(texts)
    try:
        text: str = processor.apply_chat_template(chat, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like
        raise ConfigError(f"The model's chat template refuses this chat: {one_line(error)}") from error
    return text


def _slots(processor: Any, kind: str, text: str) -> int:
    """Count the places of images or videos in a prompt; Gemma 3 marks them by the begin token."""
    tokens = (
        getattr(processor, f"{kind}_token", None),
        getattr(processor, "boi_token", None) if kind == "image" else None,
    )
    return max(text.count(str(token)) if token else 0 for token in tokens)


def _check_slots(slots: int, given: int, kind: str) -> None:
    if slots == given:
        return
    if slots == 0:
        raise SpanError(f"The prompt has no {kind} slot for the {given} {kind}(s) given.")
    raise SpanError(f"The prompt has {slots} {kind} slot(s), but {given} {kind}(s) are given.")
