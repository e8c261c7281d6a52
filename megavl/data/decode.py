"""Image files to RGB images. Apart from image.py, which needs torch: preparing a dataset does not."""

import io
import warnings

from PIL import Image, UnidentifiedImageError

from megavl.data.errors import DataError


def decode(data: bytes) -> Image.Image:
    """The RGB image in the bytes of an image file.

    Raises:
        DataError: the bytes are no image, are cut off, or unpack to more pixels than Pillow allows.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data)).convert("RGB")
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error, ...
        # Pillow names the file in this one, which here is an object in memory.
        reason = "of no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{len(data)} bytes that cannot be decoded as an image ({reason})") from error
