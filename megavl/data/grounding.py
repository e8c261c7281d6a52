"""Grounding: where in an image things are, as DeepSeek-VL2 is asked and as it answers.

Sources: DeepSeek-VL2 (arXiv 2412.10302), sections 3.2 and 3.3, of which the spellings are; `parse_ref_bbox` of the
released code (serve/app_modules/utils.py), which reads a coordinate c back as c / 999 of the image's side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megavl.data.document import Image, Segment, Text, Token
from megavl.data.errors import DataError
from megavl.data.template import Turn

# A side of an image is so many steps long, whatever its pixels.
STEPS = 999

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Object:
    """What a phrase names in an image.

    query: a category ("car") or a description ("the leftmost person")
    boxes: left, top, right and bottom of each, in pixels from the image's upper left corner; none where it is not there
    """

    query: str
    boxes: tuple[Box, ...]


def normalised(box: Box, size: tuple[int, int]) -> list[int]:
    """The box in steps, 0 to 999, each to the nearest. `size`: width and height of the image in pixels.

    Raises:
        DataError: the box leaves the image, or holds nothing of it.
    """
    left, top, right, bottom = box
    width, height = size
    if not (0 <= left <= width and 0 <= right <= width and 0 <= top <= height and 0 <= bottom <= height):
        raise DataError(
            f"box {list(box)} leaves the image of {width} x {height} pixels; give [left, top, right, bottom] in "
            "its pixels"
        )
    if not (left < right and top < bottom):
        raise DataError(
            f"box {list(box)} holds nothing: left must be below right, and top below bottom; give [left, top, right, "
            "bottom], or no box where the object is not in the image"
        )
    return [round(pixel / side * STEPS) for pixel, side in zip(box, (width, height, width, height), strict=True)]


def locate(image: Image, size: tuple[int, int], objects: Sequence[Object]) -> list[Turn]:
    """Visual grounding: a question and an answer for each object. `size` is the image's.

    One that is not in the image has an empty list of boxes: the paper trains on such, but does not print their answer.

    Raises:
        DataError: as `normalised`.
    """
    turns = []
    for number, found in enumerate(objects):
        shown = () if number else (image, Text("\n"))
        asked = (*shown, Text("Locate "), *_reference(found.query), Text(" in the given image."))
        turns += [Turn("user", asked), Turn("assistant", _located(found, size))]
    return turns


def converse(
    images: Sequence[Image], size: tuple[int, int], question: str, answer: Sequence[str | Object]
) -> list[Turn]:
    """Grounded conversation: an answer in which things are named with their boxes. `size` is that of the last image.

    With two images it is in-context grounding: the first shows an object, the answer says where in the second one there
    is one of its kind.

    Raises:
        DataError: as `normalised`.
    """
    shown = [segment for image in images for segment in (image, Text("\n"))]
    said = [
        segment for part in answer for segment in ((Text(part),) if isinstance(part, str) else _located(part, size))
    ]
    return [Turn("user", (*shown, Token("<|grounding|>"), Text(question))), Turn("assistant", tuple(said))]


def _reference(query: str) -> tuple[Segment, ...]:
    return Token("<|ref|>"), Text(query), Token("<|/ref|>")


def _located(found: Object, size: tuple[int, int]) -> tuple[Segment, ...]:
    boxes = [normalised(box, size) for box in found.boxes]
    return *_reference(found.query), Token("<|det|>"), Text(str(boxes)), Token("<|/det|>")
