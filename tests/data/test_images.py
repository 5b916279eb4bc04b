import struct
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from improved_ldm.data.images import read_image
from improved_ldm.data.transforms import ImageTransform
from tests.data.sets import encode


def test_transparent_pixels_become_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 255, 255))
    decoded, _ = read_image(encode(image))
    assert decoded.getpixel((3, 3)) == (255, 255, 255) and decoded.getpixel((0, 0)) == (0, 0, 255)
    palette = Image.new("P", (2, 2))
    assert read_image(encode(palette, transparency=0))[0].getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_images_are_scaled():
    image = Image.fromarray(np.full((3, 3), 0x8000, dtype=np.uint16))
    assert read_image(encode(image))[0].getpixel((0, 0)) == (128, 128, 128)


def test_photos_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was rotated by 90 degrees
    image = Image.new("RGB", (64, 32))
    decoded, size = read_image(encode(image, "jpeg", exif=exif), min_size=(30, 15))
    assert size == (64, 32) and decoded.size == (16, 32)


def test_jpeg_is_decoded_no_larger_than_needed():
    y, x = np.mgrid[0:400, 0:600]
    image = Image.fromarray(np.stack([x // 3, y // 2, x // 4], -1).astype(np.uint8))
    encoded = encode(image, "jpeg", quality=95)
    small, size = read_image(encoded, min_size=(90, 120))
    assert size == (400, 600) and small.size == (150, 100)
    transform = ImageTransform(64, "crop_then_resize")
    whole, _ = transform(read_image(encoded)[0], Random(0))
    reduced, control = transform(small, Random(0), size)
    assert control.original_size == (400, 600)
    assert (whole.int() - reduced.int()).abs().max() < 6  # of 255 levels


def ramp(top, dtype):
    """64 x 64 values from 0 to `top`, rising to the right."""
    return np.tile(np.linspace(0, top, 64).astype(dtype), (64, 1))


def tiff(values, order, bits, sample_format=1, orientation=1, photometric=1, data=None):
    """A TIFF file with one grey channel; `order` is < or >."""
    height, width = values.shape
    data = data or values.astype(values.dtype.newbyteorder(order)).tobytes()
    entries = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8 + 2 + 10 * 12 + 4),
        (274, 3, orientation),
        (278, 4, height),
        (279, 4, len(data)),
        (339, 3, sample_format),
    ]
    head = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(entries))
    for tag, kind, value in entries:
        head += struct.pack(f"{order}HHI", tag, kind, 1)
        head += struct.pack(f"{order}HH", value, 0) if kind == 3 else struct.pack(f"{order}I", value)
    return head + bytes(4) + data


def packed_12_bits(values):
    first, second = values[:, ::2], values[:, 1::2]
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8).tobytes()


RAMPS = [
    ("8 bits", tiff(ramp(255, np.uint8), "<", 8)),
    ("16 bits, little-endian", tiff(ramp(65535, np.uint16), "<", 16)),
    ("16 bits, big-endian", tiff(ramp(65535, np.uint16), ">", 16)),
    ("32 bits", encode(Image.fromarray(ramp(2**31 - 1, np.float64).astype(np.int32)), "tiff")),
    ("32 bits, unsigned", tiff(ramp(2**32 - 1, np.float64).astype(np.uint32), "<", 32)),
    ("32 bits that hold 8", encode(Image.fromarray(ramp(255, np.int32)), "tiff")),
    ("32 bits that hold 16", encode(Image.fromarray(ramp(65535, np.int32)), "tiff")),
    ("32 bits, big-endian", tiff(ramp(65535, np.int32), ">", 32, 2)),
    ("float to 1", encode(Image.fromarray(ramp(1, np.float32)), "tiff")),
    ("float a little above 1", encode(Image.fromarray(ramp(1.02, np.float32)), "tiff")),
    ("float, big-endian", tiff(ramp(1, np.float32), ">", 32, 3)),
    ("float to 255", encode(Image.fromarray(ramp(255, np.float32)), "tiff")),
    ("float to 65535", encode(Image.fromarray(ramp(65535, np.float32)), "tiff")),
    ("float from -1", encode(Image.fromarray(ramp(2, np.float32) - 1), "tiff")),
    ("12 bits", tiff(ramp(4095, np.uint16), "<", 12, data=packed_12_bits(ramp(4095, np.uint16)))),
    ("8 bits, 0 is white", tiff(255 - ramp(255, np.uint8), "<", 8, photometric=0)),
    ("16 bits, 0 is white", tiff(65535 - ramp(65535, np.uint16), "<", 16, photometric=0)),
    ("16 bits, PNG", encode(Image.fromarray(ramp(65535, np.uint16)))),
]


