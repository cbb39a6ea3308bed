# SPDX-License-Identifier: Apache-2.0
"""From a prompt or a chat to the inputs of ``generate``, with the processor's chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from plphp.errors import ConfigError, PLPHPError, SpanError, UnsupportedFeatureError
from plphp.families.registry import family_of
from plphp.families.spans import find_spans
from plphp.io.quoting import one_line, quoted

from .chat import KINDS, Messages, normalized, parts_of
from .media import load_image, load_video

Media = dict[str, list[Any]]
"""Images and videos of a prompt, in its order, under the kinds of `plphp.inputs.chat.KINDS`."""


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
    text_alone: bool = False,
) -> dict[str, Any]:
    """Make the inputs of ``generate`` from a prompt or a chat, with the processor's chat template.

    Parameters
    ----------
    processor : ProcessorMixin
        Processor of the model.
    prompt : str, optional
        A single user turn; images come first, unless the processor's image token, such as ``"<image>"``, is in it.
    messages : sequence of mapping, optional
        A chat in the place of ``prompt``, see `plphp.inputs.chat.normalized`; its image and video entries without a
        source take ``images`` and ``videos`` in order.
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
    text_alone : bool
        Whether a prompt without images and videos is taken too, in which nothing can be pruned.

    Returns
    -------
    dict
        ``input_ids`` and ``attention_mask`` [1, seq], and the image features.

    Raises
    ------
    SpanError
        If the prompt has no image slot, or their number is not that of the images.
    ConfigError
        If the prompt or the chat is not usable.
    LoadError
        If an image or a video cannot be read.
    UnsupportedFeatureError
        If there are videos and the processor takes none.
    """
    sources = {"image": images, "video": videos}
    chat, media = _chat_and_media(processor, prompt, messages, sources, readers_of(frames, allow_urls))
    text = rendered(processor, with_system(chat, system))
    check_slots(processor, text, media, text_alone)
    return processed(processor, [text], [media])


def build_batch(
    processor: Any, chats: Sequence[Messages], *, frames: int = 8, allow_urls: bool = False
) -> dict[str, Any]:
    """Make the inputs of ``generate`` for several chats, each a row that is padded on the left.

    Parameters
    ----------
    processor : ProcessorMixin
        Processor of the model.
    chats : sequence of sequence of mapping
        A chat or more, see `plphp.inputs.chat.normalized`; every image and video entry names its source. Either all of
        them have images and all have videos, or none has: processors know no row without images beside rows with some.
    frames, allow_urls
        See `build_inputs`.

    Returns
    -------
    dict
        ``input_ids`` and ``attention_mask`` [batch, seq], and the image features, if there are images.

    Raises
    ------
    SpanError
        If the slots of a chat are not as many as its images.
    ConfigError, LoadError, UnsupportedFeatureError
        See `build_inputs`.
    """
    readers, nothing = readers_of(frames, allow_urls), dict.fromkeys(KINDS, ())
    texts, media = [], []
    for messages in chats:
        chat, own = _chat_and_media(processor, None, messages, nothing, readers)
        texts.append(rendered(processor, with_system(chat, None)))
        check_slots(processor, texts[-1], own, text_alone=True)
        media.append(own)
    return processed(processor, texts, media)


def media_inputs(processor: Any, images: Sequence[Image.Image]) -> dict[str, Any]:
    """What a processor makes of images in one prompt, and of a text with nothing else but their slots.

    Raises
    ------
    PLPHPError
        As `build_inputs`.
    """
    text = "?"
    if getattr(processor, "chat_template", None) is None:  # nothing else puts the images into the prompt
        text = f"{getattr(processor, 'image_token', '') * len(images)}{text}"
    return build_inputs(processor, text, images=images)


def count_vision_tokens(config: PretrainedConfig, inputs: Mapping[str, Any]) -> int:
    """Count the vision tokens in the inputs of a prompt, under a model's config.

    Raises
    ------
    SpanError
        If it cannot be said which tokens are vision tokens.
    UnsupportedModelError
        If the model is of no known family.
    """
    return int(find_spans(family_of(config), config, inputs).vision.sum())


def on_device(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a prompt with their tensors on a model's device."""
    return {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _chat_and_media(
    processor: Any,
    prompt: str | None,
    messages: Messages | None,
    sources: Mapping[str, Any],
    readers: Mapping[str, Callable[[Any], Any]],
) -> tuple[list[dict[str, Any]], Media]:
    """A prompt or a chat as messages with slots, and what goes into the slots."""
    chat = _checked_chat(prompt, messages)
    _check_takes_videos(processor, sources["video"], chat)
    media = {kind: _read(sources[kind], f"{kind}s", readers[kind]) for kind in KINDS}
    if chat is None:
        return [_user_turn(processor, prompt or "", media)], media
    return chat, {kind: filled(chat, kind, media[kind], readers[kind]) for kind in KINDS}


def _checked_chat(prompt: str | None, messages: Messages | None) -> list[dict[str, Any]] | None:
    """The chat in its normalized form, or None for a prompt, after a check that it is not empty."""
    if (prompt is None) == (messages is None):
        raise ConfigError("Give either a prompt or a chat.")
    if prompt is not None and not prompt.strip():
        raise ConfigError(f"The prompt is empty, got {prompt!r}: write what is asked about the image.")
    return None if messages is None else normalized(messages)


def _check_takes_videos(processor: Any, videos: Sequence[Any], chat: list[dict[str, Any]] | None) -> None:
    if (videos or any(parts_of(chat or (), "video"))) and getattr(processor, "video_processor", None) is None:
        raise UnsupportedFeatureError(f"{type(processor).__name__} takes no videos: give some of its frames as images.")


def readers_of(frames: int, allow_urls: bool) -> dict[str, Callable[[Any], Any]]:
    """By kind, the function that reads an image or a video from its source."""
    return {
        "image": partial(load_image, allow_urls=allow_urls),
        "video": partial(load_video, frames=frames, allow_urls=allow_urls),
    }


def _read(sources: Any, name: str, reader: Callable[[Any], Any]) -> list[Any]:
    # A text or a single image can be iterated over, too, and its letters or pixels are not meant.
    if isinstance(sources, (str, bytes, PathLike, Mapping, Image.Image)) or not isinstance(sources, Iterable):
        raise ConfigError(f"{name} must be a list, got {quoted(sources)} ({type(sources).__name__}).")
    return [reader(source) for source in sources]


def filled(chat: list[dict[str, Any]], kind: str, unplaced: list[Any], reader: Callable[[Any], Any]) -> list[Any]:
    """Images or videos of a chat in prompt order: those that entries name, and unplaced media where they do not.

    The entries of the chat lose their sources, as the template is to see the slots alone.
    """
    left, result = list(unplaced), []
    for origin, part in parts_of(chat, kind):
        if kind not in part and not left:
            raise SpanError(f"The chat has more {kind} entries without a path than the {len(unplaced)} {kind}s given.")
        try:
            result.append(reader(part.pop(kind)) if kind in part else left.pop(0))
        except PLPHPError as error:
            raise type(error)(f"{origin}: {error}") from error
    if left:
        raise SpanError(
            f"The chat has no {kind} slot for {len(left)} of the {len(unplaced)} {kind}s: add an entry "
            f'{{"type": "{kind}"}} for each.'
        )
    return result


def _user_turn(processor: Any, prompt: str, media: Media) -> dict[str, Any]:
    """A prompt as a message: images and videos first, unless the prompt has slots of that kind."""
    slots = [{"type": kind} for kind in KINDS if not _count_slots(processor, kind, prompt) for _ in media[kind]]
    return {"role": "user", "content": [*slots, {"type": "text", "text": prompt}]}


def with_system(chat: list[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    """A chat with its system message, after a check that anything is asked in it."""
    if not any(part["text"].strip() for _, part in parts_of(chat, "text")):
        raise ConfigError("The chat has no text: write what is asked about the image.")
    if system is None:
        return chat
    if chat[0]["role"] == "system":
        raise ConfigError("The chat has a system message already: leave out the other one.")
    return [{"role": "system", "content": [{"type": "text", "text": system}]}, *chat]


def rendered(processor: Any, chat: list[dict[str, Any]]) -> str:
    """The text of a chat, up to where its next answer begins."""
    if getattr(processor, "chat_template", None) is None:
        if len(chat) > 1:
            raise ConfigError(
                f"{type(processor).__name__} has no chat template: give one prompt, with its image tokens."
            )
        return "".join(part["text"] for _, part in parts_of(chat, "text"))
    try:
        text: str = processor.apply_chat_template(chat, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like
        raise ConfigError(f"The model's chat template refuses this chat: {one_line(error)}") from error
    return text


def _count_slots(processor: Any, kind: str, text: str) -> int:
    """Count the slots of images or videos in a prompt; Gemma 3 marks them by the begin token."""
    tokens = (
        getattr(processor, f"{kind}_token", None),
        getattr(processor, "boi_token", None) if kind == "image" else None,
    )
    return max(text.count(str(token)) if token else 0 for token in tokens)


def check_slots(processor: Any, text: str, media: Media, text_alone: bool) -> None:
    """Raise `SpanError` unless a text has a slot for each image and video, and has any where some are needed."""
    for kind in KINDS:
        slots, count = _count_slots(processor, kind, text), len(media[kind])
        if slots == 0 < count:
            raise SpanError(f"The prompt has no {kind} slot for the {count} {kind}(s) given.")
        if slots != count:
            raise SpanError(f"The prompt has {slots} {kind} slot(s), but {count} {kind}(s) are given.")
    if not any(media.values()) and not text_alone:
        raise SpanError(
            "The prompt has no image slot, so there is nothing to prune: give an image with it, or an image "
            "entry in the chat."
        )


def processed(processor: Any, texts: Sequence[str], media: Sequence[Media], *, begins: bool = True) -> dict[str, Any]:
    """What a processor makes of texts and their media; a text that ``begins`` no prompt gets no tokens around it."""
    options: dict[str, Any] = {}
    bos = getattr(processor.tokenizer, "bos_token", None)
    # Where the template has written the token of the beginning, the tokenizer would write it once more.
    if not begins or (bos and texts[0].startswith(bos)):
        options["add_special_tokens"] = False
    if any(row["image"] for row in media):
        options["images"] = [row["image"] for row in media]  # a list per prompt, as Idefics asks for and all take
    if any(row["video"] for row in media):
        options["videos"] = [video for row in media for video in row["video"]]
    if len(texts) > 1:
        options |= {"padding": True, "padding_side": "left"}
    return dict(processor(text=list(texts), return_tensors="pt", **options))
