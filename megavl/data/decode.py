"""Image files to upright RGB images. Apart from image.py, which needs torch: preparing a dataset does not.

The released DeepSeek-VL code calls Pillow's `convert("RGB")` and nothing else, which clips 16-bit grey to white, shows
what transparency hides, and leaves a photograph as its camera was held. Here an image is what a browser would show on a
white page. Colour profiles are not applied, as there.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from megavl.data.errors import DataError

# Pillow knows many more. Left out are those that run code or other programs (EPS), those that are no pictures of their
# own (MPEG, HDF5, GRIB), and those that no corpus has. A JPEG with several pictures (MPO) is read as a JPEG.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# 201 MB of RGB. Below the size from which Pillow would warn.
_MAX_PIXELS = 2**26
_MAX_SIDE = 2**15
# What makes a picture of EXIF's orientation 2 to 8 upright. (Pillow's ImageOps.exif_transpose also writes the rest of
# EXIF anew, and fails where that is damaged.)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_ON_THEIR_SIDE = {_UPRIGHT[orientation] for orientation in (5, 6, 7, 8)}


def decode(data: bytes) -> Image.Image:
    """The RGB image in the bytes of an image file; of an animation, its first frame.

    Raises:
        DataError: the bytes are no image of a known format, are cut off, unpack to more pixels than anybody trains on,
            or have pixels whose black and white are unknown.
    """
    with _named_errors(data):
        image = _open(data)
        image.load()  # also turns a TIFF, which then has no orientation any more
        turn = _turn(image)
        rgb = _to_rgb(image)
        return rgb if turn is None else rgb.transpose(turn)


def decoded_size(data: bytes) -> tuple[int, int]:
    """Width and height of what `decode` gives, or its error, in half the time: a JPEG is read to its end, but unpacked
    to an eighth of its sides."""
    with _named_errors(data):
        image = _open(data)
        sides = image.size
        image.draft(image.mode, (1, 1))
        shrunk = image.size
        image.load()
        turn = _turn(image)
        _to_rgb(image)
        # A TIFF has been turned by now.
        sides = sides if image.size == shrunk else sides[::-1]
        return sides[::-1] if turn in _ON_THEIR_SIDE else sides


def stored_size(data: bytes) -> tuple[int, int]:
    """The same of a file of which the header alone is read: it may be cut off further down.

    Raises:
        DataError: the bytes are no image of a known format, or the header tells of more pixels than anybody trains on.
    """
    with _named_errors(data):
        image = _open(data)
        # Pillow gives the sides of a TIFF as they are when it is turned.
        return image.size[::-1] if image.format != "TIFF" and _turn(image) in _ON_THEIR_SIDE else image.size


@contextmanager
def _named_errors(data: bytes) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of metadata that nobody reads, and of sizes refused here
            yield
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error, ...
        # Pillow names the file in this one, which here is an object in memory.
        known = f"no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"
        reason = known if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{len(data)} bytes that cannot be decoded as an image ({reason})") from error


def _open(data: bytes) -> Image.Image:
    """An image of which the header alone is read."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _refuse_size(*image.size)
    return image


def _turn(image: Image.Image) -> Image.Transpose | None:
    return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))


def _refuse_size(width: int, height: int) -> None:
    """Before a pixel is unpacked: a file of some kilobytes can hold billions."""
    if min(width, height) < 1 or max(width, height) > _MAX_SIDE or width * height > _MAX_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels; the sides may be 1 to {_MAX_SIDE} and the image have {_MAX_PIXELS} at most"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers (mode {image.mode}), of which none is known to be white")
    if image.mode.startswith("I;16"):
        # The high byte, as Pillow itself reads 16-bit RGB; its conversion from 16-bit grey would clip at 255.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        page = Image.new("RGB", image.size, "white")
        layer = image.convert("RGBA")
        page.paste(layer, mask=layer)
        return page
    return image.convert("RGB")
