import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.data.images import decode, resize_and_crop, to_pixels, to_tensor
from ldm.errors import UserError

HIDDEN, RED, WHITE = (0, 255, 0), (255, 0, 0), (255, 255, 255)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(height=20, width=30, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def half_transparent():
    """The left half opaque red, the right half transparent over a hidden green."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4] = (*RED, 255)
    pixels[:, 4:] = (*HIDDEN, 0)
    return Image.fromarray(pixels)


def test_pixels_of_a_png_are_kept_to_the_bit():
    pixels = noise()
    assert np.array_equal(decode(encoded(Image.fromarray(pixels))), pixels)


def test_bytes_a_path_and_an_opened_picture_give_the_same(tmp_path):
    pixels = noise()
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    for given_as in (path.read_bytes(), path, str(path), Image.open(path)):
        assert np.array_equal(decode(given_as), pixels)


def test_result_is_writable_and_turns_to_a_tensor_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pixels in (decode(encoded(Image.fromarray(noise()))), resize_and_crop(noise(), 8)):
            assert pixels.flags.writeable
            to_tensor(pixels)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    found = decode(encoded(Image.fromarray(grey), kind))
    assert np.abs(found.astype(int) - np.round(grey / 257)[..., None].astype(int)).max() == 0


def test_a_dark_16_bit_picture_stays_dark():
    grey = np.full((4, 4), 2570, np.uint16)
    assert (decode(encoded(Image.fromarray(grey))) == 10).all()


@pytest.mark.parametrize("mode", ["I;16B", "I;16L", "I;16", "I"])
def test_every_16_bit_mode(mode):
    image = Image.fromarray(np.array([[0, 32896, 65535]], np.int32)).convert(mode)
    assert decode(image)[0, :, 0].tolist() == [0, 128, 255]


def test_16_bit_colour():
    # Pillow writes no such file: IHDR says 16 bits of RGB, each row begins with its filter, 0
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = b"\0" + struct.pack(">6H", 65535, 32896, 0, 257, 514, 771)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    png += chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    assert decode(png).tolist() == [[[255, 128, 0], [1, 2, 3]]]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 255), (-1, 1), (0, 1e9)], ids=["unit", "8 bits", "signed", "wide"]
)
def test_float_grey_fills_the_range(low, high):
    grey = np.linspace(low, high, 64, dtype=np.float32).reshape(8, 8)
    found = decode(encoded(Image.fromarray(grey), "TIFF"))[..., 0]
    assert found.min() == 0 and found.max() == 255
    assert (np.diff(found.flatten().astype(int)) >= 0).all()


def test_a_dark_float_picture_stays_dark_and_gaps_are_black():
    grey = np.full((4, 4), 0.2, np.float32)
    grey[0, 0] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode(encoded(Image.fromarray(grey), "TIFF"))
    assert found[1, 1, 0] == 51 and found[0, 0, 0] == 0


def test_transparency_shows_the_background_not_hidden_colour():
    data = encoded(half_transparent())
    found = decode(data)
    assert tuple(found[0, 0]) == RED and tuple(found[0, 7]) == WHITE
    assert tuple(decode(data, background=(1, 2, 3))[0, 7]) == (1, 2, 3)


def test_half_opacity_blends():
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert decode(encoded(image))[0, 0].tolist() == pytest.approx([127] * 3, abs=1)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_palette_and_other_transparency(kind):
    image = half_transparent()
    if kind == "PNG":
        image = image.quantize(16)
    found = decode(encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert tuple(found[0, 0]) == RED and tuple(found[0, 7]) == WHITE


def test_transparent_index_of_a_palette():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([*HIDDEN, *RED])
    image.paste(1, (0, 0, 2, 4))
    found = decode(encoded(image, transparency=0))
    assert tuple(found[0, 0]) == RED and tuple(found[0, 3]) == WHITE


def test_transparent_colour_of_rgb_and_of_grey():
    rgb, grey = Image.new("RGB", (4, 4), HIDDEN), Image.new("L", (4, 4), 7)
    rgb.paste(RED, (0, 0, 2, 4))
    assert [tuple(p) for p in decode(encoded(rgb, transparency=HIDDEN))[0, [0, 3]]] == [RED, WHITE]
    assert tuple(decode(encoded(grey, transparency=7))[0, 0]) == WHITE


def test_grey_with_alpha():
    image = Image.fromarray(np.array([[[50, 255], [50, 0]]], np.uint8), "LA")
    assert decode(encoded(image)).tolist() == [[[50] * 3, [255] * 3]]


def test_one_bit():
    image = Image.fromarray(np.array([[True, False]]))
    assert image.mode == "1"
    assert decode(encoded(image)).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind):
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    found = decode(encoded(image, kind))[4, 4].astype(int)
    assert found[0] > 200 and found[1:].max() < 60


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_exif_rotation(kind, orientation, turn):
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :8] = 255  # a white corner, top left
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encoded(Image.fromarray(stored), kind, exif=exif))
    meant = np.rot90(stored, turn)
    assert found.shape == meant.shape
    assert np.abs(found.astype(int) - meant).mean() < 10


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_does_not_cost_the_picture(kind, exif):
    assert decode(encoded(Image.fromarray(noise()), kind, exif=exif)).shape == (20, 30, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, (0, 0, 255))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    assert np.abs(decode(data)[4, 4].astype(int) - RED).max() < 4


@pytest.mark.parametrize(
    "content", [b"", b"<!DOCTYPE html><html>404</html>", b"\0" * 100, b"text"], ids=["empty", "html", "zeros", "text"]
)
def test_what_is_no_picture_is_refused(content, tmp_path):
    with pytest.raises(UserError, match="not a picture: empty, or of no known format"):
        decode(content)
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UserError, match="not a picture"):
        decode(tmp_path / "a.jpg")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_truncated_picture_is_refused(kind):
    data = encoded(Image.fromarray(noise(64, 64)), kind)
    with pytest.raises(UserError, match="picture"):
        decode(data[: len(data) // 2])


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "nothing.png", tmp_path):
        with pytest.raises(UserError, match="not a readable picture"):
            decode(path)


def test_a_decompression_bomb_is_refused():
    data = encoded(Image.new("1", (14_000, 14_000)))
    assert len(data) < 100_000
    with pytest.raises(UserError, match="decompression bomb"):
        decode(data)


KINDS = "PNG RGB, PNG P, PNG RGBA, JPEG RGB, JPEG CMYK, GIF P, WEBP RGB, WEBP RGBA, BMP RGB, TIFF RGB, TIFF F, AVIF RGB"
SAMPLES = [
    encoded(Image.fromarray(noise(16, 24)).convert(mode), kind)
    for kind, mode in (each.split() for each in KINDS.split(", "))
]


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), sample=st.sampled_from(SAMPLES))
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_a_picture_or_a_clear_refusal(sample, data):
    damaged = bytearray(sample)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(sample) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(sample)))] if data.draw(st.booleans()) else damaged
    try:
        pixels = decode(bytes(damaged))
    except UserError:
        return
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (64, 16), (100, 101), (1, 50), (50, 1), (3, 3)])
@pytest.mark.parametrize("resolution", [16, 32])
def test_resize_and_crop_gives_the_square(shape, resolution):
    assert resize_and_crop(noise(*shape), resolution).shape == (resolution, resolution, 3)


def test_the_right_size_is_left_alone():
    pixels = noise(16, 16)
    assert np.array_equal(resize_and_crop(pixels, 16), pixels)


def test_the_centre_is_kept_and_nothing_is_squeezed():
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 255
    assert (resize_and_crop(wide, 32) == 255).all()
    assert resize_and_crop(wide, 16)[8, 8, 0] == 255
    assert (resize_and_crop(wide.transpose(1, 0, 2), 32) == 255).all()


def test_downscaling_is_antialiased():
    lines = np.zeros((64, 64, 3), np.uint8)
    lines[:, ::2] = 255
    found = resize_and_crop(lines, 16)[:, 2:-2].astype(int)
    assert np.abs(found - 127).max() < 12


def test_tensor_and_pixels_are_inverse_for_every_value():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    image = to_tensor(pixels)
    assert image.dtype == torch.float32 and image.shape == (1, 3, 16, 16)
    assert image.min() == -1 and image.max() == 1
    assert np.array_equal(to_pixels(image), pixels)
    assert np.array_equal(to_pixels(to_tensor(pixels[0])), pixels[0])


def test_channels_go_first_and_stay_in_order():
    image = to_tensor(np.array([[[255, 0, 127]]], np.uint8))
    assert image[:, 0, 0].tolist() == pytest.approx([1, -1, -1 / 255])


def test_pixels_of_half_precision_and_out_of_range():
    image = torch.tensor([-2.0, 0.0, 7.0], dtype=torch.bfloat16, requires_grad=True).reshape(3, 1, 1)
    assert to_pixels(image).tolist() == [[[0, 128, 255]]]


def test_bytes_are_not_changed_by_turning_them_to_a_tensor():
    pixels = noise()
    before = pixels.copy()
    to_tensor(pixels)
    assert np.array_equal(pixels, before)
