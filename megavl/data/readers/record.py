"""Records to documents: a JSON object, a row of a table or a sample of a tar, whatever its layout.

A layout is known by one key that no other has; keys that belong to none are metadata and are not read, and a key whose
value is null counts as absent.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megavl.data.decode import stored_size
from megavl.data.document import Document, Image, Segment, Text, Token
from megavl.data.errors import DataError
from megavl.data.grounding import Box, Object, converse, locate
from megavl.data.readers.json_object import described
from megavl.data.template import Conversation, Template, Turn

# Where an image belongs in the words of a conversation.
MARKER = "<image>"

_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class Place:
    """Where a record is: the input file, and its number there from 1 (of a line format, the line)."""

    path: str
    number: int

    def refuse(self, reason: DataError) -> DataError:
        """The error that names the record and what is wrong with it."""
        return DataError(f"{self.path}:{self.number}: {reason}")


@dataclass(frozen=True)
class Record:
    """One record.

    values:     its keys; of a JSON object, of a row, or of a sample
    read_image: the bytes of an image that the record names
    template:   how a conversation is written
    """

    values: dict[str, Any]
    read_image: Callable[[str], bytes]
    template: Template


def to_document(record: Record, place: Place) -> Document:
    """The document of a record, its images read.

    Raises:
        DataError: the record fits no layout or more than one, or is malformed; the message does not name its place.
    """
    values = {name: value for name, value in record.values.items() if value is not None}
    found = [name for name in LAYOUTS if name in values]
    if len(found) != 1:
        keys = ", ".join(json.dumps(key) + " (null)" * (value is None) for key, value in record.values.items())
        raise DataError(
            f"has {' and '.join(map(json.dumps, found)) or 'no key of a layout'} (its keys: {keys[:200] or 'none'}); a "
            f"record has exactly one of {', '.join(map(json.dumps, LAYOUTS))}"
        )
    read = LAYOUTS[found[0]](Record(values, record.read_image, record.template))
    segments, template = tuple(read), read.template if isinstance(read, Conversation) else None
    if not segments:
        raise DataError(f'"{found[0]}" is empty; give at least one entry, or remove the record')
    return Document(_key(values, place), place.path, segments, template)


def _key(values: dict[str, Any], place: Place) -> str:
    name = "id" if "id" in values else "key"
    key = values[name] if name in values else f"{os.path.basename(place.path)}:{place.number}"
    if isinstance(key, bool) or not isinstance(key, str | int):
        raise DataError(f'"{name}" is {described(key)}; give a string or an integer, or leave it out')
    return _text(str(key), f'"{name}"')


def _plain(record: Record) -> Iterator[Segment]:
    """{"text"}, or with "image" or "images" a picture and its caption or what is written on it."""
    yield from _images(record)
    yield Text(_text(record.values["text"], '"text"'))


def _caption(record: Record) -> Iterator[Segment]:
    """{"image", "caption"}, the other name of a picture's text."""
    images = _images(record)
    if not images:
        raise DataError('has "caption" but no "image"; name the image, or call it "text"')
    yield from images
    yield Text(_text(record.values["caption"], '"caption"'))


def _segments(record: Record) -> Iterator[Segment]:
    """{"segments": [{"text"} | {"image"} | {"token"}, ...]}, with "supervised": false on what is read, not learned."""
    for number, value in enumerate(_list(record.values["segments"], '"segments"')):
        name = f"segment {number}"
        match _present(value, name):
            case {"text": text, **rest} if rest.keys() <= {"supervised"}:
                yield Text(_text(text, name), _flag(rest, name))
            case {"token": token, **rest} if rest.keys() <= {"supervised"}:
                yield Token(_text(token, name), _flag(rest, name))
            case {"image": image, **rest} if not rest:
                yield _image(record, image, name)
            case _:
                raise DataError(
                    f'{name} is {described(value)}; a segment is {{"text": "..."}}, {{"image": "path"}} or '
                    '{"token": "..."}'
                )


def _conversations(record: Record) -> Conversation:
    """LLaVA's {"conversations": [{"from", "value"}, ...], "image"}."""
    return _conversation(record, "conversations", "from", "value")


def _messages(record: Record) -> Conversation:
    """{"messages": [{"role", "content"}, ...], "images"}."""
    return _conversation(record, "messages", "role", "content")


