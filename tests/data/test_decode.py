"""What each kind of image file becomes, and what is refused."""

import io
import random
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from megavl.data.decode import decode, decoded_size, stored_size
from megavl.data.errors import DataError
from tests.data.conftest import image_bytes

WHITE, RED = (255, 255, 255), (255, 0, 0)


def saved(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG file by hand: Pillow writes no 16-bit colours, and no wrong headers."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("form", ["AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP"])
def test_known_formats_decode_to_rgb(form):
    image = decode(image_bytes(0, (12, 9), form))
    assert (image.mode, image.size) == ("RGB", (12, 9))


@pytest.mark.parametrize("form", ["EPS", "PDF", "PPM", "ICO", "TGA", "JPEG2000"])
def test_other_formats_are_refused_whatever_pillow_could_do(form):
    with pytest.raises(DataError, match=r"no AVIF, BMP, GIF, JPEG, PNG, TIFF or WEBP file"):
        decode(image_bytes(0, (16, 16), form))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((40000, 10), "40000 x 10 pixels; the sides may be 1 to 32768"),
        ((10000, 9000), "10000 x 9000 pixels; .* have 67108864 at most"),
        ((30000, 30000), "exceeds limit"),  # Pillow's own limit is met first
    ],
)
def test_absurd_sizes_are_refused_from_the_header_alone(size, message):
    """The file holds no pixel at all: were one asked for, the reason would be another."""
    with pytest.raises(DataError, match=message):
        decode(png(*size, 8, 2, b""))


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_an_image_without_pixels_is_refused(size):
    with pytest.raises(DataError, match="cannot be decoded"):
        decode(png(*size, 8, 2, b""))


@pytest.mark.parametrize("data", [b"", b"no image"])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(DataError, match=f"{len(data)} bytes that cannot be decoded") as refusal:
        decode(data)
    assert "BytesIO" not in str(refusal.value)


@pytest.mark.parametrize("form", ["AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("lost", [100, 1500])
def test_a_file_that_lost_pixels_is_refused(form, lost):
    data = image_bytes(0, (50, 50), form)
    with pytest.raises(DataError, match="cannot be decoded"):
        decode(data[:-lost])


@pytest.mark.parametrize("form", ["GIF", "PNG", "TIFF", "WEBP", "AVIF"])
def test_of_an_animation_the_first_frame_is_taken(form):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "green")]
    image = decode(saved(frames[0], form, save_all=True, append_images=frames[1:]))
    assert image.size == (16, 16)
    assert np.abs(np.array(image.getpixel((8, 8))) - RED).max() <= 2  # AVIF and WebP lose a little


def test_cmyk_and_ycck_become_rgb():
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert decode(saved(ink, "TIFF")).getpixel((8, 8)) == RED
    # Pillow writes Adobe's inverted CMYK into a JPEG file, and reads YCCK and CMYK alike.
    assert np.abs(np.array(decode(saved(ink, "JPEG")).getpixel((8, 8))) - RED).max() <= 2
    inks = saved(ink, "JPEG")
    transform = inks.index(b"Adobe") + 11
    ycck = inks[:transform] + b"\x02" + inks[transform + 1 :]
    assert Image.open(io.BytesIO(ycck)).info["adobe_transform"] == 2
    assert decode(ycck).mode == "RGB"


def test_16_bits_are_scaled_not_clipped():
    levels = np.array([[0, 255, 256, 0x8000, 0xFFFF]], dtype=np.uint16)
    for form in ("PNG", "TIFF"):
        image = decode(saved(Image.fromarray(levels), form))
        assert [image.getpixel((x, 0)) for x in range(5)] == [(v, v, v) for v in (0, 0, 1, 128, 255)]
    big_endian = struct.pack(">2sHI", b"MM", 42, 8)  # a TIFF of one row, by hand
    tags = [(256, 3, 5), (257, 3, 1), (258, 3, 16), (262, 3, 1), (273, 4, 8 + 2 + 12 * 6 + 4), (279, 4, 10)]
    entries = b"".join(
        struct.pack(">HHI", tag, kind, 1) + struct.pack(">HH" if kind == 3 else ">I", *([value, 0][: 4 - kind + 1]))
        for tag, kind, value in tags
    )
    tiff = big_endian + struct.pack(">H", len(tags)) + entries + struct.pack(">I", 0) + levels.astype(">u2").tobytes()
    assert Image.open(io.BytesIO(tiff)).mode == "I;16B"
    assert [decode(tiff).getpixel((x, 0))[0] for x in range(5)] == [0, 0, 1, 128, 255]
    colours = png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 0, 256, 0x8000, 0xFFFF, 0x7FFF, 255))
    assert [decode(colours).getpixel((x, 0)) for x in range(2)] == [(0, 1, 128), (255, 127, 0)]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_numbers_say_nothing_of_black_and_white(mode):
    with pytest.raises(DataError, match=f"32-bit numbers \\(mode {mode}\\)"):
        decode(saved(Image.new(mode, (5, 4)), "TIFF"))