@pytest.mark.parametrize("encoded", [case[1] for case in RAMPS], ids=[c[0] for c in RAMPS])
def test_a_grey_ramp_stays_a_ramp_whatever_its_depth(encoded):
    image, size = read_image(encoded)
    values = np.asarray(image).astype(int)
    assert size == (64, 64) and image.mode == "RGB"
    np.testing.assert_allclose(values[5, :, 1], np.linspace(0, 255, 64), atol=6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 65535), min_size=4, max_size=4), st.sampled_from("<>"))
def test_sixteen_bits_keep_their_upper_byte(values, order):
    image, _ = read_image(tiff(np.array([values], np.uint16), order, 16))
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [value >> 8 for value in values]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value):
    values = ramp(1, np.float32)
    values[3, 3] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        read_image(encode(Image.fromarray(values), "tiff"))


def white_and_blue(mode):
    """A transparent pixel, then an opaque one."""
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 255, 255))
    return image.convert(mode)


MODES = [
    ("RGBA", white_and_blue("RGBA"), "png", {}, (0, 0, 255)),
    ("LA", white_and_blue("LA"), "png", {}, (29, 29, 29)),
    ("palette", white_and_blue("RGBA").quantize(4), "png", {}, (0, 0, 255)),
    ("webp", white_and_blue("RGBA"), "webp", {"lossless": True}, (0, 0, 255)),
    ("16 bits", Image.fromarray(np.array([[7, 0x8000]], np.uint16)), "png", {"transparency": 7}, (128, 128, 128)),
    ("GIF", Image.fromarray(np.array([[0, 9]], np.uint8)), "gif", {"transparency": 0}, (9, 9, 9)),
]


@pytest.mark.parametrize(("image", "kind", "options", "opaque"), [m[1:] for m in MODES], ids=[m[0] for m in MODES])
def test_transparency_is_white_in_every_mode(image, kind, options, opaque):
    decoded, size = read_image(encode(image, kind, **options))
    assert decoded.mode == "RGB" and size == (1, 2)
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    np.testing.assert_allclose(decoded.getpixel((1, 0)), opaque, atol=3)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("1", "png"), ("L", "jpeg"), ("CMYK", "jpeg"), ("CMYK", "tiff"), ("YCbCr", "jpeg"), ("P", "png")],
)
def test_other_modes_become_rgb(mode, kind):
    decoded, _ = read_image(encode(Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode), kind))
    assert decoded.mode == "RGB" and np.asarray(decoded).min() > 250


@pytest.mark.parametrize("kind", ["gif", "png", "tiff", "webp"])
def test_of_several_frames_the_first_is_taken(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if kind == "webp" else {}
    decoded, _ = read_image(encode(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert decoded.getpixel((1, 1)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 65535])
def test_orientations_outside_their_range_are_ignored(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16, :32] = 255  # the upper left corner of the stored image
    encoded = encode(Image.fromarray(pixels), kind, exif=exif)
    image, size = read_image(encoded, min_size=(1, 1) if kind == "jpeg" else None)
    valid = orientation if 1 <= orientation <= 8 else 1
    assert size == ((64, 32) if valid >= 5 else (32, 64)) and (image.height > image.width) == (valid >= 5)
    corners = [(0, 0), (image.width - 1, 0), (image.width - 1, image.height - 1), (0, image.height - 1)]
    white = {1: 0, 2: 1, 3: 2, 4: 3, 5: 0, 6: 1, 7: 2, 8: 3}[valid]
    assert [image.getpixel(corner)[0] > 128 for corner in corners] == [number == white for number in range(4)]


@pytest.mark.parametrize(
    ("kind", "count", "value"),
    [
        (2, 2, b"6\0\0\0"),
        (7, 1, b"\6\0\0\0"),
        (9, 1, b"\xff\xff\xff\xff"),
        (11, 1, b"\0\0\xc0\x40"),
        (99, 1, b"\6\0\0\0"),
    ],
    ids=["text", "bytes", "negative", "float", "unknown"],
)
def test_orientations_of_a_wrong_type_are_ignored(kind, count, value):
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHI", 1, 0x0112, kind, count) + value + bytes(4)
    image, size = read_image(encode(Image.new("RGB", (8, 4)), "jpeg", exif=exif))
    assert size == (4, 8) and image.size == (8, 4)


def test_damaged_exif_does_not_cost_the_image():
    encoded = encode(
        Image.new("RGB", (8, 4), "white"), "jpeg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff" + b"\xff" * 20
    )
    assert read_image(encoded)[1] == (4, 8)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "tiff"])
def test_a_cut_file_is_refused(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    encoded = encode(Image.fromarray(pixels), kind)
    with pytest.raises(Exception, match=""):
        read_image(encoded[: len(encoded) // 2])