def _conversation(record: Record, key: str, role: str, content: str) -> Conversation:
    turns: list[tuple[str, list[Segment | None]]] = []
    for number, value in enumerate(_list(record.values[key], f'"{key}"')):
        name = f"turn {number}"
        turn = _object(value, name)
        if role not in turn or content not in turn:
            raise DataError(f'{name} is {described(value)}; a turn has "{role}" and "{content}"')
        speaker = turn[role]
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise DataError(f'{name}: "{role}" is {described(speaker)}; it is one of {", ".join(_ROLES)}')
        turns.append((_ROLES[speaker], list(_said(record, turn[content], name))))
    images = _images(record)
    markers = sum(segment is None for _, segments in turns for segment in segments)
    if markers != len(images):
        raise DataError(
            f"has {markers} {MARKER} markers and {len(images)} images; every image has one marker where it belongs"
        )
    following = iter(images)
    return record.template.write(
        [
            Turn(role, tuple(next(following) if segment is None else segment for segment in segments))
            for role, segments in turns
        ]
    )


def _said(record: Record, value: object, name: str) -> Iterator[Segment | None]:
    """Segments of a turn, None where the next of the record's images belongs."""
    if isinstance(value, str):
        for index, text in enumerate(value.split(MARKER)):
            if index:
                yield None
            yield Text(checked_text(text, name))
        return
    for part in _list(value, name):
        match _present(part, name):
            case {"text": text, **rest} if rest.keys() <= {"type"}:
                yield Text(_text(text, name))
            case {"token": token, **rest} if rest.keys() <= {"type"}:
                yield Token(_text(token, name))
            case {"image": image, **rest} if rest.keys() <= {"type"}:
                yield _image(record, image, name)
            case {"type": "image", **rest} if not rest:
                yield None
            case _:
                raise DataError(
                    f'{name} has the part {described(part)}; a part is {{"type": "text", "text": "..."}} or '
                    '{"type": "image"}'
                )


def _grounding(record: Record) -> Conversation:
    """{"image", "grounding": [{"query", "boxes"}, ...]}, or with "question" an answer about all images of {"text"} and
    {"query", "boxes"}, whose boxes are in the last one. Boxes are [left, top, right, bottom] in pixels."""
    images = _images(record)
    if not images:
        raise DataError('has "grounding" but no "image" in which its boxes are; name the image')
    parts = [
        _named(part, f"grounding {number}")
        for number, part in enumerate(_list(record.values["grounding"], '"grounding"'))
    ]
    if not parts:
        raise DataError('"grounding" is empty; give at least one object, without boxes if it is not in the image')
    try:
        size = stored_size(images[-1].data)
    except DataError as error:
        raise DataError(f"image {images[-1].name}: {error}; replace or remove the image") from error
    if "question" in record.values:
        return record.template.write(converse(images, size, _text(record.values["question"], '"question"'), parts))
    objects = [part for part in parts if isinstance(part, Object)]
    if len(images) > 1 or len(objects) < len(parts):
        raise DataError(
            f'has {len(images)} images and {len(parts) - len(objects)} parts of text but no "question"; without one, '
            "the objects of one image are asked for in turn"
        )
    return record.template.write(locate(images[0], size, objects))


def _named(value: object, name: str) -> str | Object:
    """A part of a grounded answer."""
    match _present(value, name):
        case {"text": text, **rest} if not rest:
            return _text(text, name)
        case {"query": query, "boxes": boxes, **rest} if not rest:
            return Object(_text(query, f'{name}: "query"'), tuple(_boxes(boxes, f'{name}: "boxes"')))
    raise DataError(f'{name} is {described(value)}; it is {{"query": "...", "boxes": [...]}}, or {{"text": "..."}}')


def _boxes(value: object, name: str) -> Iterator[Box]:
    for number, box in enumerate(_list(value, name)):
        if not isinstance(box, list) or [type(side) in (int, float) for side in box] != [True] * 4:
            raise DataError(f"{name}: {number} is {described(box)}; a box is [left, top, right, bottom] in pixels")
        yield tuple(box)


def _mmc4(record: Record) -> Iterator[Segment]:
    """MMC4's {"text_list", "image_info": [{"image_name", "matched_text_index"}, ...]}; an image is before its text."""
    texts = _list(record.values["text_list"], '"text_list"')
    before: dict[int, list[Image]] = {}
    for number, value in enumerate(_list(record.values.get("image_info", []), '"image_info"')):
        name = f"image_info {number}"
        match _object(value, name):
            case {"image_name": image, "matched_text_index": int(index)} if 0 <= index < len(texts):
                before.setdefault(index, []).append(_image(record, image, name))
            case _:
                raise DataError(
                    f'{name} is {described(value)}; it has "image_name" and a "matched_text_index" below {len(texts)}, '
                    "the number of texts"
                )
    for index, text in enumerate(texts):
        yield from before.get(index, ())
        # The texts are sentences, taken apart at the spaces between them.
        yield Text(" " * (index > 0 and index not in before) + _text(text, f"text {index}"))