def test_transparency_lies_on_a_white_page():
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    half.putpixel((0, 0), (0, 0, 0, 0))
    for form in ("PNG", "TIFF"):
        image = decode(saved(half, form))
        assert image.getpixel((0, 0)) == WHITE  # what is hidden there is black
        assert image.getpixel((1, 1)) == (255, 127, 127)
    assert decode(saved(Image.new("LA", (4, 4), (0, 128)), "PNG")).getpixel((0, 0)) == (127, 127, 127)


def test_transparency_of_a_palette_and_of_one_colour():
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((0, 0), 0)
    for form, options in (("GIF", {"transparency": 0}), ("PNG", {"transparency": 0}), ("PNG", {})):
        image = decode(saved(palette, form, **options))
        assert image.getpixel((0, 0)) == (WHITE if options else (0, 0, 0))
        assert image.getpixel((1, 1)) == RED
    keyed = saved(Image.new("RGB", (4, 4), "red"), "PNG", transparency=RED)
    assert decode(keyed).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize(("mode", "colour"), [("1", 1), ("L", 255)])
def test_grey_and_black_and_white(mode, colour):
    image = Image.new(mode, (5, 4))
    image.putpixel((0, 0), colour)
    decoded = decode(saved(image, "PNG"))
    assert (decoded.getpixel((0, 0)), decoded.getpixel((1, 1))) == (WHITE, (0, 0, 0))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_a_photograph_is_turned_upright(form, orientation):
    """The corners of the upright picture are red, green, blue and white, clockwise from the top left."""
    upright = Image.fromarray(np.array([[RED, WHITE, (0, 255, 0)], [WHITE, WHITE, (0, 0, 255)]], dtype=np.uint8))
    held = {  # how the camera stored it: EXIF says how to undo it
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]
    stored = upright
    for turn in held:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    data = saved(stored, form, exif=exif, **options)
    decoded = decode(data)
    assert decoded.size == decoded_size(data) == stored_size(data) == (3, 2)
    assert np.array_equal(np.asarray(decoded), np.asarray(upright))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(90, 50), (3, 2)])
def test_the_size_of_a_photograph_is_known_from_an_eighth_of_it(orientation, size):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = saved(Image.new("RGB", size), "JPEG", exif=exif)
    assert decoded_size(data) == decode(data).size == (size if orientation < 5 else size[::-1])


def test_a_damaged_file_is_an_image_or_a_refusal():
    """2,000 files with some bytes changed, EXIF among them: nothing but DataError comes out of `decode`, and
    `decoded_size` says the same."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "maker"
    picture = Image.open(io.BytesIO(image_bytes(0, (20, 16))))
    files = [saved(picture, form, exif=exif) for form in ("AVIF", "JPEG", "PNG", "TIFF", "WEBP")]
    files += [saved(picture, form) for form in ("BMP", "GIF")] + [saved(picture.convert("CMYK"), "JPEG")]
    random_ = random.Random(0)
    refused = 0
    for _ in range(2000):
        data = bytearray(random_.choice(files))
        for _ in range(random_.randint(1, 6)):
            data[random_.randrange(min(len(data), random_.choice((60, 200, 100_000))))] = random_.randrange(256)
        try:
            image = decode(bytes(data))
        except DataError as error:
            refused += 1
            with pytest.raises(DataError, match=re.escape(str(error))):
                decoded_size(bytes(data))
        else:
            assert (image.mode, image.size) == ("RGB", decoded_size(bytes(data)))
            assert image.size == stored_size(bytes(data))
    assert 200 < refused < 1900
