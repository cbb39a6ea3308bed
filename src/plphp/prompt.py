# SPDX-License-Identifier: Apache-2.0
"""From a prompt or a chat to the inputs of ``generate``, with the processor's chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PretrainedConfig

from .errors import ConfigError, LoadError, SpanError, UnsupportedFeatureError, one_line
from .media import load_image
from .registry import family_of
from .spans import find_spans

Messages = Sequence[Mapping[str, Any]]


def read_chat(path: str | Path) -> list[dict[str, Any]]:
    """Read a chat from a JSON file: a list of ``{"role": ..., "content": ...}`` as in transformers.

    Image entries are ``{"type": "image", "path": ...}``; a relative path starts at the folder of the file.

    Raises
    ------
    LoadError
        If it cannot be read or is not a chat.
    """
    path = Path(path)
    try:
        messages = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(f"Cannot read the chat {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise LoadError(f"The chat {path} is not JSON: {error}.") from error
    if not isinstance(messages, list):
        raise LoadError(f"The chat {path} must be a list of messages, got a {type(messages).__name__}.")
    return chat_in(path.parent, messages)


def chat_in(folder: Path, messages: Messages) -> list[dict[str, Any]]:
    """Copy a chat, with the relative paths of its images from ``folder``.

    Raises
    ------
    ConfigError
        If it is not a chat.
    """
    chat = _normalized(messages)
    for part in _parts(chat):
        if "path" in part:
            part["path"] = str(folder / part["path"])
    return chat


def build_inputs(
    processor: Any,
    prompt: str | None = None,
    *,
    messages: Messages | None = None,
    images: Sequence[Image.Image] = (),
    videos: Sequence[Sequence[Image.Image]] = (),
    system: str | None = None,
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
        A chat in the place of ``prompt``; image entries with a "path" are read, those without one take
        ``images`` in order.
    images : sequence of Image
        See `load_image`.
    videos : sequence of sequence of Image
        Frames of each video, see `load_video`.
    system : str, optional
        System message.

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
    UnsupportedFeatureError
        If videos are given and the processor takes none.
    """
    if (prompt is None) == (messages is None):
        raise ConfigError("Give either a prompt or a chat.")
    if prompt is not None and not prompt.strip():
        raise ConfigError(f"The prompt is empty, got {prompt!r}: write what is asked about the image.")
    if videos and getattr(processor, "video_processor", None) is None:
        raise UnsupportedFeatureError(f"{type(processor).__name__} takes no videos: give some of its frames as images.")
    if messages is None:
        chat, images = [_user_turn(processor, prompt or "", len(images), len(videos))], list(images)
    else:
        chat, images = _with_images(_normalized(messages), images)
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
    features = {"images": [images] if images else None, "videos": [list(v) for v in videos] or None}
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


def _normalized(messages: Messages) -> list[dict[str, Any]]:
    """Copy a chat with the content of every message as a list of parts."""
    result = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigError(f'Message {number} of the chat must be {{"role": ..., "content": ...}}, got {message!r}.')
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(isinstance(part, Mapping) and "type" in part for part in parts):
            raise ConfigError(
                f'The content of message {number} of the chat must be text or a list of {{"type": ...}} '
                f"entries, got {content!r}."
            )
        for part in parts:
            if part["type"] == "image" and not isinstance(part.get("path", ""), str):
                raise ConfigError(f"The path of an image in message {number} of the chat must be text, got {part!r}.")
        result.append({**message, "content": [dict(part) for part in parts]})
    return result


def _parts(messages: Messages) -> Iterator[dict[str, Any]]:
    for message in messages:
        yield from (part for part in message["content"] if part["type"] == "image")


def _with_images(
    messages: list[dict[str, Any]], given: Sequence[Image.Image]
) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """Images of a chat in prompt order: those it names, and the given ones for the entries that name none."""
    left, images = list(given), []
    for part in _parts(messages):
        source = next((part.pop(key) for key in ("path", "image", "url") if key in part), None)
        if source is None and not left:
            raise SpanError(f"The chat has more image entries without a path than the {len(given)} images given.")
        source = left.pop(0) if source is None else source
        images.append(source if isinstance(source, Image.Image) else load_image(source))
    if left:
        raise SpanError(
            f"The chat has no image slot for {len(left)} of the {len(given)} images: add an entry "
            '{"type": "image"} for each.'
        )
    return messages, images


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