def _texts(record: Record) -> Conversation | Iterator[Segment]:
    """OBELICS' {"texts", "images"}, or The Cauldron's, whose texts are questions and answers about all images."""
    texts = _list(record.values["texts"], '"texts"')
    return _cauldron(record, texts) if texts and isinstance(texts[0], dict) else _obelics(record, texts)


def _obelics(record: Record, texts: list) -> Iterator[Segment]:
    """Two lists of one length; at each place one of them has its value and the other null."""
    images = _list(record.values.get("images"), '"images"')
    if len(texts) != len(images):
        raise DataError(f'"texts" has {len(texts)} entries and "images" {len(images)}; they must be as many')
    after_text = False
    for number, (text, image) in enumerate(zip(texts, images, strict=True)):
        if (text is None) == (image is None):
            raise DataError(f"place {number} has {'neither' if text is None else 'both'} of text and image; give one")
        if image is not None:
            yield _image(record, image, f"image {number}")
        else:
            # The texts are blocks of a page.
            yield Text("\n\n" * after_text + _text(text, f"text {number}"))
        after_text = image is None


def _cauldron(record: Record, texts: list) -> Conversation:
    turns = []
    for number, value in enumerate(texts):
        said = _object(value, f"text {number}")
        turns += [
            Turn(role, (Text(_text(said.get(role), f'text {number}: "{role}"')),)) for role in ("user", "assistant")
        ]
    images = tuple(_images(record))
    turns[0] = Turn("user", images + turns[0].segments)
    return record.template.write(turns)


# The key by which a layout is known.
LAYOUTS: dict[str, Callable[[Record], Iterator[Segment] | Conversation]] = {
    "text": _plain,
    "caption": _caption,
    "segments": _segments,
    "conversations": _conversations,
    "messages": _messages,
    "grounding": _grounding,
    "text_list": _mmc4,
    "texts": _texts,
}

# Every key that is read.
KEYS = ("id", "key", *LAYOUTS, "image", "images", "image_info", "question")


def _images(record: Record) -> list[Image]:
    """Those of "image" (one, or a list) or of "images"."""
    values = record.values
    if "image" in values and "images" in values:
        raise DataError('has both "image" and "images"; give one of them')
    image = values.get("image", values.get("images", []))
    many = image if isinstance(image, list) else [image]
    return [_image(record, value, f"image {number}") for number, value in enumerate(many)]


def _image(record: Record, value: object, name: str) -> Image:
    """An image by its path, as its bytes, or as the HF image feature's {"bytes", "path"}."""
    match value:
        case str():
            reference = _text(value, name)
            try:
                return Image(record.read_image(reference), reference)
            except DataError as error:
                raise DataError(f"{name}: {error}") from error
        case bytes() if value:
            return Image(value, name)
        case {"bytes": bytes(data), **rest} if data and rest.keys() <= {"path"}:
            return Image(data, str(rest.get("path") or name))
        case {"bytes": None, "path": str(path)}:
            return _image(record, path, name)
    raise DataError(f'{name} is {described(value)}; give a path, the bytes of a file, or {{"bytes", "path"}}')


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is {described(value)}; it must be a string")
    if not value:
        raise DataError(f"{name} is empty; remove it, there is nothing to learn from it")
    return checked_text(value, name)


def checked_text(text: str, name: str) -> str:
    """The text, if it is made of characters.

    Raises:
        DataError: it holds a NUL byte or half of a surrogate pair.
    """
    if "\0" in text:
        raise DataError(f"{name} holds a NUL byte (character {text.index(chr(0))}), which no text has; remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name} holds half of a surrogate pair ({text[error.start]!r} at character {error.start}), which is no "
            "character; write the text as valid Unicode"
        ) from error
    return text


def _list(value: object, name: str) -> list:
    if not isinstance(value, list):
        raise DataError(f"{name} is {described(value)}; it must be a list")
    return value


def _object(value: object, name: str) -> dict:
    if not isinstance(value, dict):
        raise DataError(f"{name} is {described(value)}; it must be an object")
    return value


def _present(value: object, name: str) -> dict:
    """An object without its nulls, of which a table puts one in the place of every absent key."""
    return {key: item for key, item in _object(value, name).items() if item is not None}


def _flag(rest: dict, name: str) -> bool:
    supervised = rest.get("supervised", True)
    if not isinstance(supervised, bool):
        raise DataError(f'{name}: "supervised" is {described(supervised)}; it must be true or false')
    return supervised
